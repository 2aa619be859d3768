"""Train or fine-tune the UNet of Stable Diffusion (1.x, 2.x, XL), and optionally its text encoders, on captioned
images; or DeepFloyd IF, Kandinsky 2.2 or the prior of Würstchen.

The result is a complete pipeline folder in diffusers' layout; every ``checkpoint-N`` contains the trained networks.
Example:

    python train/text_to_image.py --pretrained_model_name_or_path runs/emoji/start \\
        --pretrained_vae_model_name_or_path runs/emoji/vae --train_data_dir runs/emoji/data/train --resolution 64 \\
        --train_text_encoder --cache_latents --use_ema --snr_gamma 5 --proportion_empty_prompts 0.1
"""

from __future__ import annotations

import argparse
import functools

from diffuse_jax.training.command import flags_first, train
from diffuse_jax.training.data.flags import add_data
from diffuse_jax.training.latent_flags import latent_parser


@functools.cache
def parse_args() -> argparse.Namespace:
    parser = latent_parser(__doc__, output_dir="runs/text-to-image")
    add_data(parser, caches=True, masks=True)
    return parser.parse_args()


with flags_first(parse_args):  # JAX and the library, once the flags are known to be right
    from diffuse_jax.training.cached import inputs_from
    from diffuse_jax.training.checked import checked_source
    from diffuse_jax.training.data import batches_from, data_from
    from diffuse_jax.training.devices import mesh_from
    from diffuse_jax.training.flags import settings_from
    from diffuse_jax.training.latent import divided, loss_of, networks, save_networks, whole
    from diffuse_jax.training.latent_model import configured_from, pipeline_from, save_rest, trained_names
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
    from diffuse_jax.training.validation import validation_from


def main() -> None:
    args = parse_args()
    run, model, data = settings_from(args, RunSettings), settings_from(args, ModelSettings), data_from(args)
    learned, shown = settings_from(args, ObjectiveSettings), settings_from(args, ValidationSettings)
    mesh = mesh_from(settings_from(args, DeviceSettings))
    check_output(run, data.caches.data_cache_dir)
    plan = configured_from(model, "text to image")
    names = trained_names(model, run.optimizer, plan)
    shapes, _ = divided(plan, names)
    source = checked_source(run, model, data, learned, mesh, plan, trainable=shapes, shown=shown)
    pipe = pipeline_from(model, mesh, float32=names)
    trainable, frozen = divided(pipe, names)

    inputs = inputs_from(
        data, model, pipe, trained=names, source=source
    )  # images and captions, or what was computed from them before
    objective = objective_from(learned, pipe.scheduler)
    fit(
        run,
        mesh,
        trainable=trainable,
        frozen={name: params for name, params in frozen.items() if name not in inputs.unused},
        loss=loss_of(pipe, whole(networks(pipe)), objective, model.class_labels_conditioning),
        batches=batches_from(data, run.batch, mesh, inputs.finish, source=inputs.source, pixels=inputs.pixels),
        export=functools.partial(save_networks, pipe),
        validate=validation_from(shown, model, pipe, lambda trained: trained, run.seed),
        finish=functools.partial(save_rest, model, pipe, run.output_dir),
        config=vars(args),
    )
    print(run.output_dir)
    push_to_hub(run.upload, run.output_dir)


if __name__ == "__main__":
    train(main)
