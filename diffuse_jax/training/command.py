"""The border of a training script: signals are answered from its first line to its last, mistakes are one line.

This module loads no JAX, nor do those that define flags and settings: ``--help`` and wrong flags are answered at once.
"""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from diffuse_jax.command import run_command
from diffuse_jax.training.interruption import BEFORE, interruptions

SMALLER = (
    "try a smaller --train_batch_size (--gradient_accumulation_steps keeps the images of a step), "
    "--gradient_checkpointing, --mixed_precision bf16, a smaller --resolution, or --mesh_fsdp on several devices"
)
"""What helps where memory is too small for a training step."""

_listening = contextlib.ExitStack()
"""Closed when the script ends."""


@contextmanager
def flags_first(parse_args: Callable[[], Namespace]) -> Iterator[None]:
    """While the block imports what a script needs: the flags are read before, and signals are answered from here on.

    Where the script is imported instead of run, this does nothing.

    Args:
      parse_args: the script's own, decorated with :func:`functools.cache`. It ends the process after ``--help``, and
        where a flag is wrong.
    """
    if parse_args.__module__ != "__main__":
        yield
        return
    _listening.enter_context(interruptions(BEFORE, owner=True))
    try:
        parse_args()
        print("loading JAX and the library", file=sys.stderr, flush=True)
        yield
    except BaseException:
        _listening.close()
        raise


def train(main: Callable[[], None]) -> None:
    """Run a script's ``main`` and end the process: 0 done, 1 failed, 2 wrong flags, 128 + n after signal n."""
    with _listening, interruptions(BEFORE, owner=True):
        sys.exit(run_command(Path(sys.argv[0]).name, main, smaller=SMALLER))
