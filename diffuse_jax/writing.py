"""Writing files: a reader never sees half a file, errors name the file, and what a killed writer leaves is removed.

A file is written under the name ``.NAME.*.partial`` and locked. The system releases the lock when the process dies,
however it dies, so the next writer of ``NAME`` can tell leftovers from files being written, and removes the leftovers.
"""

from __future__ import annotations

import argparse
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
except ImportError:  # no locks on this system, so leftovers are not removed there
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".partial"


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with a leading ``~`` replaced by the home folder; unchanged if there is no such user, or no home.

    Raises:
      TypeError: it is not a path.
      ValueError: it is empty, which would silently mean the current folder, or contains a NUL character.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"a path must be a string or a Path, got {type(path).__name__}")
    if path == "":
        raise ValueError("a path must not be empty; the current folder is '.'")
    if "\0" in os.fsdecode(path):
        raise ValueError(f"a path must not contain a NUL character, got {os.fsdecode(path)!r}")
    return Path(os.path.expanduser(path))


def path_text(text: str) -> str:
    """An argparse type: a path with its leading ``~`` expanded, or a Hub id, as it was written otherwise.

    Shells leave the ``~`` of ``--output=~/images`` alone.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("a path must not be empty; the current folder is '.'")
    return os.path.expanduser(text)


def path_flag(text: str) -> Path:
    """An argparse type: :func:`path_text` of files and folders alone."""
    return Path(path_text(text))


def make_folder(folder: Path) -> Path:
    """The folder, created with its parents if needed.

    Raises:
      NotADirectoryError: it, or a part of its path, is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{folder} cannot be a folder: it, or part of its path, is a file") from None
    return folder


def refuse_special(path: Path) -> None:
    """Raise ``FileExistsError`` if a path is something else than a file, which writing would replace or wait for."""
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} exists and is not a regular file (a folder, a device or a pipe?)")


class Partial(NamedTuple):
    """A file that does not have its final name yet: its temporary path, and the open file."""

    path: Path
    file: IO[bytes]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file to system errors that name none ("No space left on device") while it is being written."""
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
    """A binary file that gets its name only when the block ends without an error; otherwise nothing is left behind.

    ``mode`` is the file's permissions, before the process's umask.

    Raises:
      FileExistsError: there is something at this path that is not a file, and that a file must not replace.
      OSError: the file cannot be written; names it.
    """
    make_folder(path.parent)
    refuse_special(path)
    with naming(path), partial_file(path.parent, path.name, mode=mode) as partial:
        yield partial.file
        partial.file.close()
        os.replace(partial.path, path)


@contextmanager
def partial_file(folder: Path, name: str, *, mode: int = 0o666) -> Iterator[Partial]:
    """A file ``.NAME.*.partial``, removed at the end unless the block has renamed it.

    Leftovers of killed writers of the same name are removed first.
    """
    remove_left_over(folder, name)
    path, handle = _create(folder, name, mode)
    try:
        with os.fdopen(os.dup(handle), "wb") as file:
            yield Partial(path, file)
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)  # last, because the lock marks the file as being written


def _create(folder: Path, name: str, mode: int) -> tuple[Path, int]:
    """A new, locked file. The system applies the umask; reading it here would change it for all threads."""
    while True:
        path = folder / f".{name}.{secrets.token_hex(4)}{SUFFIX}"
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        if lock(handle) is not False and same_file(path, handle):
            return path, handle
        path.unlink(missing_ok=True)  # another process removed it as a leftover, or checked it, before it was locked
        os.close(handle)


def remove_left_over(folder: Path, name: str) -> None:
    """Remove ``.NAME.*.partial`` files that no process is writing any more."""
    with os.scandir(folder) as entries:
        found = [entry.path for entry in entries if _is_partial(entry.name, name) and entry.is_file()]
    for path in found:
        with contextlib.suppress(OSError):  # another user's, or just removed by another process
            handle = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                if lock(handle):
                    os.unlink(path)
            finally:
                os.close(handle)


def is_being_written(path: Path) -> bool:
    """Whether some process is still writing a ``.NAME.*.partial`` file."""
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
    """A new folder ``.NAME.partial`` beside ``path`` for preparing its contents; removed at the end with all its files.

    Only one process can hold it at a time. Leftovers of a killed process are removed first.

    Raises:
      FileExistsError: another process is writing ``path``, or may be, on a file system without locks.
      OSError: the folder cannot be created.
    """
    make_folder(path.parent)
    folder = path.with_name(f".{path.name}{SUFFIX}")
    handle = _claim(folder, path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _claim(folder: Path, path: Path) -> int:
    """Create the folder, empty and locked, and return its open descriptor."""
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
                "is being written by another process; wait for it, or choose another path"
                if locked is False
                else f"may still be written by another process; if it is not, remove {folder}"
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
    """Lock an open file or folder. Returns whether that worked, or None if the system has no locks.

    The lock is released when the file is closed or the process dies. Shared locks exclude exclusive ones only. With
    ``wait`` the call returns once others have released theirs.
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
    """Whether the open file is still the one at this path."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
