"""The devices that a run computes on."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from diffuse_jax.sharding import make_mesh, parse_mesh
from diffuse_jax.training.distributed import initialize_distributed
from diffuse_jax.training.settings import DeviceSettings


def mesh_from(settings: DeviceSettings) -> Mesh:
    """The mesh over all devices of all processes.

    Call this before anything that needs a device: this is where several processes become one run.

    Raises:
      ValueError: the mesh does not fit the devices.
      RuntimeError: as for :func:`~diffuse_jax.training.distributed.initialize_distributed`.
    """
    initialize_distributed(settings.processes, "start all again with --resume_from_checkpoint latest")
    if settings.ccache:
        jax.config.update("jax_compilation_cache_dir", str(settings.ccache))
    if settings.mesh is not None:
        return parse_mesh(settings.mesh)
    return make_mesh(data=settings.mesh_data, fsdp=settings.mesh_fsdp, tensor=settings.mesh_tensor)
