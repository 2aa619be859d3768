"""Train or fine-tune the UNet of a Stable Diffusion (and, if wanted, its text encoder) on captioned pictures.

The result is a whole pipeline folder in diffusers' layout, and so is every ``checkpoint-N``. Example:

    python train/text_to_image.py --pretrained_model_name_or_path runs/emoji/start \\
        --pretrained_vae_model_name_or_path runs/emoji/vae --train_data_dir runs/emoji/data/train --resolution 64 \\
        --train_text_encoder --cache_latents --use_ema --snr_gamma 5 --proportion_empty_prompts 0.1
"""

from __future__ import annotations

import argparse
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.models.autoencoder_kl import AutoencoderKL, Posterior, scale_latents
from diffuse_jax.models.base import Params
from diffuse_jax.models.unet_2d_condition import UNet2DConditionModel
from diffuse_jax.schedulers import DDPMScheduler, Scheduler
from diffuse_jax.sharding import param_shardings
from diffuse_jax.text.clip import CLIPTextModel
from diffuse_jax.training.arguments import (
    PRECISIONS,
    add_objective,
    average_from,
    make_parser,
    mesh_from,
    objective_from,
    optimizer_from,
    pictures_per_update,
    remat_from,
    train_options,
)
from diffuse_jax.training.data import Pictures, batch_indices, caption_batch, pixel_batch, read_pictures
from diffuse_jax.training.loop import place, resume, train
from diffuse_jax.training.objective import Objective, draw, errors, noised
from diffuse_jax.training.state import Metrics, TrainState, init_state, make_step
from diffuse_jax.weights import resolve

Batch = dict[str, np.ndarray]


class Models(NamedTuple):
    """The networks, without their parameters, and the noise schedule."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    scheduler: DDPMScheduler


def main() -> None:
    args = parse_args()
    source = resolve(args.pretrained_model_name_or_path)
    models, params = load(args, source)
    trainable = {name: params[name] for name in ("unet", "text_encoder") if name == "unet" or args.train_text_encoder}
    frozen = {name: value for name, value in params.items() if name not in trainable}

    mesh = mesh_from(args)
    optimizer, rate = optimizer_from(args, mesh)
    state = place(init_state(trainable, optimizer, args.use_ema), mesh)
    state = resume(args.output_dir, args.resume_from_checkpoint, state)
    loss = functools.partial(denoising_loss, models, objective_from(args, models.scheduler))
    step = make_step(loss, optimizer, args.seed, average_from(args), param_shardings(state, mesh))
    pictures = read_pictures(args.train_data_dir, args.resolution, args.caption_column)
    size = pictures_per_update(args, mesh)
    batches = make_batches(args, size, pictures, tokenizer(source), models.vae, frozen["vae"])

    frozen = place(frozen, mesh)
    export = functools.partial(save_pipeline, models, source, frozen)
    del params, trainable  # the state has its own copy
    state = train(state, step, frozen, batches, mesh=mesh, rate=rate, export=export, **train_options(args))
    export(Path(args.output_dir), state)
    print(args.output_dir)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, output_dir="runs/text-to-image")
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="pipeline to start from: a local folder or a Hub id")
    add("--pretrained_vae_model_name_or_path", default=None, help="folder or Hub id whose vae/ replaces the pipeline's")
    add("--caption_column", default="text", help="key of the caption, or of a list of captions to draw from")
    add("--resolution", type=int, default=512, help="width and height of the training squares")
    add("--center_crop", action="store_true", help="cut the square out of the middle instead of a random place")
    add("--random_flip", action="store_true", help="mirror half of the pictures")
    add(
        "--cache_latents", action="store_true", help="encode the whole set once; needs --center_crop or square pictures"
    )
    add("--train_text_encoder", action="store_true", help="train the text encoder together with the UNet")
    add("--proportion_empty_prompts", type=float, default=0.0, help="share of captions replaced by the empty text")
    add("--prediction_type", choices=("epsilon", "v_prediction", "sample"), help="instead of the scheduler's")
    add_objective(parser)
    args = parser.parse_args()
    if not 0 <= args.proportion_empty_prompts <= 1:
        parser.error(f"--proportion_empty_prompts must be between 0 and 1, got {args.proportion_empty_prompts}")
    if args.cache_latents and args.random_flip:
        parser.error("--cache_latents keeps one version of each picture; leave out --random_flip")
    return args


def load(args: argparse.Namespace, source: Path) -> tuple[Models, dict[str, Params]]:
    """The networks in the wanted computing precision, with float32 parameters."""
    dtypes = {"dtype": PRECISIONS[args.mixed_precision], "param_dtype": jnp.float32}
    unet, unet_params = UNet2DConditionModel.from_pretrained(source, subfolder="unet", **dtypes)
    unet = unet.clone(remat=remat_from(args))
    text_encoder, text_params = CLIPTextModel.from_pretrained(source, subfolder="text_encoder", **dtypes)
    vae_source = args.pretrained_vae_model_name_or_path or source
    vae, vae_params = AutoencoderKL.from_pretrained(vae_source, subfolder="vae")
    scheduler = DDPMScheduler.from_pretrained(source, subfolder="scheduler")
    if args.prediction_type:
        scheduler = scheduler.replace(prediction_type=args.prediction_type)
    params = {"unet": unet_params, "text_encoder": text_params, "vae": vae_params}
    return Models(unet, text_encoder, vae, scheduler), params


def tokenizer(source: Path) -> Callable[[list[str]], np.ndarray]:
    """Texts to ids ``[B,L]``, cut and padded to the length that the tokenizer states."""
    from transformers import CLIPTokenizer

    tokenize = CLIPTokenizer.from_pretrained(source / "tokenizer")

    @functools.cache
    def ids(text: str) -> list[int]:
        return tokenize(text, padding="max_length", truncation=True, max_length=tokenize.model_max_length).input_ids

    return lambda texts: np.array([ids(text) for text in texts], np.int32)


def make_batches(
    args: argparse.Namespace,
    size: int,
    pictures: Pictures,
    tokenize: Callable[[list[str]], np.ndarray],
    vae: AutoencoderKL,
    vae_params: Params,
) -> Callable[[int], Batch]:
    """``batches(n)`` of ``size`` pictures: token ids, and pixels or (``--cache_latents``) moments of their latents."""
    pixels = functools.partial(pixel_batch, size=args.resolution, seed=args.seed)
    if args.cache_latents:
        moments = encode_all(vae, vae_params, pictures, functools.partial(pixels, step=0, center_crop=True))

    def batches(n: int) -> Batch:
        chosen = batch_indices(args.seed, n, size, len(pictures))
        captions = [pictures.captions[i] for i in chosen]
        ids = tokenize(caption_batch(captions, args.seed, n, args.proportion_empty_prompts))
        if args.cache_latents:
            return {"input_ids": ids, "moments": moments[chosen]}
        squares = pixels(
            [pictures.images[i] for i in chosen], step=n, center_crop=args.center_crop, flip=args.random_flip
        )
        return {"input_ids": ids, "pixel_values": squares}

    return batches


def encode_all(
    vae: AutoencoderKL, params: Params, pictures: Pictures, pixels: Callable[[list[np.ndarray]], np.ndarray]
) -> np.ndarray:
    """Mean and log variance of every picture's latents, float32 ``[N,h,w,2c]``."""
    encode = jax.jit(lambda p, x: jnp.concatenate(vae.apply({"params": p}, x, method="encode"), -1))
    chunks = [pictures.images[i : i + 64] for i in range(0, len(pictures), 64)]
    return np.concatenate([np.asarray(encode(params, pixels(chunk))) for chunk in chunks])


def denoising_loss(
    models: Models, objective: Objective, trainable: Params, frozen: Params, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Squared error of the prediction at random timesteps (Ho et al. 2020, algorithm 1)."""
    params = {**frozen, **trainable}
    k_latent, k_draw = jax.random.split(key)
    if "moments" in batch:
        posterior = Posterior(*jnp.split(batch["moments"], 2, axis=-1))
    else:
        posterior = models.vae.apply({"params": params["vae"]}, batch["pixel_values"], method="encode")
    x0 = scale_latents(posterior.sample(k_latent), models.vae.config)
    drawn = draw(objective, k_draw, x0)
    states = models.text_encoder.apply({"params": params["text_encoder"]}, batch["input_ids"]).last_hidden_state
    prediction = models.unet.apply({"params": params["unet"]}, noised(objective, x0, drawn), drawn.t, states)
    return errors(objective, prediction, x0, drawn)


def save_pipeline(models: Models, source: Path, frozen: dict[str, Params], folder: Path, state: TrainState) -> None:
    """Write the whole pipeline: trained parts from the state (their average with ``--use_ema``), the rest as it was."""
    params = {**frozen, **(state.params if state.ema is None else state.ema)}
    models.unet.save_pretrained(folder / "unet", params["unet"])
    models.text_encoder.save_pretrained(folder / "text_encoder", params["text_encoder"])
    models.vae.save_pretrained(folder / "vae", params["vae"])
    shutil.copytree(source / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    shutil.copy(source / "model_index.json", folder)
    sampler = Scheduler.from_pretrained(source, subfolder="scheduler")
    sampler.replace(prediction_type=models.scheduler.prediction_type).save_pretrained(folder / "scheduler")


if __name__ == "__main__":
    main()
