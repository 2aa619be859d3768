"""Several processes as one run: ``jax.distributed`` configured by settings or by the cluster."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import jax

from diffuse_jax.training.settings import ProcessSettings
from diffuse_jax.training.watch import FALLBACK, RESTART, watch_processes


def initialize_distributed(settings: ProcessSettings, restart: str = RESTART) -> None:
    """Join the processes of a run, if there are several; must be called before anything that needs a device.

    Args:
      settings: where the processes are.
      restart: what to tell the user to do when a process has died.

    Raises:
      RuntimeError: JAX has already used a device, or the other processes cannot be found.
    """
    if jax.distributed.is_initialized():
        return
    if settings.coordinator_address is not None:
        _join(restart, settings.coordinator_address, settings.num_processes, settings.process_id)
    elif settings.distributed or (settings.distributed is None and on_tpu_machine()):
        try:
            _join(restart)
        except ValueError as error:
            raise RuntimeError(
                f"the other processes of this run cannot be found ({error}); specify them with "
                "--coordinator_address, --num_processes and --process_id, or --no-distributed if there are none"
            ) from None


def say(text: str) -> None:
    """Print a line to stderr for the user, on process 0 only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def _join(restart: str, address: str | None = None, count: int | None = None, process: int | None = None) -> None:
    """Join the processes, and end this one when another dies."""
    jax.distributed.initialize(address, count, process, heartbeat_timeout_seconds=FALLBACK)
    watch_processes(restart=restart)


def on_tpu_machine() -> bool:
    """Whether this machine has TPU chips that JAX is going to use, determined without initialising a device."""
    wanted = getattr(jax.config, "jax_platforms", None) or "tpu"
    chips = any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return "tpu" in wanted.split(",") and chips and importlib.util.find_spec("libtpu") is not None
