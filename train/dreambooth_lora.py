"""Teach a Stable Diffusion (1.x, 2.x, XL) one instance from a few pictures, with low-rank pairs (DreamBooth and LoRA).

Only ``pytorch_lora_weights.safetensors`` is written, which ``pipe.load_lora_weights`` of this library and of PyTorch
diffusers opens; so is it in every ``checkpoint-N``. Example:

    python train/dreambooth_lora.py --pretrained_model_name_or_path my-model --instance_data_dir my-dog \\
        --instance_prompt "a photo of sks dog" --rank 8 --max_train_steps 500 --validation_prompt "sks dog in a bucket"
"""

from __future__ import annotations

import argparse

from diffuse_jax.adapters.lora_file import save_lora
from diffuse_jax.training.arguments import mesh_from, objective_from
from diffuse_jax.training.dreambooth import add_dreambooth, check_dreambooth, dreambooth_batches, make_class_pictures
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
    if args.with_prior_preservation:
        make_class_pictures(args)
    pipe = pipeline_from(args, mesh, float32=())
    pairs = lora_from(args, pipe)

    batches, unused = dreambooth_batches(args, mesh, pipe, trained=tuple(pairs))
    fit(
        args,
        mesh,
        trainable=pairs,
        frozen={name: params for name, params in pipe.params.items() if name not in unused},
        loss=loss_of(pipe, with_lora(networks(pipe)), objective_from(args, pipe.scheduler, args.prior_loss_weight)),
        batches=batches,
        export=save_lora,
        validate=validation_from(args, pipe, merged_lora(pipe)),
    )
    print(args.output_dir)
    push_to_hub(args)


def parse_args() -> argparse.Namespace:
    parser = latent_parser(__doc__, output_dir="runs/dreambooth-lora", train_batch_size=4)
    add_dreambooth(parser)
    add_lora(parser)
    args = parser.parse_args()
    check_dreambooth(args)
    return args


if __name__ == "__main__":
    main()
