"""Writing files: a reader never sees half of one, errors name them, and what a killed writer leaves is removed.

What is being written is called ``.NAME.*.partial`` and locked. The system lets go of the lock when a process dies,
however it dies, so the next writer of ``NAME`` can tell what is left over from what is being written, and removes it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

try:
    import fcntl
except ImportError:  # no locks on this system: nothing that could be left over is removed there
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".partial"


class Partial(NamedTuple):
    """A file that has no name yet: where it is, and the open file itself."""

    path: Path
    file: IO[bytes]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """While a file is written: an error of the system that names no file ("No space left on device") names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_all(path: Path, file: IO[bytes], data: bytes) -> None:
    """Write to an unbuffered file, which a full disk may fill in part: its error comes with the next part, named."""
    rest = memoryview(data)
    with naming(path):
        while rest:
            rest = rest[file.write(rest) :]


@contextmanager
def atomic_file(path: Path, *, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """A binary file that takes its name only when the block ends without an error; otherwise nothing is left behind.

    ``mode`` holds the permissions it may have; the process's umask takes from them.

    Raises:
      OSError: it cannot be written; the text names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), partial_file(path.parent, path.name, mode=mode) as partial:
        yield partial.file
        partial.file.close()
        os.replace(partial.path, path)


@contextmanager
def partial_file(folder: Path, name: str, *, mode: int = 0o666) -> Iterator[Partial]:
    """A file ``.NAME.*.partial``, which is gone at the end unless it has been renamed in the block.

    Those that killed writers of the same name left are removed first.
    """
    remove_left_over(folder, name)
    path, handle = _create(folder, name, mode)
    try:
        with os.fdopen(os.dup(handle), "wb") as file:
            yield Partial(path, file)
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)  # last: until here the lock says that somebody is writing


def _create(folder: Path, name: str, mode: int) -> tuple[Path, int]:
    """A new file, locked. The system takes the umask off its mode: reading that would change it for all threads."""
    while True:
        path = folder / f".{name}.{secrets.token_hex(4)}{SUFFIX}"
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        if lock(handle) is not False and same_file(path, handle):
            return path, handle
        path.unlink(missing_ok=True)  # removed as left over, or looked at, in the moment before it was locked
        os.close(handle)


def remove_left_over(folder: Path, name: str) -> None:
    """Remove ``.NAME.*.partial`` files that nobody writes any more."""
    with os.scandir(folder) as entries:
        found = [entry.path for entry in entries if _is_partial(entry.name, name) and entry.is_file()]
    for path in found:
        with contextlib.suppress(OSError):  # somebody else's, or removed by somebody else
            handle = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                if lock(handle):
                    os.unlink(path)
            finally:
                os.close(handle)


def is_being_written(path: Path) -> bool:
    """Whether a ``.NAME.*.partial`` file is somebody's who is still writing ``NAME``."""
    if not path.name.startswith(".") or path.suffix != SUFFIX or fcntl is None:
        return False
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return lock(handle, shared=True) is False
    finally:
        os.close(handle)


def _is_partial(found: str, name: str) -> bool:
    head = f".{name}."
    return found.startswith(head) and found.endswith(SUFFIX) and len(found) > len(head) + len(SUFFIX)


@contextmanager
def only_writer(path: Path) -> Iterator[Path]:
    """A new folder ``.NAME.partial`` beside ``path`` for what will become it; removed at the end, with what is in it.

    One process has it at a time. What a killed one left is removed first.

    Raises:
      FileExistsError: another process is writing ``path``, or may be: this file system has no locks.
      OSError: the folder cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.name}{SUFFIX}")
    handle = _claim(folder, path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _claim(folder: Path, path: Path) -> int:
    """The folder, new, empty and locked, as an open descriptor."""
    while True:
        try:
            folder.mkdir()
            fresh = True
        except FileExistsError:
            fresh = False
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # its writer has just finished
            continue
        locked = lock(handle)
        if locked is False or (locked is None and not fresh):
            os.close(handle)
            why = (
                "is being written by another process; wait for it, or name another place"
                if locked is False
                else f"may be being written by another process; if it is not, remove {folder}"
            )
            raise FileExistsError(f"{path} {why}")
        if not same_file(folder, handle):
            os.close(handle)
            continue
        if fresh:
            return handle
        shutil.rmtree(folder)
        os.close(handle)


def lock(handle: int, *, shared: bool = False, wait: bool = False) -> bool | None:
    """Lock an open file or folder: whether that worked, or None where there are no locks.

    It is let go when the file is closed, at the latest when the process dies. Shared locks exclude only others; with
    ``wait`` the call returns when others have let go.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def same_file(path: Path, handle: int) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
