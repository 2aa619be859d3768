"""Teach a Stable Diffusion (1.x, 2.x) a new word from a few pictures: textual inversion (Gal et al. 2022).

Only the word's rows of the token embeddings are trained. ``learned_embeds.safetensors`` is written, which
``pipe.load_textual_inversion`` of this library and of PyTorch diffusers opens; so is it in every ``checkpoint-N``.
Example:

    python train/textual_inversion.py --pretrained_model_name_or_path my-model --train_data_dir my-cat \\
        --placeholder_token "<cat-toy>" --initializer_token toy --max_train_steps 3000 --learning_rate 5e-4 --scale_lr
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import jax

from diffuse_jax.sharding import readable
from diffuse_jax.training.arguments import mesh_from, objective_from
from diffuse_jax.training.inversion import (
    add_inversion,
    check_inversion,
    combined,
    inversion_batches,
    save_embeddings,
    with_placeholder,
)
from diffuse_jax.training.latent import loss_of, networks, save_networks, with_tokens
from diffuse_jax.training.latent_flags import latent_parser, pipeline_from, save_rest, validation_from
from diffuse_jax.training.loop import fit
from diffuse_jax.training.upload import push_to_hub


def main() -> None:
    args = parse_args()
    mesh = mesh_from(args)
    pipe, rows = with_placeholder(args, pipeline_from(args, mesh, float32=()))

    batches, unused = inversion_batches(args, mesh, pipe)
    trained = fit(
        args,
        mesh,
        trainable={"text_encoder": rows},
        frozen={name: params for name, params in pipe.params.items() if name not in unused},
        loss=loss_of(pipe, with_tokens(networks(pipe)), objective_from(args, pipe.scheduler)),
        batches=batches,
        export=functools.partial(save_embeddings, args),
        validate=validation_from(args, pipe, functools.partial(combined, pipe)),
    )
    full = readable(combined(pipe, trained)) if args.save_as_full_pipeline else None
    if full is not None and jax.process_index() == 0:
        save_networks(pipe, Path(args.output_dir), full)
        pipe.components["tokenizer"].save_pretrained(Path(args.output_dir) / "tokenizer")
        save_rest(args, pipe, trained=("text_encoder", "tokenizer"))
    print(args.output_dir)
    push_to_hub(args)


def parse_args() -> argparse.Namespace:
    defaults = {"train_batch_size": 4, "max_grad_norm": None}
    parser = latent_parser(__doc__, output_dir="runs/textual-inversion", text_encoders=False, **defaults)
    add_inversion(parser)
    args = parser.parse_args()
    check_inversion(args)
    return args


if __name__ == "__main__":
    main()
