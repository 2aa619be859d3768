"""What happens before the first step of a run: counting steps, finding the checkpoint, placing arrays on the mesh."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from diffuse_jax.models.base import Params
from diffuse_jax.output import writable
from diffuse_jax.sharding import is_global, train_batch_sharding
from diffuse_jax.training.batches import Batch, Batches
from diffuse_jax.training.checkpoint import (
    Position,
    barrier,
    checkpoints,
    compare_checkpoint,
    find_checkpoint,
    load_checkpoint,
    load_position,
    remove,
    step_of,
)
from diffuse_jax.training.data import check_batch
from diffuse_jax.training.distributed import say
from diffuse_jax.training.folder import claimed
from diffuse_jax.training.optimizer import optimizer_from
from diffuse_jax.training.settings import RunSettings
from diffuse_jax.training.state import TrainState, fresh_state
from diffuse_jax.training.trackers import wanted_trackers
from diffuse_jax.training.upload import make_repository

VALIDATION_STEPS = 100


class Counts(NamedTuple):
    """The length of a run and its validation interval in training steps.

    Attributes:
      steps: total number of training steps.
      validation: number of steps between validations.
    """

    steps: int
    validation: int


def count_steps(run: RunSettings, images: int, examples: int | None) -> Counts:
    """Convert epochs to training steps; ``max_train_steps`` overrides ``num_train_epochs``.

    Args:
      run: settings of the run.
      images: number of images per training step.
      examples: number of examples in an epoch; None if it is unknown.

    Raises:
      ValueError: a setting is given in epochs, but the number of examples is unknown.
    """
    if examples is None:
        if run.max_train_steps is None or run.validation_epochs is not None:
            raise ValueError(
                "the number of examples is not known: use --max_train_steps and --validation_steps, not epochs (a "
                "stream's is known with --max_train_samples)"
            )
        return Counts(run.max_train_steps, run.validation_steps or VALIDATION_STEPS)
    epoch = max(1, math.ceil(examples / images))
    by_epoch = VALIDATION_STEPS if run.validation_epochs is None else run.validation_epochs * epoch
    return Counts(run.max_train_steps or run.num_train_epochs * epoch, run.validation_steps or by_epoch)


def check_run(run: RunSettings, mesh: Mesh, examples: int | None, trainable: Any) -> None:
    """Check all settings of a run that :func:`fit` depends on, its repository on the Hub, and the checkpoint that it
    resumes from.

    Only shapes are needed, so this comes before the weights are read.

    Args:
      run: settings of the run.
      mesh: the mesh of the run.
      examples: number of examples in an epoch; None if it is unknown.
      trainable: shapes of the parameters to train.

    Raises:
      ValueError, ImportError, FileNotFoundError, FileExistsError, ConnectionError: as for :func:`fit`.
    """
    images = run.batch.images_per_step(mesh)
    if examples is not None:
        check_batch(run.batch, mesh, examples)
    steps = count_steps(run, images, examples).steps
    wanted_trackers(run.trackers.report_to, run.trackers.plot)
    optimizer, _ = optimizer_from(run.optimizer, steps, images, trainable)
    if (folder := starting_point(run)) is not None:
        fresh = functools.partial(fresh_state, optimizer=optimizer, use_ema=run.ema.use_ema)
        compare_checkpoint(folder, jax.eval_shape(fresh, trainable))
        position_of(folder)
        if (number := step_of(folder)) is not None:
            check_steps(folder, number, steps)
    if not run.dry_run:
        make_repository(run.upload, run.output_dir)


def position_of(folder: Path) -> Position:
    """The position in the data of a checkpoint.

    Raises:
      ValueError: it has none that this process can continue at.
    """
    if (position := load_position(folder)) is None:
        raise ValueError(f"{folder} does not say where its data was; it was not written by this version")
    return position


def check_steps(folder: Path, done: int, last: int) -> None:
    """Check that a checkpoint with ``done`` steps has not gone further than a run of ``last`` steps does.

    Raises:
      ValueError: it has.
    """
    if done > last:
        raise ValueError(
            f"{folder} has completed {done} steps, more than --max_train_steps {last}, which counts from the "
            "beginning; ask for more"
        )


def check_output(run: RunSettings, *others: str | Path) -> None:
    """Check that a run can write its folders, before minutes of loading; :func:`fit` locks the first one later.

    Call this after the processes of the run have found each other.

    Args:
      run: settings that name the folder of the run.
      *others: other folders that the run writes to, such as that of a cache.

    Raises:
      OSError: files cannot be written to one of them.
      RuntimeError: another run has locked the folder.
      FileNotFoundError, FileExistsError: as for :func:`starting_point`.
    """
    with contextlib.ExitStack() as stack:
        for folder in (run.output_dir, *others) if jax.process_index() == 0 else ():
            stack.callback(_remove, [path for path in (Path(folder), *Path(folder).parents) if not path.exists()])
            writable(Path(folder))
        if jax.process_index() == 0:
            stack.enter_context(claimed(run.output_dir))
        starting_point(run)


def _remove(folders: Sequence[Path]) -> None:
    """Remove folders that were created only for the check, if they are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def starting_point(run: RunSettings) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` names; None for a new run, or for ``latest`` if there is none.

    Raises:
      FileNotFoundError: the named checkpoint does not exist.
      FileExistsError: a new run would mix its checkpoints with those of an old one.
    """
    if run.resume_from_checkpoint:
        return find_checkpoint(run.output_dir, str(run.resume_from_checkpoint))
    old = list(checkpoints(run.output_dir).values())
    if old and not run.overwrite_output_dir:
        raise FileExistsError(
            f"{run.output_dir} has {', '.join(p.name for p in old)}; use --resume_from_checkpoint latest to continue, "
            "--overwrite_output_dir to remove them, or another --output_dir"
        )
    return None


def begin_run(run: RunSettings) -> Path | None:
    """Like :func:`starting_point`, but also removes the checkpoints of an older run if this one is new.

    Raises:
      FileNotFoundError, FileExistsError: as for :func:`starting_point`.
    """
    folder = starting_point(run)
    if run.resume_from_checkpoint:
        if folder is None:
            say(f"no checkpoint in {run.output_dir}; starting from step 0")
        return folder
    old = list(checkpoints(run.output_dir).values())
    barrier("old checkpoints")
    for path in old if jax.process_index() == 0 else []:
        remove(path)
    return None


def restore(folder: Path, like: Any, batches: Batches, rows: int, last: int) -> TrainState:
    """Load the state of a checkpoint and move ``batches`` to its position.

    Args:
      folder: the checkpoint.
      like: shapes, dtypes and shardings of the state.
      batches: the data of the run.
      rows: number of images per training step.
      last: total number of training steps of the run.

    Raises:
      ValueError: the checkpoint belongs to another training, or has completed more than ``last`` steps.
    """
    state, position = load_checkpoint(folder, like), position_of(folder)
    check_steps(folder, int(state.step), last)
    if position.rows != rows:
        say(f"note: {folder} was trained with {position.rows} images per step, this run has {rows}")
    try:
        batches.set_state(position.batches)
    except (TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{folder}: its position in the data does not fit the data of this run ({error!r})") from error
    return state


def local(tree: Any) -> Any:
    """Process-local arrays as NumPy arrays, which a program over all devices accepts; global arrays unchanged."""
    return jax.tree.map(lambda x: x if is_global(x) else np.asarray(x), tree) if jax.process_count() > 1 else tree


def next_batch(batches: Batches, params: Params, mesh: Mesh, parts: int) -> Any:
    """The next batch as :func:`to_mesh` places it; batches that follow the model are given its parameters first."""
    getattr(batches, "follow", lambda params: None)(params)
    return to_mesh(next(batches), mesh, parts)


def to_mesh(batch: Batch, mesh: Mesh, parts: int) -> Any:
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
    """The number of distinct shards of the second axis on this process's devices."""
    size = math.prod(sharding.mesh.shape.values())
    places = sharding.addressable_devices_indices_map((1, size)).values()
    return len({(index[1].start, index[1].stop) for index in places if index is not None})
