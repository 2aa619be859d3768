"""Checkpoints of a whole training state in ``OUTPUT/checkpoint-N``, N being the number of updates made."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from diffuse_jax.training.state import TrainState

STATE = "state"


def checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """The complete checkpoints of a run by number of updates, oldest first."""
    found = {
        int(m[1]): p for p in Path(output_dir).glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    }
    return {n: found[n] for n in sorted(found) if (found[n] / STATE).is_dir()}


def save_checkpoint(output_dir: str | Path, state: TrainState, limit: int | None = None) -> Path:
    """Write ``checkpoint-N/state`` (whole or not at all); the oldest ones go first so that at most ``limit`` remain."""
    step = int(state.step)
    if limit is not None:
        old = [n for n in checkpoints(output_dir) if n != step]
        for n in old[: max(0, len(old) - limit + 1)]:
            shutil.rmtree(Path(output_dir) / f"checkpoint-{n}")
    folder = Path(output_dir).resolve() / f"checkpoint-{step}"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / STATE, state, force=True)
    return folder


def find_checkpoint(output_dir: str | Path, which: str) -> Path | None:
    """A checkpoint by its path (also another run's), by its name ``checkpoint-N``, or the ``latest`` (None if none is).

    Raises:
      FileNotFoundError: the named checkpoint does not exist.
    """
    found = checkpoints(output_dir)
    if which == "latest":
        return found[max(found)] if found else None
    if (Path(which) / STATE).is_dir():
        return Path(which)
    for path in found.values():
        if path.name == Path(which).name:
            return path
    names = ", ".join(p.name for p in found.values()) or "none"
    raise FileNotFoundError(f"no checkpoint {Path(which).name} in {output_dir}; there: {names}")


def load_checkpoint(folder: Path, like: TrainState) -> TrainState:
    """Read a state that has the shapes and dtypes of ``like``, bit for bit as it was saved."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.resolve() / STATE, shapes)
