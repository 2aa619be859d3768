"""Train or fine-tune the UNet of a Stable Diffusion (1.x, 2.x, XL; if wanted its text encoders) on captioned pictures.

The result is a whole pipeline folder in diffusers' layout; every ``checkpoint-N`` holds the trained networks. Example:

    python train/text_to_image.py --pretrained_model_name_or_path runs/emoji/start \\
        --pretrained_vae_model_name_or_path runs/emoji/vae --train_data_dir runs/emoji/data/train --resolution 64 \\
        --train_text_encoder --cache_latents --use_ema --snr_gamma 5 --proportion_empty_prompts 0.1
"""

from __future__ import annotations

import argparse
import functools

import jax

from diffuse_jax.training.arguments import mesh_from, objective_from
from diffuse_jax.training.cached import inputs_from
from diffuse_jax.training.data import add_data, batches_from
from diffuse_jax.training.latent import loss_of, networks, save_networks, whole
from diffuse_jax.training.latent_flags import (
    latent_parser,
    pipeline_from,
    save_rest,
    trained_names,
    validation_from,
)
from diffuse_jax.training.loop import fit
from diffuse_jax.training.upload import push_to_hub


def main() -> None:
    args = parse_args()
    mesh = mesh_from(args)
    names = trained_names(args)
    pipe = pipeline_from(args, mesh, float32=names)
    trainable = {name: pipe.params[name] for name in names}

    inputs = inputs_from(args, pipe, trained=names)  # pictures and captions, or what was worked out from them before
    frozen = {name: params for name, params in pipe.params.items() if name not in (*names, *inputs.unused)}
    params = fit(
        args,
        mesh,
        trainable=trainable,
        frozen=frozen,
        loss=loss_of(pipe, whole(networks(pipe)), objective_from(args, pipe.scheduler)),
        batches=batches_from(args, mesh, inputs.finish, source=inputs.source, pixels=inputs.pixels),
        export=functools.partial(save_networks, pipe),
        validate=validation_from(args, pipe, lambda trained: trained),
    )
    if jax.process_index() == 0:
        save_rest(args, pipe, trained=params)
        print(args.output_dir)
    push_to_hub(args)


def parse_args() -> argparse.Namespace:
    parser = latent_parser(__doc__, output_dir="runs/text-to-image")
    add_data(parser, caches=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
