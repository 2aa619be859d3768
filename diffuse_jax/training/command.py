"""Entry point of a training script: signals are handled from its first line to its last, user errors print one line.

Neither this module nor those that define flags and settings import JAX, so ``--help`` and wrong flags are answered at
once.
"""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from diffuse_jax.command import run_command, silent_without_readers
from diffuse_jax.training import watch
from diffuse_jax.training.interruption import BEFORE, interruptions

SMALLER = (
    "try a smaller --train_batch_size (--gradient_accumulation_steps keeps the images of a step), "
    "--gradient_checkpointing, --mixed_precision bf16, a smaller --resolution, or --mesh_fsdp on several devices"
)
"""Advice for a training step that does not fit into memory."""

_listening = contextlib.ExitStack()
"""Closed when the script ends."""


@contextmanager
def flags_first(parse_args: Callable[[], Namespace]) -> Iterator[None]:
    """Parse the flags before the block, which holds the script's slow imports, and handle signals from here on.

    This does nothing if the script is imported instead of run.

    Args:
      parse_args: the script's function, decorated with :func:`functools.cache`. It ends the process after ``--help``,
        and if a flag is wrong.
    """
    if parse_args.__module__ != "__main__":
        yield
        return
    _listening.enter_context(interruptions(BEFORE, owner=True))
    try:
        with silent_without_readers():
            parse_args()
            print("loading JAX and the library", file=sys.stderr, flush=True)
        yield
    except BaseException:
        _listening.close()
        raise


def train(main: Callable[[], None]) -> None:
    """Run a script's ``main`` and exit: status 0 for success, 1 for failure, 2 for wrong flags, 128 + n for signal
    n, 141 if nobody reads the output any more."""
    with _listening, interruptions(BEFORE, owner=True):
        watch.leave(run_command(Path(sys.argv[0]).name, watch.outcome_told()(main), smaller=SMALLER))
