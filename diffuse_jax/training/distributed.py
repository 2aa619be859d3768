"""Several processes as one run: ``jax.distributed`` from flags or from the machine."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import jax

EXPLICIT = ("coordinator_address", "num_processes", "process_id")


def initialize_distributed(args: argparse.Namespace) -> None:
    """Join the processes of a run, where there are several; must come before anything that asks for a device.

    * ``--coordinator_address HOST:PORT --num_processes N --process_id P``: as they say.
    * ``--distributed``: found out from the cluster (Cloud TPU, Slurm, Open MPI, Kubernetes).
    * neither: a machine with TPU chips asks its cluster, as above; any other is alone.
    * ``--no-distributed``: alone.

    Raises:
      ValueError: one of the three flags is missing, or the number of a process is impossible.
      RuntimeError: JAX has used a device already, or a TPU machine cannot find its cluster.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: getattr(args, name) for name in EXPLICIT}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(EXPLICIT):
        if args.distributed or (args.distributed is None and on_tpu_machine()):
            _join()
        return
    if missing:
        raise ValueError(f"several processes need {', '.join(f'--{name}' for name in EXPLICIT)}; {missing} is missing")
    if not 0 <= args.process_id < args.num_processes:
        raise ValueError(f"--process_id must be from 0 to {args.num_processes - 1}, got {args.process_id}")
    jax.distributed.initialize(**given)


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
