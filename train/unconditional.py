"""Train a denoising network over pixels, without text: DDPM (Ho et al. 2020).

The result is a ``DDPMPipeline`` folder in diffusers' layout, and so is every ``checkpoint-N``. Example:

    python train/unconditional.py --train_data_dir my-pictures --resolution 64 --center_crop --random_flip --use_ema
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.models.base import Params
from diffuse_jax.models.unet_2d import UNet2DConfig, UNet2DModel
from diffuse_jax.pipelines import DDPMPipeline
from diffuse_jax.schedulers import DDPMScheduler
from diffuse_jax.sharding import param_shardings
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
from diffuse_jax.training.data import batch_indices, pixel_batch, read_pictures
from diffuse_jax.training.initial import initial_params
from diffuse_jax.training.loop import place, resume, train
from diffuse_jax.training.objective import Objective, draw, errors, noised
from diffuse_jax.training.state import Metrics, TrainState, init_state, make_step
from diffuse_jax.weights import resolve

FROM_SCRATCH = {
    "layers_per_block": 2,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
}
"""The network that is trained where no other is named: 114 million parameters."""


def main() -> None:
    args = parse_args()
    unet, params = load(args)
    scheduler = DDPMScheduler(
        num_train_timesteps=args.ddpm_num_steps,
        beta_schedule=args.ddpm_beta_schedule,
        prediction_type=args.prediction_type,
    )
    mesh = mesh_from(args)
    optimizer, rate = optimizer_from(args, mesh)
    state = resume(
        args.output_dir, args.resume_from_checkpoint, place(init_state(params, optimizer, args.use_ema), mesh)
    )
    loss = functools.partial(pixel_loss, unet, objective_from(args, scheduler))
    step = make_step(loss, optimizer, args.seed, average_from(args), param_shardings(state, mesh))
    pictures = read_pictures(args.train_data_dir, args.resolution, caption_column=None)
    size = pictures_per_update(args, mesh)

    def batches(n: int) -> np.ndarray:
        chosen = [pictures.images[i] for i in batch_indices(args.seed, n, size, len(pictures))]
        options = {"center_crop": args.center_crop, "flip": args.random_flip}
        return pixel_batch(chosen, args.resolution, args.seed, n, **options)

    export = functools.partial(save_pipeline, unet, scheduler)
    state = train(state, step, {}, batches, mesh=mesh, rate=rate, export=export, **train_options(args))
    export(Path(args.output_dir), state)
    print(args.output_dir)


def parse_args() -> argparse.Namespace:
    parser = make_parser(
        __doc__,
        output_dir="runs/unconditional",
        lr_scheduler="cosine",
        adam_beta1=0.95,
        adam_weight_decay=1e-6,
        ema_inv_gamma=1.0,
        ema_power=0.75,
    )
    add = parser.add_argument
    add("--pretrained_model_name_or_path", default=None, help="pipeline to start from: a local folder or a Hub id")
    add(
        "--model_config_name_or_path",
        default=None,
        help="folder or Hub id with the config.json of the network to train",
    )
    add("--resolution", type=int, default=64, help="width and height of the training squares")
    add("--center_crop", action="store_true", help="cut the square out of the middle instead of a random place")
    add("--random_flip", action="store_true", help="mirror half of the pictures")
    add("--prediction_type", default="epsilon", choices=("epsilon", "v_prediction", "sample"), help="what is learned")
    add("--ddpm_num_steps", type=int, default=1000, help="timesteps of the training schedule")
    add("--ddpm_beta_schedule", default="linear", help="its betas")
    add_objective(parser)
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[UNet2DModel, Params]:
    """The network in the wanted computing precision, with float32 parameters, trained or fresh."""
    dtypes = {"dtype": PRECISIONS[args.mixed_precision], "param_dtype": jnp.float32}
    if args.pretrained_model_name_or_path is not None:
        unet, params = UNet2DModel.from_pretrained(args.pretrained_model_name_or_path, subfolder="unet", **dtypes)
        return unet.clone(remat=remat_from(args)), params
    if args.model_config_name_or_path is not None:
        unet = UNet2DModel.from_config(resolve(args.model_config_name_or_path), dtype=dtypes["dtype"])
    else:
        unet = UNet2DModel(UNet2DConfig(**FROM_SCRATCH), **dtypes)
    unet = unet.clone(config=unet.config.replace(sample_size=args.resolution), remat=remat_from(args))
    return unet, initial_params(unet.shapes(), args.seed)


def pixel_loss(
    unet: UNet2DModel, objective: Objective, params: Params, frozen: Params, x0: jax.Array, key: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Squared error of the prediction at random timesteps (Ho et al. 2020, algorithm 1), for pixels in [-1, 1]."""
    drawn = draw(objective, key, x0)
    prediction = unet.apply({"params": params}, noised(objective, x0, drawn), drawn.t)
    return errors(objective, prediction, x0, drawn)


def save_pipeline(unet: UNet2DModel, scheduler: DDPMScheduler, folder: Path, state: TrainState) -> None:
    """Write the pipeline with the average of the parameters, where there is one."""
    params = state.params if state.ema is None else state.ema
    DDPMPipeline({"unet": unet, "scheduler": scheduler}, {"unet": params}).save_pretrained(folder)


if __name__ == "__main__":
    main()
