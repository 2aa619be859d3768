"""Train an AutoencoderKL: pictures to latents and back.

The loss is the mean absolute difference of pixels, the same of neighbouring pixels' differences (edges), and a small
divergence of the latents from a standard normal. At the end ``scaling_factor`` is measured, so that scaled latents have
unit variance, and the model is saved as ``OUTPUT/vae`` in diffusers' layout. Example:

    python train/vae.py --pretrained_model_name_or_path runs/emoji/start --train_data_dir runs/emoji/data/train \\
        --resolution 64 --crop_size 32 --train_batch_size 32 --max_train_steps 2000 --learning_rate 2e-3
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.models.autoencoder_kl import AutoencoderKL
from diffuse_jax.models.base import Params
from diffuse_jax.sharding import param_shardings
from diffuse_jax.training.arguments import (
    PRECISIONS,
    average_from,
    make_parser,
    mesh_from,
    optimizer_from,
    pictures_per_update,
    train_options,
)
from diffuse_jax.training.data import Pictures, batch_indices, pixel_batch, read_pictures
from diffuse_jax.training.loop import place, resume, train
from diffuse_jax.training.state import Metrics, init_state, make_step


def main() -> None:
    args = parse_args()
    vae, params = AutoencoderKL.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="vae", dtype=PRECISIONS[args.mixed_precision]
    )
    pictures = read_pictures(args.train_data_dir, args.resolution, caption_column=None)
    mesh = mesh_from(args)
    optimizer, rate = optimizer_from(args, mesh)
    state = place(init_state(params, optimizer, args.use_ema), mesh)
    state = resume(args.output_dir, args.resume_from_checkpoint, state)
    loss = functools.partial(vae_loss, vae, args.kl_weight, args.edge_weight)
    step = make_step(loss, optimizer, args.seed, average_from(args), param_shardings(state, mesh))
    batch_size = pictures_per_update(args, mesh)

    def batches(n: int) -> np.ndarray:
        chosen = batch_indices(args.seed, n, batch_size, len(pictures))
        return pixel_batch([pictures.images[i] for i in chosen], args.crop_size or args.resolution, args.seed, n)

    state = train(state, step, {}, batches, mesh=mesh, rate=rate, **train_options(args))
    save(vae, state.params if state.ema is None else state.ema, pictures, args)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, output_dir="runs/vae")
    add = parser.add_argument
    add(
        "--pretrained_model_name_or_path",
        required=True,
        help="folder or Hub id whose vae/ gives shape and first values",
    )
    add("--resolution", type=int, default=512, help="shorter side of the pictures after resizing")
    add("--crop_size", type=int, default=None, help="train on random squares of this size; without it, --resolution")
    add("--kl_weight", type=float, default=1e-4, help="weight of the divergence, per latent number")
    add("--edge_weight", type=float, default=1.0, help="weight of the error in differences of neighbouring pixels")
    args = parser.parse_args()
    if args.crop_size and args.crop_size > args.resolution:
        parser.error(f"--crop_size {args.crop_size} is larger than --resolution {args.resolution}")
    return args


def vae_loss(
    vae: AutoencoderKL,
    kl_weight: float,
    edge_weight: float,
    params: Params,
    frozen: Params,
    x: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, Metrics]:
    """Reconstruction and divergence for pictures ``x [B,H,W,3]`` in [-1, 1]."""
    posterior = vae.apply({"params": params}, x, method="encode")
    y = vae.apply({"params": params}, posterior.sample(key), method="decode").astype(jnp.float32)
    pixels = jnp.abs(y - x).mean()
    edges = sum(jnp.abs(jnp.diff(y - x, axis=axis)).mean() for axis in (1, 2))
    kl = posterior.kl().mean() / posterior.mean[0].size
    metrics = {"pixels": pixels, "edges": edges, "kl": kl, "mse": jnp.square(y - x).mean()}
    return pixels + edge_weight * edges + kl_weight * kl, metrics


def save(vae: AutoencoderKL, params: Params, pictures: Pictures, args: argparse.Namespace) -> None:
    """Write ``OUTPUT/vae`` with the scaling factor of (at most 2048 of) the training pictures' latents."""
    encode = jax.jit(lambda p, x: vae.apply({"params": p}, x, method="encode").mean)
    count = min(len(pictures), 2048)
    chunks = [
        pixel_batch(pictures.images[i : i + 64], args.resolution, 0, 0, center_crop=True) for i in range(0, count, 64)
    ]
    latents = np.concatenate([np.asarray(encode(params, chunk)) for chunk in chunks])
    config = vae.config.replace(scaling_factor=round(float(1 / latents.std()), 5), sample_size=args.resolution)
    folder = Path(args.output_dir) / "vae"
    vae.clone(config=config).save_pretrained(folder, params)
    print(folder)


if __name__ == "__main__":
    main()
