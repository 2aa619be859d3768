"""Several processes as one run: ``jax.distributed`` from settings or from the machine."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import jax

EXPLICIT = ("coordinator_address", "num_processes", "process_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessSettings:
    """Which processes make up a run.

    * ``coordinator_address``, ``num_processes`` and ``process_id``, all three: as they say.
    * ``distributed=True``: found out from the cluster (Cloud TPU, Slurm, Open MPI, Kubernetes).
    * neither: a machine with TPU chips asks its cluster, as above; any other is alone.
    * ``distributed=False``: alone.

    Attributes:
      distributed: see above.
      coordinator_address: host and port of process 0.
      num_processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      ValueError: one of the three is missing, or the number of a process is impossible.
    """

    distributed: bool | None = None
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        missing = [f"--{name}" for name in EXPLICIT if getattr(self, name) is None]
        if 0 < len(missing) < len(EXPLICIT):
            flags = ", ".join(f"--{name}" for name in EXPLICIT)
            raise ValueError(f"several processes need {flags}; {missing} is missing")
        number, count = self.process_id, self.num_processes
        if number is not None and count is not None and not 0 <= number < count:
            raise ValueError(f"--process_id must be from 0 to {count - 1}, got {number}")


def initialize_distributed(settings: ProcessSettings) -> None:
    """Join the processes of a run, where there are several; must come before anything that asks for a device.

    Raises:
      RuntimeError: JAX has used a device already, or a TPU machine cannot find its cluster.
    """
    if jax.distributed.is_initialized():
        return
    if settings.coordinator_address is not None:
        jax.distributed.initialize(settings.coordinator_address, settings.num_processes, settings.process_id)
    elif settings.distributed or (settings.distributed is None and on_tpu_machine()):
        _join()


def say(text: str) -> None:
    """A line for the person who watches; process 0 speaks for all."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def _join() -> None:
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise RuntimeError(
            f"the other processes of this run cannot be found ({error}); say where they are with "
            "--coordinator_address, --num_processes and --process_id, or --no-distributed if there are none"
        ) from None


def on_tpu_machine() -> bool:
    """Whether this machine has TPU chips and JAX is going to use them; asks no device."""
    wanted = getattr(jax.config, "jax_platforms", None) or "tpu"
    chips = any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return "tpu" in wanted.split(",") and chips and importlib.util.find_spec("libtpu") is not None
