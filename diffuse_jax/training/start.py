"""What happens before the first step of a run: counts, the checkpoint to go on from, arrays onto the mesh."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from diffuse_jax.sharding import automatic, is_global, param_shardings, train_batch_sharding
from diffuse_jax.training.arguments import pictures_per_update
from diffuse_jax.training.batches import Batch, Batches
from diffuse_jax.training.checkpoint import (
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    load_position,
    meet,
    remove,
)
from diffuse_jax.training.state import TrainState

VALIDATION_STEPS = 100


def settled(args: argparse.Namespace, mesh: Mesh, batches: Batches) -> argparse.Namespace:
    """The flags with counts of updates in place of epochs; ``max_train_steps`` wins over ``num_train_epochs``.

    Raises:
      ValueError: epochs are wanted, but the data does not say how many examples it has; a count is not positive.
    """
    examples = getattr(batches, "total", None)
    steps, validation = args.max_train_steps, args.validation_steps
    if examples is None and (steps is None or args.validation_epochs is not None):
        raise ValueError(
            "the number of examples is not known: say --max_train_steps and --validation_steps, not epochs"
        )
    epoch = None if examples is None else math.ceil(examples / pictures_per_update(args, mesh))
    if steps is None and epoch is not None:
        steps = args.num_train_epochs * epoch
    if validation is None:
        validation = VALIDATION_STEPS if args.validation_epochs is None else args.validation_epochs * (epoch or 1)
    counts = {"max_train_steps": steps, "validation_steps": validation}
    for name in ("logging_steps", "checkpointing_steps"):
        counts[name] = getattr(args, name)
    if args.checkpoints_total_limit is not None:
        counts["checkpoints_total_limit"] = args.checkpoints_total_limit
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    return argparse.Namespace(**{**vars(args), **counts})


def starting_point(args: argparse.Namespace) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` names, or None; ``latest`` without a checkpoint starts anew.

    Raises:
      FileNotFoundError: the named checkpoint is not there.
      FileExistsError: a new run would mix its checkpoints with those of an old one.
    """
    if args.resume_from_checkpoint:
        folder = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
        if folder is None:
            say(f"no checkpoint in {args.output_dir}; starting from step 0")
        return folder
    old = list(checkpoints(args.output_dir).values())
    if old and not args.overwrite_output_dir:
        raise FileExistsError(
            f"{args.output_dir} has {', '.join(p.name for p in old)}; say --resume_from_checkpoint latest to go on, "
            "--overwrite_output_dir to remove them, or another --output_dir"
        )
    meet("old checkpoints")
    for path in old if jax.process_index() == 0 else []:
        remove(path)
    return None


def resumed(folder: Path, like: Any, batches: Batches, rows: int, last: int) -> TrainState:
    """The state of a checkpoint, for a run to ``last`` updates; ``batches`` is moved to its position.

    Raises:
      ValueError: the checkpoint is of another training, or has made more updates.
    """
    state, position = load_checkpoint(folder, like), load_position(folder)
    if position is None:
        raise ValueError(f"{folder} does not say where its data was; it was not written by this version")
    if int(state.step) > last:
        raise ValueError(
            f"{folder} has made {int(state.step)} updates, more than --max_train_steps {last}, which counts from the "
            "beginning; ask for more"
        )
    if position.rows != rows:
        say(f"note: {folder} was trained with {position.rows} pictures per update, this run has {rows}")
    batches.set_state(position.batches)
    return state


def say(text: str) -> None:
    """A line for the person who watches; process 0 speaks for all."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def local(tree: Any) -> Any:
    """Arrays that every process holds for itself, as a program over all devices takes them; global ones as they are."""
    return jax.tree.map(lambda x: x if is_global(x) else np.asarray(x), tree) if jax.process_count() > 1 else tree


def place(tree: Any, mesh: Mesh) -> Any:
    """Put frozen parameters onto the mesh: cut where it has ``fsdp`` or ``tensor``, else whole."""
    if jax.process_count() == 1:
        return jax.device_put(tree, param_shardings(tree, automatic(mesh)))

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        if is_global(x):
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x)[index])

    return jax.tree.map(put, tree, param_shardings(tree, automatic(mesh)))


def divided(batch: Batch, mesh: Mesh, parts: int) -> Any:
    """This process's rows ``[parts * rows, ...]`` as global arrays ``[parts, B, ...]`` on the mesh.

    Raises:
      ValueError: the rows cannot be divided among accumulation steps and this process's devices.
    """
    sharding = train_batch_sharding(mesh)
    shares = parts * local_shares(sharding)

    def put(x: np.ndarray) -> jax.Array:
        if len(x) == 0 or len(x) % shares:
            raise ValueError(
                f"a batch has {len(x)} rows, which cannot be divided into {parts} accumulation steps times "
                f"{shares // parts} devices of this process"
            )
        return jax.make_array_from_process_local_data(sharding, x.reshape(parts, len(x) // parts, *x.shape[1:]))

    return jax.tree.map(put, batch)


def local_shares(sharding: NamedSharding) -> int:
    """In how many different parts the second axis lies on this process's devices."""
    size = math.prod(sharding.mesh.shape.values())
    places = sharding.addressable_devices_indices_map((1, size)).values()
    return len({(index[1].start, index[1].stop) for index in places if index is not None})
