"""Distil a Stable Diffusion (1.x, 2.x, XL) into an LCM-LoRA, with which it needs two to eight steps.

The result is ``pytorch_lora_weights.safetensors``, also in every ``checkpoint-N``; ``pipe.load_lora_weights`` of this
library and of PyTorch diffusers loads it, for sampling with LCMScheduler. Example:

    python train/lcm_distillation_lora.py --pretrained_teacher_model diffuse-jax/emoji --train_data_dir my-images \\
        --resolution 64 --lora_rank 32 --loss_type huber --learning_rate 1e-3 --max_train_steps 1000
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

from diffuse_jax.adapters.targets import UNET_TARGETS
from diffuse_jax.training.command import flags_first, train
from diffuse_jax.training.latent_flags import add_lora, consistency_parser


@functools.cache
def parse_args() -> argparse.Namespace:
    parser = consistency_parser(__doc__, output_dir="runs/lcm-lora", validation_guidance_scale=1.0)
    add_lora(parser, "--lora_rank", rank=64, lora_targets=UNET_TARGETS)
    return parser.parse_args()


with flags_first(parse_args):  # JAX and the library, once the flags are known to be right
    from diffuse_jax.adapters.lora_file import save_lora
    from diffuse_jax.training.cached import inputs_from
    from diffuse_jax.training.checked import checked_source
    from diffuse_jax.training.consistency import consistency_from, consistency_loss_of, frozen_from
    from diffuse_jax.training.data import batches_from, data_from
    from diffuse_jax.training.devices import mesh_from
    from diffuse_jax.training.flags import settings_from
    from diffuse_jax.training.latent import networks, with_lora
    from diffuse_jax.training.latent_model import configured_from, pipeline_from
    from diffuse_jax.training.loop import fit
    from diffuse_jax.training.low_rank import lora_from, lora_shapes, merged_lora
    from diffuse_jax.training.settings import (
        ConsistencySettings,
        DeviceSettings,
        LoraSettings,
        ModelSettings,
        ObjectiveSettings,
        RunSettings,
        ValidationSettings,
    )
    from diffuse_jax.training.start import check_output
    from diffuse_jax.training.upload import push_to_hub
    from diffuse_jax.training.validation import validation_from

TRAINED = ("unet",)


def main() -> None:
    args = parse_args()
    run, model, data = settings_from(args, RunSettings), settings_from(args, ModelSettings), data_from(args)
    settings, shown = settings_from(args, ConsistencySettings), settings_from(args, ValidationSettings)
    lora = settings_from(args, LoraSettings)
    mesh = mesh_from(settings_from(args, DeviceSettings))
    check_output(run, data.caches.data_cache_dir)
    plan = configured_from(model, "distillation")
    distillation = consistency_from(settings, plan)
    shapes = lora_shapes(lora, plan, TRAINED)
    images: dict[str, Any] = {"shown": shown, "sampler": distillation.sampler}
    source = checked_source(run, model, data, ObjectiveSettings(), mesh, plan, trainable=shapes, **images)
    pipe = pipeline_from(model, mesh, float32=())
    pairs = lora_from(lora, pipe, TRAINED, run.seed)

    inputs = inputs_from(data, model, pipe, trained=TRAINED, source=source)
    fit(
        run,
        mesh,
        trainable=pairs,
        frozen=frozen_from(pipe, inputs.unused),
        loss=consistency_loss_of(pipe, with_lora(networks(pipe)), distillation),
        batches=batches_from(data, run.batch, mesh, inputs.finish, source=inputs.source, pixels=inputs.pixels),
        export=save_lora,
        validate=validation_from(shown, model, pipe, merged_lora(pipe), run.seed, sampler=distillation.sampler),
        config=vars(args),
    )
    print(run.output_dir)
    push_to_hub(run.upload, run.output_dir)


if __name__ == "__main__":
    train(main)
