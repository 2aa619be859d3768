"""What happens before the first step of a run: counts, the checkpoint to go on from, arrays onto the mesh."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from diffuse_jax.output import writable
from diffuse_jax.sharding import is_global, train_batch_sharding
from diffuse_jax.training.batches import Batch, Batches
from diffuse_jax.training.checkpoint import (
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    load_position,
    meet,
    remove,
)
from diffuse_jax.training.distributed import say
from diffuse_jax.training.folder import claimed
from diffuse_jax.training.settings import RunSettings
from diffuse_jax.training.state import TrainState

VALIDATION_STEPS = 100


class Counts(NamedTuple):
    """What epochs come to.

    Attributes:
      steps: training steps of the whole run.
      validation: steps from one validation to the next.
    """

    steps: int
    validation: int


def counted(run: RunSettings, images: int, batches: Batches) -> Counts:
    """Steps in place of epochs; ``max_train_steps`` wins over ``num_train_epochs``.

    Args:
      run: settings of the run.
      images: images of a step.
      batches: ``batches.total``, if there is such a thing, is the number of examples in an epoch.

    Raises:
      ValueError: epochs are wanted, but the data does not say how many examples it has.
    """
    examples = getattr(batches, "total", None)
    if examples is None:
        if run.max_train_steps is None or run.validation_epochs is not None:
            raise ValueError(
                "the number of examples is not known: say --max_train_steps and --validation_steps, not epochs (a "
                "stream's is known with --max_train_samples)"
            )
        return Counts(run.max_train_steps, run.validation_steps or VALIDATION_STEPS)
    epoch = max(1, math.ceil(examples / images))
    by_epoch = VALIDATION_STEPS if run.validation_epochs is None else run.validation_epochs * epoch
    return Counts(run.max_train_steps or run.num_train_epochs * epoch, run.validation_steps or by_epoch)


def check_output(run: RunSettings, *others: str | Path) -> None:
    """Refuse folders that a run cannot write, before minutes of loading; :func:`fit` claims the first one later.

    To be called when the processes of a run have found each other.

    Args:
      run: names the folder of the run.
      *others: folders that will be written besides, such as that of a cache.

    Raises:
      OSError: files cannot be written to one of them.
      RuntimeError: another run has the folder.
      FileNotFoundError, FileExistsError: as :func:`starting_point`.
    """
    with contextlib.ExitStack() as stack:
        for folder in (run.output_dir, *others) if jax.process_index() == 0 else ():
            stack.callback(_remove, [path for path in (Path(folder), *Path(folder).parents) if not path.exists()])
            writable(Path(folder))
        if jax.process_index() == 0:
            stack.enter_context(claimed(run.output_dir))
        starting_point(run)


def _remove(folders: Sequence[Path]) -> None:
    """Remove folders that were made for a check alone, as long as they are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def starting_point(run: RunSettings) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` names, or None; ``latest`` without a checkpoint starts anew.

    Raises:
      FileNotFoundError: the named checkpoint is not there.
      FileExistsError: a new run would mix its checkpoints with those of an old one.
    """
    if run.resume_from_checkpoint:
        return find_checkpoint(run.output_dir, str(run.resume_from_checkpoint))
    old = list(checkpoints(run.output_dir).values())
    if old and not run.overwrite_output_dir:
        raise FileExistsError(
            f"{run.output_dir} has {', '.join(p.name for p in old)}; say --resume_from_checkpoint latest to go on, "
            "--overwrite_output_dir to remove them, or another --output_dir"
        )
    return None


def begin(run: RunSettings) -> Path | None:
    """The same; where the run starts from step 0, checkpoints of an older one go.

    Raises:
      FileNotFoundError, FileExistsError: as :func:`starting_point`.
    """
    folder = starting_point(run)
    if run.resume_from_checkpoint:
        if folder is None:
            say(f"no checkpoint in {run.output_dir}; starting from step 0")
        return folder
    old = list(checkpoints(run.output_dir).values())
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
        say(f"note: {folder} was trained with {position.rows} images per update, this run has {rows}")
    try:
        batches.set_state(position.batches)
    except (TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{folder}: the place in the data that it names is none of this run's ({error!r})") from error
    return state


def local(tree: Any) -> Any:
    """Arrays that every process holds for itself, as a program over all devices takes them; global ones as they are."""
    return jax.tree.map(lambda x: x if is_global(x) else np.asarray(x), tree) if jax.process_count() > 1 else tree


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
