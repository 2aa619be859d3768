"""Files take their names when they are whole, errors name them, and what killed writers leave is removed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffuse_jax.output import save_images
from diffuse_jax.weights.safetensors import write_safetensors
from diffuse_jax.writing import atomic_file, expanded, only_writer
from tests.conftest import ROOT
from tests.disk import disk_of


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with contextlib.suppress(KeyError), atomic_file(path) as file:
        file.write(b"new")
        raise KeyError
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"old", ["a"])
    with atomic_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"new", ["a"])


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    numbers = np.zeros(100_000, np.float32)
    with disk_of(1000), pytest.raises(OSError, match=r"File too large: '.*model\.safetensors'"):
        write_safetensors(path, {"w": (numbers.dtype, numbers.shape)}, iter([numbers]))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    with disk_of(1000), pytest.raises(OSError, match="File too large: '.*images'"):
        save_images([noise], tmp_path / "images")
    (tmp_path / "images" / "metadata.jsonl").write_text(" " * 999 + "\n")
    with disk_of(1000), pytest.raises(OSError, match=r"File too large: '.*metadata\.jsonl'"):
        save_images([Image.new("L", (2, 2))], tmp_path / "images", [{"prompt": "a cat"}])
    assert sorted(os.listdir(tmp_path)) == ["images"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027])
def test_permissions_are_those_that_the_umask_leaves(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with atomic_file(tmp_path / "a"):
            pass
        with atomic_file(tmp_path / "b", mode=0o644):
            pass
        (image,) = save_images([Image.new("L", (2, 2))], tmp_path)
    finally:
        os.umask(before)
    found = [path.stat().st_mode & 0o777 for path in (tmp_path / "a", tmp_path / "b", image)]
    assert found == [0o666 & ~mask, 0o644 & ~mask, 0o666 & ~mask]


def test_files_of_other_threads_keep_their_permissions(tmp_path: Path) -> None:
    before, done, modes = os.umask(0o077), threading.Event(), set()

    def others() -> None:
        for number in range(2000):
            path = tmp_path / f"secret{number}"
            path.touch()
            modes.add(path.stat().st_mode & 0o777)
        done.set()

    try:
        thread = threading.Thread(target=others)
        thread.start()
        while not done.is_set():
            with atomic_file(tmp_path / "a"):
                pass
        thread.join()
    finally:
        os.umask(before)
    assert modes == {0o600}


WRITER = """
import sys
from pathlib import Path
from diffuse_jax.writing import atomic_file, expanded, only_writer
path = Path(sys.argv[2])
with {"file": atomic_file, "folder": only_writer}[sys.argv[1]](path):
    print("writing", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def another_writer(kind: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is in the middle of writing a path."""
    command = [sys.executable, "-c", WRITER, kind, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "writing\n"
        yield process
        process.kill()


def test_files_of_a_killed_writer_are_removed_and_those_of_a_living_one_stay(tmp_path: Path) -> None:
    path = tmp_path / "a"
    others = {".a.partial", ".b.1.partial", ".a.txt"}
    for name in others:
        (tmp_path / name).touch()
    with another_writer("file", path) as living, another_writer("file", path) as killed:
        assert len(os.listdir(tmp_path)) == 5
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        with atomic_file(path):
            pass
        assert len({*os.listdir(tmp_path)} - others) == 2, "the file, and what the living process writes"
        living.stdin.close()
        assert living.wait() == 0
    assert {*os.listdir(tmp_path)} == {"a", *others}


def test_a_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with another_writer("folder", path) as living:
        with pytest.raises(FileExistsError, match="a is being written by another process; wait"), only_writer(path):
            raise AssertionError("two writers")
        (tmp_path / ".a.partial" / "x").write_text("of the one that is killed")
        living.send_signal(signal.SIGKILL)
        living.wait()
    assert os.listdir(tmp_path) == [".a.partial"]
    with only_writer(path) as folder:
        assert os.listdir(folder) == []
        with pytest.raises(FileExistsError, match="another process"), only_writer(path):
            raise AssertionError("two writers")
    assert os.listdir(tmp_path) == []


def test_a_tilde_is_the_home_folder_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/model") == Path("/home/me/model")
    assert expanded("~no-such-user/model") == Path("~no-such-user/model")
    with pytest.raises(TypeError, match="a path must be a string or a Path, got NoneType"):
        expanded(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a path must not be empty; the current folder is '.'"):
        expanded("")
    with pytest.raises(ValueError, match=r"must not contain a NUL character, got 'a\\x00b'"):
        expanded("a\0b")


def test_a_file_replaces_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(FileExistsError, match=f"{name} exists and is not a regular"), atomic_file(tmp_path / name):
            raise AssertionError("written")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]
    os.mkfifo(tmp_path / "folder" / "metadata.jsonl")
    with pytest.raises(FileExistsError, match=r"metadata\.jsonl exists and is not a regular file"):
        save_images([Image.new("L", (2, 2))], tmp_path / "folder", [{"prompt": "a cat"}])
    assert os.listdir(tmp_path / "folder") == ["metadata.jsonl"]


@pytest.mark.parametrize("place", ["a-file/new", "a-file/folder/new"])
def test_a_path_through_a_file_is_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "a-file").touch()
    for writer in (atomic_file, only_writer):
        with pytest.raises(NotADirectoryError, match="a-file.* cannot be a folder"), writer(tmp_path / place):
            pass
