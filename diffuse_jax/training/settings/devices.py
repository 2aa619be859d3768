"""The settings of the devices that a run computes on, and of its processes."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import Annotated

from diffuse_jax.bounds import COUNT, DEVICES, NATURAL
from diffuse_jax.training.checks import Checked

EXPLICIT = ("coordinator_address", "num_processes", "process_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessSettings(Checked):
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
    num_processes: Annotated[int, COUNT] | None = None
    process_id: Annotated[int, NATURAL] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        missing = [f"--{name}" for name in EXPLICIT if getattr(self, name) is None]
        if 0 < len(missing) < len(EXPLICIT):
            flags = ", ".join(f"--{name}" for name in EXPLICIT)
            raise ValueError(f"several processes need {flags}; {missing} is missing")
        number, count = self.process_id, self.num_processes
        if number is not None and count is not None and number >= count:
            raise ValueError(f"--process_id must be from 0 to {count - 1}, got {number}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceSettings(Checked):
    """How the devices of all processes are arranged, and where their compiled programs are kept.

    Attributes:
      mesh_data: devices along which batches are divided; -1 for all that remain.
      mesh_fsdp: devices along which batches, parameters and optimiser are divided.
      mesh_tensor: devices along which wide layers are divided.
      ccache: folder in which compiled programs are kept for the next start; None for JAX's own setting.
      processes: which processes make up the run.
    """

    mesh_data: Annotated[int, DEVICES] = -1
    mesh_fsdp: Annotated[int, COUNT] = 1
    mesh_tensor: Annotated[int, COUNT] = 1
    ccache: str | Path | None = None
    processes: ProcessSettings = field(default_factory=ProcessSettings)
