"""Train a Stable Diffusion (1.x, 2.x, XL) to edit images as a prompt instructs: InstructPix2Pix.

The data are images before and after an edit, with the instruction. The UNet gets further input channels for the image
before the edit; the result is a complete InstructPix2Pix pipeline in diffusers' layout. Example:

    python train/instruct_pix2pix.py --pretrained_model_name_or_path diffuse-jax/emoji \\
        --train_data_dir my-edits --resolution 64 --cache_latents --conditioning_dropout_prob 0.05 --use_ema \\
        --validation_prompt "make it noto style" --validation_image apple.png --max_train_steps 2000
"""

from __future__ import annotations

import argparse
import functools

from diffuse_jax.training.command import flags_first, train
from diffuse_jax.training.latent_flags import add_edit, latent_parser


@functools.cache
def parse_args() -> argparse.Namespace:
    parser = latent_parser(__doc__, output_dir="runs/instruct-pix2pix", text_encoders=False)
    add_edit(parser)
    return parser.parse_args()


with flags_first(parse_args):  # JAX and the library, once the flags are known to be right
    from diffuse_jax.training.cached import inputs_from
    from diffuse_jax.training.checked import checked_source
    from diffuse_jax.training.control import control_validation
    from diffuse_jax.training.data import batches_from, data_from
    from diffuse_jax.training.devices import mesh_from
    from diffuse_jax.training.editing import with_image_channels
    from diffuse_jax.training.flags import settings_from
    from diffuse_jax.training.latent import loss_of, networks, save_networks, whole
    from diffuse_jax.training.latent_model import configured_from, pipeline_from, save_rest
    from diffuse_jax.training.loop import fit
    from diffuse_jax.training.objective import objective_from
    from diffuse_jax.training.settings import (
        DeviceSettings,
        ModelSettings,
        ObjectiveSettings,
        RunSettings,
        ValidationImageSettings,
        ValidationSettings,
    )
    from diffuse_jax.training.start import check_output
    from diffuse_jax.training.upload import push_to_hub

TRAINED = ("unet",)


def main() -> None:
    args = parse_args()
    run, model, data = settings_from(args, RunSettings), settings_from(args, ModelSettings), data_from(args)
    learned, shown = settings_from(args, ObjectiveSettings), settings_from(args, ValidationSettings)
    edited = settings_from(args, ValidationImageSettings)
    mesh = mesh_from(settings_from(args, DeviceSettings))
    check_output(run, data.caches.data_cache_dir)
    plan = with_image_channels(configured_from(model, "editing"))
    control_validation(shown, edited, model, data, plan)  # checks the prompts and images
    source = checked_source(run, model, data, learned, mesh, plan, trainable={"unet": plan.params["unet"]})
    pipe = with_image_channels(pipeline_from(model, mesh, float32=TRAINED))

    inputs = inputs_from(data, model, pipe, trained=TRAINED, source=source, true_sizes=False)
    fit(
        run,
        mesh,
        trainable={"unet": pipe.params["unet"]},
        frozen={name: params for name, params in pipe.params.items() if name not in (*TRAINED, *inputs.unused)},
        loss=loss_of(pipe, whole(networks(pipe)), objective_from(learned, pipe.scheduler)),
        batches=batches_from(data, run.batch, mesh, inputs.finish, source=inputs.source, pixels=inputs.pixels),
        export=functools.partial(save_networks, pipe),
        validate=control_validation(shown, edited, model, data, pipe, run.seed, what="original image"),
        finish=functools.partial(save_rest, model, pipe, run.output_dir),
        config=vars(args),
    )
    print(run.output_dir)
    push_to_hub(run.upload, run.output_dir)


if __name__ == "__main__":
    train(main)
