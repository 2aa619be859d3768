"""The border of a training script: signals are answered from its first line to its last, mistakes are one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from diffuse_jax.command import run_command
from diffuse_jax.training.interruption import BEFORE, interruptions


def train(main: Callable[[], None]) -> None:
    """Run a script's ``main`` and end the process: 0 done, 1 failed, 2 wrong flags, 128 + n after signal n."""
    with interruptions(BEFORE, owner=True):
        sys.exit(run_command(Path(sys.argv[0]).name, main))
