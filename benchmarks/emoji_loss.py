"""Denoising losses of text-to-emoji models on the same images, captions, noise and timesteps.

A comparison of short runs of training, whose samples would differ by less than chance::

    python -m benchmarks.emoji_loss diffuse-jax/emoji runs/emoji/a runs/emoji/b

Requires the data set (``python train/emoji/make_dataset.py --output_dir runs/emoji/data``). Captions read
``"{label}, {style} style"``. ``loss`` is the squared error of the velocity with Min-SNR weights (gamma 5), ``mse`` is
unweighted; the second training of the shipped model minimised the latter. Only models with equal encoders and schedules
are comparable.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.emoji_judge import Array, Data, load_data
from diffuse_jax.bounds import COUNT, SEED, number
from diffuse_jax.sharding import make_mesh
from diffuse_jax.training.families import tokens_of, trained_family
from diffuse_jax.training.latent import loss_of, networks, open_pipeline, whole
from diffuse_jax.training.objective import Objective

BATCH, DRAWS = 64, 4
"""Images at a time, and how often each of them is noised."""


def main() -> None:
    args = parse_args()
    data = load_data(args.data_dir)
    for model in args.models:
        row: dict[str, Any] = {"model": model}
        pipe = open_pipeline(model, trainable=(), mesh=make_mesh())
        for split, held in (("training", False), ("held-out", True)):
            chosen = data.choose(held, args.num_images, args.seed)
            row |= {f"{split} {name}": value for name, value in losses(pipe, data, chosen, args.seed).items()}
        print(json.dumps(row), flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="pipeline folders")
    parser.add_argument("--data_dir", type=Path, default=Path("runs/emoji/data"), help="what make_dataset.py wrote")
    parser.add_argument("--num_images", type=number(COUNT), default=512, help="of each split (default 512)")
    text = "of the choice of images and of the noise (default 0)"
    parser.add_argument("--seed", type=number(SEED), default=0, help=text)
    args = parser.parse_args()
    if args.num_images < BATCH:
        parser.error(f"--num_images {args.num_images}: at least one batch of {BATCH} is needed")
    return args


def losses(pipe: Any, data: Data, chosen: Array, seed: int) -> dict[str, float]:
    """Mean losses over whole batches of the chosen images, with ``DRAWS`` draws of noise and timestep for each."""
    words = trained_family(pipe).words(pipe)
    tokens = [tokens_of(words, data.caption(i)) for i in chosen]
    loss = jax.jit(loss_of(pipe, whole(networks(pipe)), Objective(scheduler=pipe.scheduler, snr_gamma=5.0)))
    frozen = {name: pipe.params[name] for name in networks(pipe)}
    found = []
    for part, key in draws(len(chosen), seed):
        batch = jax.tree.map(lambda *ids: np.stack(ids), *tokens[part]) | {"pixel_values": data.images[chosen[part]]}
        value, others = loss({}, frozen, batch, key)
        found.append({"loss": float(value), "mse": float(others["mse"])})
    return {name: float(np.mean([row[name] for row in found])) for name in found[0]}


def draws(count: int, seed: int) -> Iterator[tuple[slice, jax.Array]]:
    """Whole batches of ``count`` examples, each ``DRAWS`` times, with the key for its noise and timesteps."""
    for start in range(0, count - BATCH + 1, BATCH):
        for draw in range(DRAWS):
            yield slice(start, start + BATCH), jax.random.key(seed * 1_000_003 + start * DRAWS + draw)


if __name__ == "__main__":
    main()
