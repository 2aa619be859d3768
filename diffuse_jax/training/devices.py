"""The devices that a run computes on."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path

import jax
from jax.sharding import Mesh

from diffuse_jax.sharding import make_mesh
from diffuse_jax.training.distributed import ProcessSettings, initialize_distributed


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """How the devices of all processes are arranged, and where their compiled programs are kept.

    Attributes:
      mesh_data: devices along which batches are divided; -1 for all that remain.
      mesh_fsdp: devices along which batches, parameters and optimiser are divided.
      mesh_tensor: devices along which wide layers are divided.
      ccache: folder in which compiled programs are kept for the next start; None for JAX's own setting.
      processes: which processes make up the run.
    """

    mesh_data: int = -1
    mesh_fsdp: int = 1
    mesh_tensor: int = 1
    ccache: str | Path | None = None
    processes: ProcessSettings = field(default_factory=ProcessSettings)


def mesh_from(settings: DeviceSettings) -> Mesh:
    """The mesh over all devices of all processes.

    To be called before anything that needs a device: this is where several processes become one run.

    Raises:
      ValueError: the mesh does not fit the devices.
      RuntimeError: as :func:`~diffuse_jax.training.distributed.initialize_distributed`.
    """
    initialize_distributed(settings.processes)
    if settings.ccache:
        jax.config.update("jax_compilation_cache_dir", str(settings.ccache))
    return make_mesh(data=settings.mesh_data, fsdp=settings.mesh_fsdp, tensor=settings.mesh_tensor)
