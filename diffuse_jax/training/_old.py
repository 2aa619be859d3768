"""The loop around the compiled step: batches in, log lines and checkpoints out."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from diffuse_jax.models.base import Params
from diffuse_jax.sharding import train_batch_sharding
from diffuse_jax.training.checkpoint import Checkpoints, Position, find_checkpoint, load_checkpoint
from diffuse_jax.training.state import Metrics, TrainState

Step = Callable[[TrainState, Params, Any], tuple[TrainState, Metrics]]


class Log:
    """One JSON object per line in ``OUTPUT/log.jsonl``: means of the metrics since the last line, and speed."""

    def __init__(self, output_dir: str | Path) -> None:
        self.path = Path(output_dir) / "log.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.pending: list[Metrics] = []
        self.start = time.perf_counter()

    def add(self, metrics: Metrics) -> None:
        """Remember the metrics of one step; nothing is fetched from the device yet."""
        self.pending.append(metrics)

    def flush(self, step: int, **more: float) -> dict[str, float]:
        """Write a line for the steps since the last one. A loss that is not finite stops the run here."""
        fetched = jax.device_get(self.pending)
        means = {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}
        speed = len(fetched) / (time.perf_counter() - self.start)
        record = {"step": step, **means, **more, "steps_per_second": speed}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: round(v, 7) if isinstance(v, float) else v for k, v in record.items()}) + "\n")
        if not np.isfinite(means["loss"]):
            raise FloatingPointError(f"the loss is {means['loss']} at step {step}; try a lower --learning_rate")
        self.pending, self.start = [], time.perf_counter()
        return record


def _export(export: Callable[[Path, TrainState], None], state: TrainState, folder: Path) -> None:
    export(folder, state)


def resume(output_dir: str | Path, which: str | None, state: TrainState) -> TrainState:
    """``state``, or what ``--resume_from_checkpoint`` names; ``latest`` without a checkpoint starts anew."""
    folder = find_checkpoint(output_dir, which) if which else None
    if which and folder is None:
        print(f"no checkpoint in {output_dir}; starting from step 0", file=sys.stderr)
    return load_checkpoint(folder, state) if folder else state


def train(
    state: TrainState,
    step: Step,
    frozen: Params,
    batches: Callable[[int], Any],
    *,
    mesh: Mesh,
    accumulation_steps: int = 1,
    output_dir: str | Path,
    max_train_steps: int,
    rate: Callable[[int], Any],
    logging_steps: int,
    checkpointing_steps: int,
    checkpoints_total_limit: int | None = None,
    export: Callable[[Path, TrainState], None] | None = None,
) -> TrainState:
    """Run ``step`` on ``batches(n)`` until ``max_train_steps`` updates are made in all, counted from the state's own.

    Args:
      state: placed on the mesh already (:func:`place`).
      step: of :func:`~diffuse_jax.training.state.make_step`.
      frozen: parameters that the loss needs and that stay.
      batches: update ``n`` -> a tree of arrays ``[accumulation_steps * B, ...]``.
      mesh: each batch is divided over its ``data`` and ``fsdp`` axes.
      accumulation_steps: parts in which each batch is worked off.
      export: writes the model in its inference format beside each checkpoint's state.
      output_dir, max_train_steps, logging_steps, checkpointing_steps, checkpoints_total_limit, rate: as the flags.
    """
    divided = train_batch_sharding(mesh)
    parts = lambda x: x.reshape(accumulation_steps, -1, *x.shape[1:])
    log = Log(output_dir)
    first = int(state.step)
    bar = tqdm(range(first, max_train_steps), initial=first, total=max_train_steps, mininterval=5, file=sys.stderr)
    for n in bar:
        state, metrics = step(state, frozen, jax.device_put(jax.tree.map(parts, batches(n)), divided))
        log.add(metrics)
        if (n + 1) % logging_steps == 0 or n + 1 == max_train_steps:
            record = log.flush(n + 1, learning_rate=float(rate(n)))
            bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
        if (n + 1) % checkpointing_steps == 0:
            saver = Checkpoints(output_dir, checkpoints_total_limit)
            saver.save(
                n + 1, state, Position({}, 0, 1), None if export is None else functools.partial(_export, export, state)
            )
            saver.close()
    return state
