"""A whole training of a straight line, as a script: for the tests that kill it, and those with several processes.

python tests/training/line.py --output_dir FOLDER --max_train_steps 20 [--pause SECONDS] [--worker] [any shared flag]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.training.arguments import make_parser
from diffuse_jax.training.batches import Batch, IndexedBatches
from diffuse_jax.training.command import train
from diffuse_jax.training.data.loader import process_rows
from diffuse_jax.training.data.workers import in_turns
from diffuse_jax.training.devices import mesh_from
from diffuse_jax.training.flags import settings_from
from diffuse_jax.training.loop import fit
from diffuse_jax.training.settings import BatchSettings, DeviceSettings, RunSettings

SLOPE = np.array([[2.0], [-1.0], [0.5], [1.0], [-2.0], [0.0], [3.0], [-0.5]], np.float32)
FLAGS = {"learning_rate": 0.05, "lr_warmup_steps": 0, "train_batch_size": 1, "logging_steps": 1, "report_to": "none"}
"""Unlike the scripts' defaults."""


def start() -> dict[str, Any]:
    return {"dense": {"kernel": np.full((8, 1), 0.5, np.float32), "bias": np.zeros((1,), np.float32)}}


def line_loss(trainable: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Squared distance from a line whose heights are noisy."""
    x = batch["x"]
    wanted = x @ frozen["slope"] + 0.1 * jax.random.normal(key, (len(x), 1))
    error = x @ trainable["dense"]["kernel"] + trainable["dense"]["bias"].reshape(1, 1) - wanted
    return jnp.square(error).mean(), {"worst": jnp.abs(error).max()}


def points(n: int, rows: int) -> np.ndarray:
    return np.random.default_rng([7, n]).standard_normal((rows, len(SLOPE))).astype(np.float32)


def line_batches(args: argparse.Namespace, mesh: jax.sharding.Mesh, pause: float = 0.0) -> IndexedBatches:
    """This process's rows of step ``n``; every step takes at least ``pause`` seconds."""
    size = settings_from(args, BatchSettings)
    rows = size.images_per_step(mesh)
    mine = process_rows(mesh, size.gradient_accumulation_steps, size.images_per_part(mesh))

    def batch(n: int) -> Batch:
        time.sleep(pause)
        return {"x": points(n, rows)[mine]}

    return IndexedBatches(batch, lambda n: [f"point {n}.{row}" for row in mine])


@dataclasses.dataclass(frozen=True)
class Points:
    """The points of all steps, as made by a worker process."""

    rows: int
    pause: float

    def __iter__(self) -> Iterator[np.ndarray]:
        for n in itertools.count():
            time.sleep(self.pause)
            yield points(n, self.rows)


def worker_batches(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> IndexedBatches:
    """The same from a worker process; of a run that starts at step 0."""
    made = in_turns([Points(settings_from(args, BatchSettings).images_per_step(mesh), args.pause)], processes=True)
    batches = IndexedBatches(lambda n: {"x": next(made)})
    batches.close = made.close  # type: ignore[attr-defined]
    return batches


def failing(batches: IndexedBatches) -> IndexedBatches:
    """The same until step 2, whose data cannot be read."""

    def batch(n: int) -> Batch:
        if n == 2:
            raise ValueError("the disk is gone")
        return next(batches)

    return IndexedBatches(batch)


def save(folder: Path, params: Any) -> None:
    """A stand-in for the model in inference format."""
    (folder / "line").mkdir(parents=True, exist_ok=True)
    np.savez(folder / "line" / "params.npz", **params["dense"])


def arguments(*words: str, **flags: object) -> argparse.Namespace:
    """Flags of a run, as if from a command line."""
    line = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return make_parser(__doc__, output_dir="line", **FLAGS).parse_args([*words, *line])


def line_mesh(args: argparse.Namespace) -> jax.sharding.Mesh:
    """The mesh that the flags describe."""
    return mesh_from(settings_from(args, DeviceSettings))


def train_line(args: argparse.Namespace, **options: Any) -> Any:
    """Train; ``options`` are those of :func:`fit`, where they differ."""
    run = settings_from(args, RunSettings)
    mesh = options.pop("mesh", None) or line_mesh(args)
    given = {
        "trainable": start(),
        "frozen": {"slope": SLOPE},
        "loss": line_loss,
        "batches": line_batches(args, mesh),
        "export": save,
    }
    return fit(run, mesh, config=vars(args), **given | options)


def main() -> None:
    parser = make_parser(__doc__, output_dir="line", **FLAGS)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--fails", type=int, help="index of a process whose data ends in an error at step 2")
    args = parser.parse_args()
    mesh = line_mesh(args)
    batches = worker_batches(args, mesh) if args.worker else line_batches(args, mesh, args.pause)
    if args.fails == jax.process_index():
        batches = failing(batches)
    train_line(args, mesh=mesh, batches=batches)
    print("finished")


if __name__ == "__main__":
    train(main)
