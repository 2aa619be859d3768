"""Checkpoints are complete or absent, and any run resumes from them bit for bit, on any mesh."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.sharding import make_mesh
from diffuse_jax.training import checkpoint as module
from diffuse_jax.training.checkpoint import (
    Checkpoints,
    Position,
    checkpoints,
    compare_checkpoint,
    find_checkpoint,
    load_checkpoint,
    load_position,
    shapes_of,
)
from diffuse_jax.training.optimizer import make_optimizer
from diffuse_jax.training.state import TrainState, init_state
from tests.disk import disk_of
from tests.quick_xla import xla_flags
from tests.training.line import arguments, start, train_line

ROOT = Path(__file__).resolve().parents[2]
HERE = Position({"batch": 3}, 8, 1)


def make_state(optimizer: str = "adamw", use_ema: bool = True, mesh: Any = None, width: int = 16) -> TrainState:
    params = {"to_q": {"kernel": np.random.default_rng(0).standard_normal((width, 8)).astype(np.float32)}}
    return init_state(params, make_optimizer(optimizer, lambda _: 0.1), use_ema, make_mesh() if mesh is None else mesh)


def write(folder: Path, *steps: int, limit: int | None = None, state: TrainState | None = None) -> None:
    saver = Checkpoints(folder, limit)
    for step in steps:
        saver.save(step, make_state() if state is None else state, HERE)
    saver.close()


def assert_same_bits(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_state_round_trips_bit_for_bit(tmp_path: Path) -> None:
    state = init_state({"w": np.array([np.pi, 1e-38, -0.0], np.float32)}, make_optimizer("adamw", lambda _: 0.1), True)
    write(tmp_path, 7, state=state)
    assert_same_bits(load_checkpoint(tmp_path / "checkpoint-7", state), state)
    assert load_position(tmp_path / "checkpoint-7") == HERE


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor", "muon"])
def test_a_state_is_restored_onto_any_mesh(tmp_path: Path, optimizer: str) -> None:
    """8 devices -> 4 -> 1, and sharded along other axes on the way."""
    eight = make_mesh(data=2, fsdp=4)
    four = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    one = make_mesh(devices=jax.devices()[:1])
    state = first = make_state(optimizer, mesh=eight)
    for n, mesh in enumerate((four, one, make_mesh(data=8))):
        write(tmp_path, n, state=state)
        state = load_checkpoint(tmp_path / f"checkpoint-{n}", shapes_of(make_state(optimizer, mesh=mesh)))
        assert_same_bits(state, first)
        assert state.params["to_q"]["kernel"].sharding.mesh.shape == mesh.shape


def test_saving_does_not_wait_for_the_disk_and_the_state_may_be_donated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While 32 MB are being written, and cannot be finished, steps continue in the memory of the saved state."""
    state = make_state(width=1 << 18)
    before = jax.tree.map(np.array, state)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    saver, steps_made = Checkpoints(tmp_path), threading.Event()
    monkeypatch.setattr(saver, "_finish", lambda *a, real=saver._finish: (steps_made.wait(60), real(*a)))
    saver.save(1, state, HERE)
    for _ in range(3):
        state = step(state)
    jax.block_until_ready(state)
    assert checkpoints(tmp_path) == {}, "what is not finished does not count"
    steps_made.set()
    saver.close()
    assert_same_bits(load_checkpoint(tmp_path / "checkpoint-1", state), before)


def test_spec_of_the_limit(tmp_path: Path) -> None:
    write(tmp_path, 2, 4, 6, limit=2)
    assert list(checkpoints(tmp_path)) == [4, 6]
    write(tmp_path / "b", 2, 4, 6, 8)
    write(tmp_path / "b", 10, limit=3)
    assert list(checkpoints(tmp_path / "b")) == [6, 8, 10]


def test_the_only_checkpoint_is_deleted_after_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = []
    monkeypatch.setattr(
        module, "remove", lambda p, real=module.remove: (there.append(list(checkpoints(tmp_path))), real(p))
    )
    write(tmp_path, 1, 2, 3, limit=1)
    assert there == [[1, 2], [2, 3]]
    assert list(checkpoints(tmp_path)) == [3]


def test_checkpoints_that_a_run_left_behind_count_as_the_oldest(tmp_path: Path) -> None:
    write(tmp_path, 2, 4, 6, 8)
    write(tmp_path, 5, limit=3)
    assert list(checkpoints(tmp_path)) == [2, 4, 5]


def test_names_paths_and_latest(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "latest") is None
    write(tmp_path, 9, 12)
    (tmp_path / "checkpoint-20").mkdir()  # only the model is left of it
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-12"
    assert find_checkpoint(tmp_path, "anything/checkpoint-9") == tmp_path / "checkpoint-9"
    assert find_checkpoint(tmp_path / "another run", str(tmp_path / "checkpoint-9")) == tmp_path / "checkpoint-9"
    with pytest.raises(FileNotFoundError, match="checkpoint-7.*checkpoint-9, checkpoint-12"):
        find_checkpoint(tmp_path, "checkpoint-7")


def test_a_checkpoint_of_a_different_training_run_names_both_sides(tmp_path: Path) -> None:
    write(tmp_path, 1)
    folder = tmp_path / "checkpoint-1"
    with pytest.raises(ValueError, match=r"only in the checkpoint, e.g. opt_state/1/0/nu/"):
        load_checkpoint(folder, make_state("lion"))
    with pytest.raises(ValueError, match=r"only in the checkpoint, e.g. ema/to_q/kernel"):
        load_checkpoint(folder, make_state(use_ema=False))
    with pytest.raises(
        ValueError, match=r"ema/to_q/kernel: float32\[16, 8\] in the checkpoint, float32\[24, 8\] in this"
    ):
        load_checkpoint(folder, make_state(width=24))


def test_a_state_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    write(tmp_path, 1)
    bad = jax.tree.map(lambda x: x * jnp.nan if x.dtype == jnp.float32 else x, make_state())
    saver = Checkpoints(tmp_path, limit=1)
    with pytest.raises(FloatingPointError, match="after step 2"):
        saver.save(2, bad, HERE)
    saver.close()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    for name in (".checkpoint-4.partial", ".checkpoint-2.old"):
        (tmp_path / name / "state").mkdir(parents=True)
    assert checkpoints(tmp_path) == {}
    Checkpoints(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_is_an_error_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Checkpoints(tmp_path)

    def full(old: Path, new: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "rename", full)
    saver.save(1, make_state(), HERE)
    with pytest.raises(OSError, match="no space left"):
        saver.wait()
    assert checkpoints(tmp_path) == {}
    monkeypatch.undo()
    saver.close()


def test_a_full_disk_names_the_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the libraries that write the state raise, and without the tracebacks that they log."""
    saver, state = (
        Checkpoints(tmp_path),
        TrainState(jnp.int32(1), {"x": jax.random.normal(jax.random.key(0), (100_000,))}, None, None),
    )
    with disk_of(100_000):
        saver.save(1, state, HERE)
        with pytest.raises(OSError, match=r"File too large: '.*/checkpoint-1'"):
            saver.wait()
    assert "Traceback" not in caplog.text
    saver.save(1, state, HERE)
    saver.wait()
    saver.close()
    assert list(checkpoints(tmp_path)) == [1]


def test_positions_of_a_different_number_of_processes(tmp_path: Path) -> None:
    write(tmp_path, 1)
    folder = tmp_path / "checkpoint-1"
    (folder / "data-1.json").write_text(json.dumps(HERE._asdict()))
    assert load_position(folder) == HERE, "all processes were at the same place"
    (folder / "data-1.json").write_text(json.dumps(HERE._replace(batches={"batch": 4})._asdict()))
    with pytest.raises(ValueError, match=r"2 processes.*cannot be\s+resumed by 1"):
        load_position(folder)


def test_no_limit_below_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoints_total_limit must be at least 1, got 0"):
        Checkpoints(tmp_path, 0)


def run_line(output: Path, kill_after: float | None, *flags: str, most: float = 120) -> int:
    """Train in a process that is killed some seconds after the first new line of its log. Returns its exit code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags()}
    line = [sys.executable, str(ROOT / "tests" / "training" / "line.py"), "--output_dir", str(output), *flags]
    log, errors = output / "log.jsonl", output.parent / "errors.txt"
    lines = lambda: log.read_text().count("\n") if log.is_file() else 0
    with errors.open("w") as file:
        process = subprocess.Popen(line, env=environment, cwd=output.parent, stdout=file, stderr=file)
    deadline = time.monotonic() + most
    if kill_after is not None:
        seen = (output / "training.yaml").stat().st_mtime if (output / "training.yaml").is_file() else 0.0
        fresh = lambda: (output / "training.yaml").is_file() and (output / "training.yaml").stat().st_mtime > seen
        while process.poll() is None and not fresh():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        began = lines()
        while process.poll() is None and lines() <= began:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(kill_after)
        process.send_signal(signal.SIGKILL)
    code = process.wait(timeout=most)
    assert code in (0, -signal.SIGKILL), errors.read_text()
    return code


def killed_and_resumed(tmp_path: Path, kills: int, seed: int) -> None:
    """A run that is killed at random moments until it ends has the log and the parameters of an undisturbed run."""
    draw = random.Random(seed)
    flags = ("--max_train_steps", "24", "--checkpointing_steps", "3", "--checkpoints_total_limit", "2", "--use_ema")
    flags += ("--gradient_accumulation_steps", "2", "--resume_from_checkpoint", "latest", "--pause", "0.02")
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    assert run_line(quiet, None, *flags) == 0
    moments = [draw.uniform(0, 0.35) for _ in range(kills)]
    codes = [run_line(killed, moment, *flags) for moment in moments]
    assert -signal.SIGKILL in codes
    assert run_line(killed, None, *flags) == 0
    metrics = ("step", "loss", "worst", "grad_norm", "learning_rate", "ema_decay")
    read = lambda folder: [[json.loads(line)[m] for m in metrics] for line in (folder / "log.jsonl").open()]
    assert read(killed) == read(quiet)
    state = quiet_state()
    for name in ("checkpoint-24", "checkpoint-21"):
        assert_same_bits(*(load_checkpoint(folder / name, state) for folder in (quiet, killed)))
    assert (quiet / "line" / "params.npz").read_bytes() == (killed / "line" / "params.npz").read_bytes()
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in quiet.iterdir()), "nothing is left over"


def quiet_state() -> TrainState:
    optimizer = make_optimizer("adamw", lambda _: 0.1, weight_decay=0.01)
    return init_state(start(), optimizer, True, make_mesh(devices=jax.devices()[:1]))


def seed_of_kills() -> int:
    seed = int(os.environ.get("DIFFUSE_JAX_TEST_SEED", "0"))
    print(f"moments of the kills: seed {seed} (DIFFUSE_JAX_TEST_SEED)")
    return seed


def test_a_run_killed_at_a_random_moment_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, 1, seed_of_kills())


@pytest.mark.slow
@pytest.mark.parametrize("more", range(4))
def test_many_more_kills(tmp_path: Path, more: int) -> None:
    killed_and_resumed(tmp_path, 10, seed_of_kills() + 1 + more)


def test_an_interrupted_run_saves_and_resumes_exactly(tmp_path: Path) -> None:
    """SIGTERM while batch 5 of 9 is made: a checkpoint of step 4, exit code 143, and the same result after resuming."""
    from diffuse_jax.training.interruption import Interrupted

    quiet, stopped = tmp_path / "quiet", tmp_path / "stopped"
    wanted = train_line(arguments(output_dir=quiet, max_train_steps=9))
    args = arguments(output_dir=stopped, max_train_steps=9)
    with pytest.raises(Interrupted) as ended:
        train_line(args, batches=Signalling(args, signal.SIGTERM, at=4))
    assert ended.value.code == 143
    assert list(checkpoints(stopped)) == [4]
    assert_same_bits(
        train_line(arguments(output_dir=stopped, max_train_steps=9, resume_from_checkpoint="latest")), wanted
    )
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "handlers are put back"


class Signalling:
    """Batches that send this process a signal while batch ``at`` is made."""

    def __init__(self, args: Any, number: int, at: int) -> None:
        from tests.training.line import line_batches, line_mesh

        self._inner, self._number, self._at, self._n = line_batches(args, line_mesh(args)), number, at, 0

    def __next__(self) -> Any:
        if self._n == self._at:
            signal.raise_signal(self._number)
        self._n += 1
        return next(self._inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_ctrl_c_once_saves(tmp_path: Path) -> None:
    from diffuse_jax.training.interruption import Interrupted

    args = arguments(output_dir=tmp_path, max_train_steps=9)
    with pytest.raises(Interrupted) as ended:
        train_line(args, batches=Signalling(args, signal.SIGINT, at=1))
    assert ended.value.code == 130
    assert list(checkpoints(tmp_path)) == [1]


def test_a_flipped_bit_anywhere_is_refused_and_an_older_checkpoint_named(tmp_path: Path) -> None:
    state = make_state()
    write(tmp_path, 1, 2, state=state)
    folder = tmp_path / "checkpoint-2"
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size]
    assert {p.name for p in files} >= {"checksums.json", "data-0.json", "_METADATA"}
    dice = random.Random(0)
    for path in files:
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint-2 cannot be read.*--resume_from_checkpoint checkpoint-1"):
            load_checkpoint(folder, state)
        path.write_bytes(whole)
    for path in files:
        if path.name != "checksums.json":
            path.rename(tmp_path / "away")
            with pytest.raises(ValueError, match=f"checkpoint-2 cannot be read: .*{path.name}"):
                load_checkpoint(folder, state)
            (tmp_path / "away").rename(path)
    assert_same_bits(load_checkpoint(folder, state), state)


def test_a_checkpoint_is_hashed_once_unless_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, hashed, digest = make_state(), [], hashlib.file_digest
    write(tmp_path, 1, state=state)
    folder = tmp_path / "checkpoint-1"
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: hashed.append(file) or digest(file, kind))
    compare_checkpoint(folder, state)
    count = len(hashed)
    assert_same_bits(load_checkpoint(folder, state), state)
    assert len(hashed) == count > 0
    largest = max((p for p in (folder / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=f"cannot be read: .*{largest.name}"):
        load_checkpoint(folder, state)


def test_damage_without_checksums_names_the_folder(tmp_path: Path) -> None:
    """As in checkpoints that were written before there were any."""
    write(tmp_path, 1)
    folder = tmp_path / "checkpoint-1"
    (folder / "checksums.json").unlink()
    load_checkpoint(folder, make_state())
    (folder / "state" / "_METADATA").unlink()
    with pytest.raises(ValueError, match="checkpoint-1 cannot be read: "):
        load_checkpoint(folder, make_state())


@pytest.mark.parametrize(
    "text", ["", "[]", '{"batches": {}}', '{"batches": 1, "rows": 8, "processes": 1}', "{", "\xff"]
)
def test_a_damaged_place_in_the_data_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "data-0.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"data-0\.json: "):
        load_position(tmp_path)


def test_links_that_leave_a_checkpoint_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "run", 1)
    folder = tmp_path / "run" / "checkpoint-1"
    for name in ("checksums.json", "state"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(ValueError, match=rf"checkpoint-1 cannot be read: .*{name}: is a link that leaves"):
            load_checkpoint(folder, make_state())
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)
    (tmp_path / "elsewhere").symlink_to(folder)
    assert load_checkpoint(tmp_path / "elsewhere", make_state())


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    folder = tmp_path / "checkpoint-1"

    def replaced(*_: Any) -> None:
        write(tmp_path, 1)

    monkeypatch.setattr(module, "_compare", replaced)
    with pytest.raises(ValueError, match="was replaced by another process while it was being read"):
        load_checkpoint(folder, make_state())
