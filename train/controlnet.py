"""Train a ControlNet for Stable Diffusion (1.x, 2.x, XL) on images with captions and control images.

A new ControlNet starts as a copy of the UNet's encoder; the pipeline itself is frozen. The result is a ControlNet in
diffusers' layout, also in every ``checkpoint-N/controlnet``; ``ControlNetModel.from_pretrained`` of this library and of
PyTorch diffusers opens it. Example:

    python train/controlnet.py --pretrained_model_name_or_path diffuse-jax/emoji \\
        --train_data_dir runs/emoji/data/train --conditioning canny --resolution 64 --cache_latents \\
        --proportion_empty_prompts 0.3 --train_batch_size 16 --learning_rate 5e-4 --max_train_steps 2000
"""

from __future__ import annotations

import argparse
import functools

from diffuse_jax.training.command import flags_first, train
from diffuse_jax.training.flags import Accepted
from diffuse_jax.training.latent_flags import add_control, latent_parser
from diffuse_jax.training.settings import ControlSettings


@functools.cache
def parse_args() -> argparse.Namespace:
    parser = latent_parser(__doc__, output_dir="runs/controlnet", text_encoders=False)
    add_control(parser, ControlSettings, "ControlNet")
    parser.group("model")("--controlnet_from_pt", action=Accepted, note="PyTorch weights are read directly")
    return parser.parse_args()


with flags_first(parse_args):  # JAX and the library, once the flags are known to be right
    from diffuse_jax.training.control import CONTROLNET, BesideRun, train_beside
    from diffuse_jax.training.data import data_from
    from diffuse_jax.training.devices import mesh_from
    from diffuse_jax.training.flags import settings_from
    from diffuse_jax.training.settings import (
        DeviceSettings,
        ModelSettings,
        ObjectiveSettings,
        RunSettings,
        ValidationSettings,
    )


def main() -> None:
    args = parse_args()
    settings = BesideRun(
        run=settings_from(args, RunSettings),
        model=settings_from(args, ModelSettings),
        data=data_from(args),
        learned=settings_from(args, ObjectiveSettings),
        shown=settings_from(args, ValidationSettings),
        control=settings_from(args, ControlSettings),
    )
    train_beside(CONTROLNET, settings, mesh_from(settings_from(args, DeviceSettings)), vars(args))


if __name__ == "__main__":
    train(main)
