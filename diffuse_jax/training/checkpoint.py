"""Checkpoints of a run in ``OUTPUT/checkpoint-N``, where N is the number of completed training steps.

A checkpoint contains the training state (``state``, orbax), the data position of every process (``data-P.json``) and
what ``export`` writes. It is written to ``.checkpoint-N.partial``, which is renamed once everything is on disk: a
folder called ``checkpoint-N`` is always complete, however the run ended. Removing a checkpoint starts with renaming it,
for the same reason. Checksums of its files (``checksums.json``) are verified before anything is read from it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.tree_util import keystr, tree_leaves_with_path

from diffuse_jax.errors import bad
from diffuse_jax.limits import parse_json, read_bounded
from diffuse_jax.training.checksums import not_replaced, verify, write_checksums
from diffuse_jax.training.folder import in_use, unused
from diffuse_jax.training.state import TrainState
from diffuse_jax.writing import SUFFIX, naming, only_writer

STATE = "state"


class Position(NamedTuple):
    """The position of a run in its data; one for each process.

    Attributes:
      batches: the value of :meth:`diffuse_jax.training.batches.Batches.get_state`.
      rows: number of images per training step, over all processes and accumulation steps.
      processes: number of processes of the run.
    """

    batches: dict[str, Any]
    rows: int
    processes: int


def checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """The checkpoints of a run that can be resumed, by number of training steps, oldest first."""
    found = {n: p for p in Path(output_dir).glob("checkpoint-*") if (n := step_of(p)) is not None}
    return {n: found[n] for n in sorted(found) if (found[n] / STATE).is_dir()}


class Checkpoints:
    """Writes the checkpoints of a run, one after the other, while training continues.

    Args:
      output_dir: the folder of the run, the same for all processes.
      limit: maximum number of checkpoints to keep. Before a save, the oldest are removed until ``limit - 1`` are left,
        but never the last one: it is removed once the new one is complete. None keeps all.

    Attributes:
      written: step of the last checkpoint that is on disk; None if there is none yet.

    Raises:
      ValueError: ``limit`` is less than 1.
    """

    def __init__(self, output_dir: str | Path, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"checkpoints_total_limit must be at least 1, got {limit}; leave it out to keep all")
        self.folder, self.limit = Path(output_dir).resolve(), limit
        self._orbax = ocp.StandardCheckpointer()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._commit: Future[None] | None = None
        self.written: int | None = None
        logging.getLogger("absl").addFilter(_without_traceback)
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".checkpoint-*"):
                with unused(left) as is_left_over:  # otherwise another run is still writing it
                    if is_left_over:
                        shutil.rmtree(left, ignore_errors=True)

    def save(
        self, step: int, state: TrainState, position: Position, export: Callable[[Path], None] | None = None
    ) -> None:
        """Begin to write ``checkpoint-{step}``; returns as soon as ``state`` may be donated.

        All processes must call it. ``export`` runs at once, on process 0 only.

        Raises:
          FloatingPointError: the state has values that are not finite; nothing is written or removed.
          FileExistsError: another process is writing the checkpoint of this step.
          OSError: the previous save failed; the message names its checkpoint.
        """
        self.wait()
        if not bool(_finite(state)):
            raise FloatingPointError(f"the training state is not finite after step {step}; no checkpoint is written")
        new = self.folder / f".checkpoint-{step}{SUFFIX}"
        with ExitStack() as stack:
            if jax.process_index() == 0:
                self._remove_oldest(before=step, keep=None if self.limit is None else max(self.limit - 1, 1))
                stack.enter_context(only_writer(self.folder / f"checkpoint-{step}"))
                if export is not None:
                    export(new)
            barrier("checkpoint folder")
            data = new / f"data-{jax.process_index()}.json"
            with naming(data):
                data.write_text(json.dumps(position._asdict()), encoding="utf-8")
            with _writing(self.folder / f"checkpoint-{step}"):
                self._orbax.save(new / STATE, state)
            self._commit = self._thread.submit(self._finish, step, new, stack.pop_all())

    def _finish(self, step: int, new: Path, claim: ExitStack) -> None:
        with claim, _writing(self.folder / f"checkpoint-{step}"):
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                write_checksums(new, [*new.glob("data-*.json"), *(p for p in (new / STATE).rglob("*") if p.is_file())])
                final = self.folder / f"checkpoint-{step}"
                if final.exists():
                    remove(final)
                new.rename(final)
                self._remove_oldest(before=step, keep=None if self.limit is None else self.limit - 1)
        self.written = step

    def _remove_oldest(self, before: int, keep: int | None) -> None:
        """Remove the oldest checkpoints; those of later steps come from an abandoned run and count as the oldest."""
        found = list(checkpoints(self.folder))
        old = [n for n in found if n > before] + [n for n in found if n < before]
        for n in [] if keep is None else old[: max(0, len(old) - keep)]:
            with unused(self.folder / f"checkpoint-{n}") as is_unused:
                if is_unused:  # otherwise it is removed at the next save
                    remove(self.folder / f"checkpoint-{n}")

    def wait(self) -> None:
        """Wait until the last save is on disk, on all processes; raises the error if it failed."""
        if self._written():
            barrier("checkpoint written")

    def _written(self) -> bool:
        """Wait for this process's part of the last save; False if there is none to wait for."""
        commit = self._commit
        if commit is None:
            return False
        try:
            commit.result()
        except Exception:
            self._commit = None
            raise
        self._commit = None  # kept if a signal interrupts the wait, so that it can be waited for again
        return True

    def close(self) -> None:
        """Finish the current save and end the threads; safe to call even if another process may have failed."""
        try:
            self._written()
        finally:
            self._thread.shutdown()
            self._orbax.close()
            logging.getLogger("absl").removeFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Filter that drops the tracebacks which Orbax logs in each of its threads: the exceptions are raised here
    anyway."""
    return record.exc_info is None


@contextmanager
def _writing(checkpoint: Path) -> Iterator[None]:
    """While a checkpoint is written, turn any exception of the writer into an ``OSError`` that names the checkpoint."""
    try:
        yield
    except Exception as error:  # Orbax does not wrap the exceptions of the libraries that it uses
        if isinstance(error, OSError) and error.filename is not None:
            raise
        code = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(code[1]) if code else getattr(error, "errno", None)
        if number is not None:
            raise OSError(number, os.strerror(number), str(checkpoint)) from error
        raise OSError(f"{checkpoint} could not be written: {error or type(error).__name__}") from error


def barrier(name: str) -> None:
    """Wait until all processes have reached this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def remove(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that it no longer counts even if the process ends halfway."""
    away = folder.with_name(f".{folder.name}.old")
    if away.exists():
        shutil.rmtree(away)
    folder.rename(away)
    shutil.rmtree(away)


@jax.jit
def _finite(state: Any) -> jax.Array:
    parts = [jnp.isfinite(x).all() for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack(parts).all()


def find_checkpoint(output_dir: str | Path, which: str) -> Path | None:
    """Find a checkpoint by its path (possibly of another run), by its name ``checkpoint-N``, or the ``latest`` one.

    Returns:
      The folder of the checkpoint; None if the ``latest`` is asked for and there is none.

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


def load_checkpoint(folder: Path, like: Any) -> TrainState:
    """Read a training state, bit for bit as it was saved.

    No run removes the checkpoint while it is being read.

    Args:
      folder: ``checkpoint-N``.
      like: a state, or a tree of ``jax.ShapeDtypeStruct`` with shardings: the expected arrays and their placement. The
        mesh may differ from the one on which the checkpoint was written.

    Raises:
      ValueError: the checkpoint is damaged, was replaced while it was read, or contains other arrays; the message names
        them.
    """
    wanted, path = shapes_of(like), folder.resolve()
    with in_use(path), not_replaced(path), ocp.StandardCheckpointer() as checkpointer:
        compare_checkpoint(folder, wanted)
        with _undamaged(folder):
            return checkpointer.restore(path / STATE, wanted)


def compare_checkpoint(folder: Path, like: Any) -> None:
    """Check that a checkpoint is undamaged and holds the arrays of a training state, without loading them.

    Args:
      folder: ``checkpoint-N``.
      like: a state, or its shapes and dtypes.

    Raises:
      ValueError: it is damaged, or contains other arrays; the message names them.
    """
    path = folder.resolve()
    with _undamaged(folder), ocp.StandardCheckpointer() as checkpointer:
        verify(path)
        saved = _table(checkpointer.metadata(path / STATE).item_metadata.tree)
    _compare(folder, saved, _table(like))


def step_of(folder: Path) -> int | None:
    """The number of completed steps that the name of a checkpoint says; None for other names."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found[1]) if found else None


@contextmanager
def _undamaged(folder: Path) -> Iterator[None]:
    """While a checkpoint is read, turn any exception into a ``ValueError`` that names it and an older one to resume
    from."""
    try:
        yield
    except Exception as error:  # Orbax does not wrap the exceptions of the libraries that it uses
        number = step_of(folder)
        older = [p.name for n, p in checkpoints(folder.parent).items() if number is not None and n < number]
        advice = f"; to go back to an older one: --resume_from_checkpoint {older[-1]}" if older else ""
        raise ValueError(f"{folder} cannot be read: {error or type(error).__name__}{advice}") from error


def shapes_of(state: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _table(tree: Any) -> dict[str, str]:
    """The dtype and shape of each array as text, by path."""
    return {
        keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in tree_leaves_with_path(tree)
        if hasattr(leaf, "shape")
    }


def _compare(folder: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    """Raise if the two tables differ, with examples of each kind of difference."""
    parts = []
    for what, only in (
        ("only in the checkpoint", saved.keys() - wanted.keys()),
        ("only in this run", wanted.keys() - saved.keys()),
    ):
        if only:
            parts.append(f"{len(only)} {what}, e.g. {min(only)}")
    other = [k for k in sorted(saved.keys() & wanted.keys()) if saved[k] != wanted[k]]
    if other:
        k = other[0]
        parts.append(f"{len(other)} of another shape, e.g. {k}: {saved[k]} in the checkpoint, {wanted[k]} in this run")
    if parts:
        raise ValueError(
            f"{folder} is the checkpoint of another training, judging by its arrays: {'; '.join(parts)}. Resume with "
            "the model, optimiser, --use_ema, --rank and trained text encoders that it was made with; its flags are in "
            "training.yaml next to it"
        )


def load_position(folder: Path) -> Position | None:
    """The data position of this process; None if the checkpoint has none (those of diffuse_jax 0.1).

    Raises:
      ValueError: the file is damaged, or the run divided its data among another number of processes.
    """
    found = {int(m[1]): p for p in folder.glob("data-*.json") if (m := re.fullmatch(r"data-(\d+)\.json", p.name))}
    positions = [_position(found[n]) for n in sorted(found)]
    if not positions:
        return None
    if len(positions) == jax.process_count():
        return positions[jax.process_index()]
    if any(p.batches != positions[0].batches for p in positions):
        raise ValueError(
            f"{folder} was written by {len(positions)} processes, each at its own position in the data; it cannot be "
            f"resumed by {jax.process_count()}"
        )
    return positions[0]


def _position(path: Path) -> Position:
    """Read the data position that a process wrote."""
    data = parse_json(path, read_bounded(path))
    kinds = {"batches": dict, "rows": int, "processes": int}
    if not isinstance(data, dict) or {name: type(value) for name, value in data.items()} != kinds:
        raise bad(path, f"damaged: expected the position of a run in its data ({', '.join(kinds)})")
    return Position(**data)
