"""Error handling of commands: a user's mistake ends in one line and an exit status, a bug in a traceback.

A command whose reader has gone (``diffuse-jax env | head -1``) ends silently, like every other one in a pipe.
"""

from __future__ import annotations

import contextlib
import dis
import os
import re
import select
import signal
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

from diffuse_jax.writing import naming

MISTAKES = (ValueError, TypeError, RuntimeError, ArithmeticError)
"""Exceptions that are raised deliberately, besides system errors."""

UNREAD = 128 + getattr(signal, "SIGPIPE", 13)
"""Exit status of a command that writes into a closed pipe, as shells show it for commands that the system ends."""

OUTPUT = "standard output"
"""What errors call the stream that results are printed to."""

PACKAGE = Path(__file__).resolve().parent
LIBRARIES = tuple(Path(path) for path in sysconfig.get_paths().values())


def run_command(name: str, work: Callable[[], None], argv: Sequence[str] | None = None, *, smaller: str = "") -> int:
    """Run a command and return the exit status of the process: 0 success, 1 failure, 130 after Ctrl-C, 141 if nobody
    reads its output any more.

    System errors, such as a missing file, errors that this package or the user's code raises deliberately, and running
    out of memory become one line on stderr; ``--debug`` or ``DIFFUSE_JAX_DEBUG=1`` shows their traceback. Any other
    exception is a bug and keeps its traceback. Warnings are one line each.

    Args:
      name: the command's name, which the line begins with.
      work: the command.
      argv: its arguments; those of the process if None.
      smaller: what the user can do if memory runs out.
    """
    debug = os.environ.get("DIFFUSE_JAX_DEBUG") or "--debug" in (sys.argv if argv is None else argv)
    try:
        with silent_without_readers():
            return _status(name, work, bool(debug), smaller)
    except SystemExit as ended:
        if ended.code != UNREAD:
            raise
        return UNREAD


def _status(name: str, work: Callable[[], None], debug: bool, smaller: str) -> int:
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr, flush=True)
            with contextlib.redirect_stdout(None if sys.stdout is None else Named(sys.stdout)):
                work()
                if sys.stdout is not None:
                    sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        if debug or (isinstance(error, BrokenPipeError) and unread()):
            raise
        if isinstance(error, OSError) and error.filename == OUTPUT:
            discard(sys.stdout.fileno())
        if lacks_memory(error):
            text = f"out of memory ({first_line(error)})" + (f"; {smaller}" if smaller else "")
        elif is_mistake(error):
            text = str(error) or type(error).__name__
        else:
            raise
        print(f"{name}: {text}", file=sys.stderr, flush=True)
        return 1
    return 0


class Named:
    """A stream whose errors, such as those of a full disk, say that it is the standard output."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write to the stream."""
        with naming(Path(OUTPUT)):
            return int(self.stream.write(text))

    def flush(self) -> None:
        """Flush the stream."""
        with naming(Path(OUTPUT)):
            self.stream.flush()


def discard(number: int) -> None:
    """Send what is still buffered for a file descriptor nowhere; Python would complain about it at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)


@contextlib.contextmanager
def silent_without_readers() -> Iterator[None]:
    """End the process with the status :data:`UNREAD`, and without a word, if its output is a pipe that has been closed.

    Output is flushed at the end of the block, because Python itself would complain if it failed later.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # it is if the shell closed it (>&-)
                sys.stdout.flush()
    except BrokenPipeError:
        if not (closed := unread()):
            raise  # another pipe, such as one to a worker process
        for number in closed:
            discard(number)
        raise SystemExit(UNREAD) from None


def unread() -> list[int]:
    """Which of stdout and stderr are pipes that nobody reads any more, as file descriptors."""
    if not hasattr(select, "poll"):
        return []
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return [number for number, event in poll.poll(0) if event & select.POLLERR]


def lacks_memory(error: Exception) -> bool:
    """Whether a device or the machine had too little memory: XLA's error, or Python's own."""
    from_xla = any(kind.__name__ in ("XlaRuntimeError", "JaxRuntimeError") for kind in type(error).__mro__)
    return isinstance(error, MemoryError) or (from_xla and "RESOURCE_EXHAUSTED" in str(error))


def first_line(error: Exception) -> str:
    """What an error says, without the tables that XLA adds."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text.removeprefix("RESOURCE_EXHAUSTED: ")[:200].rstrip(".")


def is_mistake(error: Exception) -> bool:
    """Whether an error is meant for the user: a system error, or from a ``raise`` that is not in another library."""
    if isinstance(error, OSError | ImportError):
        return True
    if not isinstance(error, MISTAKES):
        return False
    if type(error.__cause__).__name__ == "_RemoteTraceback":  # from a worker process, as text
        raised = re.findall(r'^  File "(.*)", line \d+, in .*\n    (.*)$', str(error.__cause__), re.MULTILINE)
        return bool(raised) and _ours(raised[-1][0]) and raised[-1][1].strip().startswith("raise ")
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and _ours(at.tb_frame.f_code.co_filename) and _raises(at.tb_frame.f_code, at.tb_lasti)


def _ours(file: str) -> bool:
    parents = Path(file).resolve().parents
    return PACKAGE in parents or not any(library in parents for library in LIBRARIES)


def _raises(code: CodeType, at: int) -> bool:
    """Whether the instruction is a ``raise`` statement, not a call or an operator that failed."""
    return dis.opname[code.co_code[at]] in ("RAISE_VARARGS", "RERAISE")
