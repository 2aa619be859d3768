"""One run writes a folder at a time, and nothing of a living one is removed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffuse_jax.training.checkpoint import Checkpoints, checkpoints
from diffuse_jax.training.flags import settings_from
from diffuse_jax.training.folder import claimed, in_use
from diffuse_jax.training.settings import RunSettings
from diffuse_jax.training.start import check_output
from diffuse_jax.writing import only_writer
from tests.training.line import arguments, train_line
from tests.training.test_checkpoint import HERE, make_state, write

ROOT = Path(__file__).resolve().parents[2]


def test_a_second_run_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    args = arguments("--overwrite_output_dir", output_dir=tmp_path, max_train_steps=1)
    write(tmp_path, 4)
    with claimed(tmp_path):
        before = sorted(tmp_path.rglob("*"))
        for start in (lambda: train_line(args), lambda: check_output(settings_from(args, RunSettings))):
            with pytest.raises(RuntimeError, match=rf"a run that is still active \(process {os.getpid()} on .*wait"):
                start()
        assert sorted(tmp_path.rglob("*")) == before
    train_line(args)
    assert not (tmp_path / ".lock").exists()


def test_a_killed_run_leaves_the_folder_free(tmp_path: Path) -> None:
    code = (
        f"import os\nfrom diffuse_jax.training.folder import claimed\nc = claimed({str(tmp_path)!r})\nc.__enter__()\n"
    )
    killed = [sys.executable, "-c", code + "os.kill(os.getpid(), 9)"]
    assert subprocess.run(killed, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode == -9
    assert (tmp_path / ".lock").exists()
    with claimed(tmp_path):
        pass


def test_a_checkpoint_that_is_being_written_stays(tmp_path: Path) -> None:
    """Whoever opens the folder meanwhile, and whoever wants to write the same one is refused."""
    with only_writer(tmp_path / "checkpoint-3") as partial:
        (partial / "state").mkdir()
        saver = Checkpoints(tmp_path)
        assert (partial / "state").is_dir()
        with pytest.raises(FileExistsError, match="checkpoint-3 is being written by another process"):
            saver.save(3, make_state(), HERE)
        assert (partial / "state").is_dir()
    saver.save(3, make_state(), HERE)
    saver.close()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_checkpoint_that_is_being_read_is_deleted_at_the_next_save(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    with in_use(tmp_path / "checkpoint-1"):
        write(tmp_path, 3, limit=2)
        assert list(checkpoints(tmp_path)) == [1, 2, 3]
    write(tmp_path, 4, limit=2)
    assert list(checkpoints(tmp_path)) == [3, 4]


@pytest.mark.parametrize("below", ["", "run"])
def test_an_impossible_folder_is_refused_before_anything_is_loaded(below: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    run = RunSettings(output_dir=file / below)
    with pytest.raises(NotADirectoryError, match="cannot be a folder: it, or part of its path, is a file"):
        check_output(run)


def test_the_folder_of_an_older_run_is_found_before_loading(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint latest"):
        check_output(RunSettings(output_dir=tmp_path))
    with pytest.raises(FileNotFoundError, match="no checkpoint checkpoint-7"):
        check_output(RunSettings(output_dir=tmp_path, resume_from_checkpoint="checkpoint-7"))
