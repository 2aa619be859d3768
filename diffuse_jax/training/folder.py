"""The output folder of a run: checked for write access before anything is loaded, and written by one run at a time."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from diffuse_jax.output import writable
from diffuse_jax.writing import lock, same_file

LOCK = ".lock"


@contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Lock the folder against other runs while the block runs; the operating system releases it if the process dies.

    Raises:
      RuntimeError: another run has locked it.
      OSError: files cannot be written there.
    """
    path = writable(Path(folder)) / LOCK
    with _locked(path) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is still locked


def _locked(path: Path) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        taken = lock(file.fileno())
        if taken is False:
            file.seek(0)
            owner = file.read().strip() or "unknown process"
            file.close()
            raise RuntimeError(
                f"{path.parent} belongs to a run that is still active ({owner}); wait for it, stop it, or choose "
                "another --output_dir"
            )
        if taken is None:
            print(f"note: {path.parent} cannot be locked; make sure that no other run writes there", file=sys.stderr)
        if same_file(path, file.fileno()):
            return file
        file.close()  # the other run has just ended and removed the file


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keep other runs from removing a checkpoint while the block reads it; no effect if folders cannot be locked."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a missing folder is reported by the code that reads it
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            lock(handle, shared=True)
        yield


@contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Whether no other process is reading or writing the checkpoint; if so, none can start to while the block runs."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield lock(handle) is not False
    finally:
        os.close(handle)
