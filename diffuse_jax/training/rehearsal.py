"""The rehearsal of a run (``dry_run``): compile its step, take two on real data, and say what the run will need."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffuse_jax.memory import analysed, statistics
from diffuse_jax.timing import spoken
from diffuse_jax.training.batches import Batches
from diffuse_jax.training.settings import RunSettings
from diffuse_jax.training.start import Counts, next_batch
from diffuse_jax.training.state import TrainState

STEPS = 2
"""Training steps of a rehearsal; the last one is timed."""


class Rehearsal(NamedTuple):
    """What a rehearsal has measured.

    Attributes:
      compile_seconds: for compiling the training step, and the sampling of validation images.
      step_seconds: of one training step, with the wait for its data.
      data_seconds: the part of it spent waiting for data.
      round_steps: number of training steps for which batches make their data at once; 1 for most.
      round_seconds: what this takes before the first of them, compiled; 0 if every step makes its own.
      validation_seconds: of one validation, compiled; None without validation.
      seconds: of the whole run from here, with compiling and validation, without writing checkpoints.
      memory: bytes that the training step takes on each device; None if the compiler does not say.
      free: bytes of a device's memory; None if the device does not say.
      checkpoint: bytes of one checkpoint's training state.
      checkpoints: number of checkpoints that the run keeps.
      disk: free bytes where they are written.
      losses: the loss of each step.
    """

    compile_seconds: float
    step_seconds: float
    data_seconds: float
    round_steps: int
    round_seconds: float
    validation_seconds: float | None
    seconds: float
    memory: float | None
    free: float | None
    checkpoint: int
    checkpoints: int
    disk: int
    losses: tuple[float, ...]

    def __str__(self) -> str:
        lines = {
            "compiling": spoken(self.compile_seconds),
            "one step": f"{self.step_seconds:.3g} s, of which {self.data_seconds:.3g} s waiting for data",
            "one round": f"{self.round_steps:,} steps, and before them {self.round_seconds:.3g} s for their data",
            "one validation": "none" if self.validation_seconds is None else spoken(self.validation_seconds),
            "the whole run": f"about {spoken(self.seconds)}, and the writing of checkpoints",
            "memory of a device": f"{_size(self.memory)} of {_size(self.free)}",
            "checkpoints": f"{self.checkpoints} of {_size(self.checkpoint)} each; {_size(self.disk)} are free",
            "loss": ", ".join(f"{loss:.4g}" for loss in self.losses),
        }
        if self.round_steps == 1:
            del lines["one round"]
        return "\n".join(f"  {name:<24} {text}" for name, text in lines.items())

    def problems(self) -> list[str]:
        """What will end the run before its end, as far as it can be seen here."""
        found = []
        if self.memory is not None and self.free is not None and self.memory > self.free:
            found.append("the training step needs more memory than the device has")
        if self.checkpoint * self.checkpoints > self.disk:
            found.append("the checkpoints need more space than is free; keep fewer: --checkpoints_total_limit")
        return found


def rehearse(
    run: RunSettings,
    mesh: Mesh,
    counts: Counts,
    step: Any,
    state: TrainState,
    frozen: Any,
    batches: Batches,
    compiling: Callable[[], float],
    validate: Callable[[Any], Any] | None = None,
) -> Rehearsal:
    """Compile the training step, take :data:`STEPS` of them, validate once, and estimate the run; nothing is written.

    Args:
      run: settings of the run.
      mesh: its mesh.
      counts: its length.
      step: the jitted training step, which reuses the memory of ``state``.
      state: the state that the run begins with.
      frozen: the other parameters, on the mesh.
      batches: the data of the run; ``round_steps``, if they have it, as for :class:`Rehearsal`.
      compiling: returns the seconds spent on compilation so far.
      validate: generates validation images with the parameters of a state.
    """
    first, checkpoint = int(state.step), sum(x.nbytes for x in jax.tree.leaves(state))
    batch = lambda: next_batch(batches, state.params, mesh, run.batch.gradient_accumulation_steps)
    began, start = compiling(), time.perf_counter()
    given = batch()
    made = time.perf_counter() - start - (compiling() - began)
    program, shapes, losses = step.lower(state, frozen, given).compile(), jax.tree.map(jnp.shape, given), []
    for n in range(STEPS):
        start = time.perf_counter()
        given = batch() if n else given
        waited = time.perf_counter() - start
        fits = jax.tree.map(jnp.shape, given) == shapes  # buckets have batches of several shapes
        state, metrics = (program if fits else step)(state, frozen, given)
        losses.append(float(metrics["loss"]))
        seconds = time.perf_counter() - start
    validation = None
    if validate is not None:
        start, before = time.perf_counter(), compiling()
        validate(state)
        validation = time.perf_counter() - start - (compiling() - before)
    left = counts.steps - first
    validations = 0 if validation is None else 1 + (counts.steps - 1) // counts.validation - first // counts.validation
    compiled, every = compiling() - began, getattr(batches, "round_steps", 1)
    made = made if every > 1 else 0.0
    writes = counts.steps // run.checkpointing_steps - first // run.checkpointing_steps
    return Rehearsal(
        compile_seconds=compiled,
        step_seconds=seconds,
        data_seconds=waited,
        round_steps=every,
        round_seconds=made,
        validation_seconds=validation,
        seconds=compiled + left * seconds + math.ceil(left / every) * made + validations * (validation or 0.0),
        memory=_memory(program),
        free=_limit(mesh),
        checkpoint=checkpoint,
        checkpoints=min(writes, run.checkpoints_total_limit or writes),
        disk=shutil.disk_usage(_existing(Path(run.output_dir))).free,
        losses=tuple(losses),
    )


def _memory(program: Any) -> float | None:
    """Bytes that a compiled program takes on a device, with its arguments."""
    if (found := analysed(program)) is None:
        return None
    state = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return float(state + found.temp_size_in_bytes)


def _limit(mesh: Mesh) -> float | None:
    """Bytes of the smallest device of this process, as far as JAX may use them."""
    found = statistics(mesh)
    return None if found is None else float(min(one["bytes_limit"] for one in found))


def _existing(folder: Path) -> Path:
    """The folder, or the closest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _size(count: float | None) -> str:
    if count is None:
        return "an unknown size"
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"
