"""Fine-tune a Stable Diffusion (1.x, 2.x, XL) on captioned pictures with low-rank pairs (LoRA).

Only ``pytorch_lora_weights.safetensors`` is written, which ``pipe.load_lora_weights`` of this library and of PyTorch
diffusers opens; so is it in every ``checkpoint-N``. Example:

    python train/text_to_image_lora.py --pretrained_model_name_or_path diffuse-jax/emoji \\
        --train_data_dir my-pictures --resolution 64 --rank 8 --max_train_steps 500 --learning_rate 1e-3
"""

from __future__ import annotations

import argparse

from diffuse_jax.adapters.lora_file import save_lora
from diffuse_jax.training.arguments import mesh_from, objective_from
from diffuse_jax.training.cached import inputs_from
from diffuse_jax.training.data import add_data, batches_from
from diffuse_jax.training.latent import loss_of, networks, with_lora
from diffuse_jax.training.latent_flags import (
    add_lora,
    latent_parser,
    lora_from,
    merged_lora,
    pipeline_from,
    validation_from,
)
from diffuse_jax.training.loop import fit
from diffuse_jax.training.upload import push_to_hub


def main() -> None:
    args = parse_args()
    mesh = mesh_from(args)
    pipe = pipeline_from(args, mesh, float32=())
    pairs = lora_from(args, pipe)

    inputs = inputs_from(args, pipe, trained=tuple(pairs))
    fit(
        args,
        mesh,
        trainable=pairs,
        frozen={name: params for name, params in pipe.params.items() if name not in inputs.unused},
        loss=loss_of(pipe, with_lora(networks(pipe)), objective_from(args, pipe.scheduler)),
        batches=batches_from(args, mesh, inputs.finish, source=inputs.source, pixels=inputs.pixels),
        export=save_lora,
        validate=validation_from(args, pipe, merged_lora(pipe)),
    )
    print(args.output_dir)
    push_to_hub(args)


def parse_args() -> argparse.Namespace:
    parser = latent_parser(__doc__, output_dir="runs/text-to-image-lora")
    add_lora(parser)
    add_data(parser, caches=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
