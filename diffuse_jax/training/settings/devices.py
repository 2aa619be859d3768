"""Settings of the devices and processes of a run."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import Annotated

from diffuse_jax.bounds import COUNT, DEVICES, NATURAL
from diffuse_jax.mesh_axes import parse_axes
from diffuse_jax.training.checks import Checked

EXPLICIT = ("coordinator_address", "num_processes", "process_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessSettings(Checked):
    """The processes that make up a run.

    * ``coordinator_address``, ``num_processes`` and ``process_id``, all three: given explicitly.
    * ``distributed=True``: detected from the cluster (Cloud TPU, Slurm, Open MPI, Kubernetes).
    * neither: detected on a machine with TPU chips; otherwise a single process.
    * ``distributed=False``: a single process.

    Attributes:
      distributed: see above.
      coordinator_address: host and port of process 0.
      num_processes: number of processes.
      process_id: index of this process, from 0.

    Raises:
      ValueError: one of the three is missing, or ``process_id`` is not less than ``num_processes``.
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
    """The mesh over the devices of all processes, and the cache of compiled programs.

    Attributes:
      mesh: the whole mesh as text, such as ``data=4,fsdp=2``, instead of the three numbers.
      mesh_data: number of devices across which batches are divided; -1 for all remaining ones.
      mesh_fsdp: number of devices across which batches, parameters and optimiser state are divided.
      mesh_tensor: number of devices across which wide layers are divided.
      ccache: folder in which compiled programs are kept for the next start; None for JAX's own setting.
      processes: the processes of the run.

    Raises:
      ValueError: ``mesh`` is not of this form, or one of the three numbers is given too.
    """

    mesh: str | None = None
    mesh_data: Annotated[int, DEVICES] = -1
    mesh_fsdp: Annotated[int, COUNT] = 1
    mesh_tensor: Annotated[int, COUNT] = 1
    ccache: str | Path | None = None
    processes: ProcessSettings = field(default_factory=ProcessSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mesh is None:
            return
        parse_axes(self.mesh)
        sizes = {"mesh_data": self.mesh_data, "mesh_fsdp": self.mesh_fsdp, "mesh_tensor": self.mesh_tensor}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        if given := [f"--{name}" for name, size in sizes.items() if size != defaults[name]]:
            raise ValueError(f"--mesh {self.mesh} describes the whole mesh; leave out {', '.join(given)}")
