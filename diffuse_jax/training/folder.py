"""The folder of a run: that it can be written is known before anything is loaded, and one run writes it at a time."""

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
    """While the block runs, no other run may write into the folder; the system lets go of it when the process dies.

    Raises:
      RuntimeError: another run has it.
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
            owner = file.read().strip() or "it does not say which"
            file.close()
            raise RuntimeError(
                f"{path.parent} belongs to a run that is still going on ({owner}); wait for it, stop it, or choose "
                "another --output_dir"
            )
        if taken is None:
            print(f"note: {path.parent} cannot be locked; let no other run write there", file=sys.stderr)
        if same_file(path, file.fileno()):
            return file
        file.close()  # its run has just ended, and removed it


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """While the block reads a checkpoint, no run removes it; where folders cannot be locked, nothing happens."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # that it is not there is said by whoever reads it
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            lock(handle, shared=True)
        yield


@contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Whether no other process reads or writes the checkpoint; while the block runs, none begins to."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield lock(handle) is not False
    finally:
        os.close(handle)
