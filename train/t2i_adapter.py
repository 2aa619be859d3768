"""Train a T2I-Adapter for Stable Diffusion (1.x, 2.x, XL) on images with captions and control images.

The pipeline itself is frozen. The adapter reads each image once and not the noisy latents, so it is small, and costs
nothing in later steps of a run (Mou et al. 2023). Noisy timesteps are sampled more often (``--timestep_bias_strategy
cubic``). The result is a T2I-Adapter in diffusers' layout, also in every ``checkpoint-N/t2iadapter``;
``T2IAdapter.from_pretrained`` of this library and of PyTorch diffusers opens it. Example:

    python train/t2i_adapter.py --pretrained_model_name_or_path diffuse-jax/emoji \\
        --train_data_dir runs/emoji/data/train --conditioning canny --resolution 64 --cache_latents \\
        --proportion_empty_prompts 0.3 --train_batch_size 16 --learning_rate 5e-4 --max_train_steps 2000
"""

from __future__ import annotations

import argparse
import functools

from diffuse_jax.training.command import flags_first, train
from diffuse_jax.training.latent_flags import add_control, latent_parser
from diffuse_jax.training.settings import AdapterSettings


@functools.cache
def parse_args() -> argparse.Namespace:
    parser = latent_parser(__doc__, output_dir="runs/t2i-adapter", text_encoders=False, timestep_bias_strategy="cubic")
    add_control(parser, AdapterSettings, "T2I-Adapter")
    return parser.parse_args()


with flags_first(parse_args):  # JAX and the library, once the flags are known to be right
    from diffuse_jax.training.control import ADAPTER, BesideRun, train_beside
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
        control=settings_from(args, AdapterSettings),
    )
    train_beside(ADAPTER, settings, mesh_from(settings_from(args, DeviceSettings)), vars(args))


if __name__ == "__main__":
    train(main)
