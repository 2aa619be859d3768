"""Teach a Stable Diffusion (1.x, 2.x, XL) one instance from a few pictures: DreamBooth (Ruiz et al. 2023).

With ``--with_prior_preservation`` it is trained on pictures of the class too, which it makes itself beforehand. The
result is a whole pipeline folder; every ``checkpoint-N`` holds the trained networks. Example:

    python train/dreambooth.py --pretrained_model_name_or_path my-model --instance_data_dir my-dog \\
        --instance_prompt "a photo of sks dog" --class_data_dir dogs --class_prompt "a photo of dog" \\
        --with_prior_preservation --max_train_steps 800 --learning_rate 2e-6 --train_text_encoder
"""

from __future__ import annotations

import argparse
import functools

import jax

from diffuse_jax.training.arguments import mesh_from, objective_from
from diffuse_jax.training.dreambooth import add_dreambooth, check_dreambooth, dreambooth_batches, make_class_pictures
from diffuse_jax.training.latent import loss_of, networks, save_networks, whole
from diffuse_jax.training.latent_flags import latent_parser, pipeline_from, save_rest, trained_names, validation_from
from diffuse_jax.training.loop import fit
from diffuse_jax.training.upload import push_to_hub


def main() -> None:
    args = parse_args()
    mesh = mesh_from(args)
    if args.with_prior_preservation:
        make_class_pictures(args)
    names = trained_names(args)
    pipe = pipeline_from(args, mesh, float32=names)

    batches, unused = dreambooth_batches(args, mesh, pipe, trained=names)
    params = fit(
        args,
        mesh,
        trainable={name: pipe.params[name] for name in names},
        frozen={name: params for name, params in pipe.params.items() if name not in (*names, *unused)},
        loss=loss_of(pipe, whole(networks(pipe)), objective_from(args, pipe.scheduler, args.prior_loss_weight)),
        batches=batches,
        export=functools.partial(save_networks, pipe),
        validate=validation_from(args, pipe, lambda trained: trained),
    )
    if jax.process_index() == 0:
        save_rest(args, pipe, trained=params)
        print(args.output_dir)
    push_to_hub(args)


def parse_args() -> argparse.Namespace:
    parser = latent_parser(__doc__, output_dir="runs/dreambooth", learning_rate=5e-6, train_batch_size=4)
    add_dreambooth(parser)
    args = parser.parse_args()
    check_dreambooth(args)
    return args


if __name__ == "__main__":
    main()
