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
    from diffuse_jax.training.cached import inputs_from
    from diffuse_jax.training.checked import checked_source
    from diffuse_jax.training.control import CONTROLNET, beside, beside_shapes, control_validation, save_beside
    from diffuse_jax.training.data import batches_from, data_from
    from diffuse_jax.training.devices import mesh_from
    from diffuse_jax.training.flags import settings_from
    from diffuse_jax.training.latent import loss_of, networks, whole
    from diffuse_jax.training.latent_model import configured_from
    from diffuse_jax.training.loop import fit
    from diffuse_jax.training.objective import objective_from
    from diffuse_jax.training.settings import (
        DeviceSettings,
        ModelSettings,
        ObjectiveSettings,
        RunSettings,
        ValidationSettings,
    )
    from diffuse_jax.training.start import check_output
    from diffuse_jax.training.upload import push_to_hub


def main() -> None:
    args = parse_args()
    run, model, data = settings_from(args, RunSettings), settings_from(args, ModelSettings), data_from(args)
    learned, shown = settings_from(args, ObjectiveSettings), settings_from(args, ValidationSettings)
    control = settings_from(args, ControlSettings)
    mesh = mesh_from(settings_from(args, DeviceSettings))
    check_output(run, data.caches.data_cache_dir)
    plan = configured_from(model)
    shapes = {"controlnet": beside_shapes(CONTROLNET, control, model, plan)}
    control_validation(shown, control, model, data, plan)  # checks the prompts and images
    source = checked_source(run, model, data, learned, mesh, plan, trainable=shapes)
    pipe = beside(CONTROLNET, control, model, mesh, run.seed)
    validate = control_validation(shown, control, model, data, pipe, run.seed)

    inputs = inputs_from(data, model, pipe, trained=("controlnet",), source=source, true_sizes=False)
    objective = objective_from(learned, pipe.scheduler)
    fit(
        run,
        mesh,
        trainable={"controlnet": pipe.params["controlnet"]},
        frozen={name: params for name, params in pipe.params.items() if name not in ("controlnet", *inputs.unused)},
        loss=loss_of(pipe, whole(networks(pipe)), objective),
        batches=batches_from(data, run.batch, mesh, inputs.finish, source=inputs.source, pixels=inputs.pixels),
        export=functools.partial(save_beside, CONTROLNET, pipe.components["controlnet"], run.output_dir),
        validate=validate,
        config=vars(args),
    )
    print(run.output_dir)
    push_to_hub(run.upload, run.output_dir)


if __name__ == "__main__":
    train(main)
