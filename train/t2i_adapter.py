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
    from diffuse_jax.training.cached import inputs_from
    from diffuse_jax.training.checked import checked_source
    from diffuse_jax.training.control import ADAPTER, beside, beside_shapes, control_validation, save_beside
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
    control = settings_from(args, AdapterSettings)
    mesh = mesh_from(settings_from(args, DeviceSettings))
    check_output(run, data.caches.data_cache_dir)
    plan = configured_from(model)
    shapes = {"adapter": beside_shapes(ADAPTER, control, model, plan)}
    control_validation(shown, control, model, data, plan)  # checks the prompts and images
    source = checked_source(run, model, data, learned, mesh, plan, trainable=shapes)
    pipe = beside(ADAPTER, control, model, mesh, run.seed)
    validate = control_validation(shown, control, model, data, pipe, run.seed)

    inputs = inputs_from(data, model, pipe, trained=("adapter",), source=source, true_sizes=False)
    objective = objective_from(learned, pipe.scheduler)
    fit(
        run,
        mesh,
        trainable={"adapter": pipe.params["adapter"]},
        frozen={name: params for name, params in pipe.params.items() if name not in ("adapter", *inputs.unused)},
        loss=loss_of(pipe, whole(networks(pipe)), objective),
        batches=batches_from(data, run.batch, mesh, inputs.finish, source=inputs.source, pixels=inputs.pixels),
        export=functools.partial(save_beside, ADAPTER, pipe.components["adapter"], run.output_dir),
        validate=validate,
        config=vars(args),
    )
    print(run.output_dir)
    push_to_hub(run.upload, run.output_dir)


if __name__ == "__main__":
    train(main)
