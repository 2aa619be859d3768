"""Distil a Stable Diffusion (1.x, 2.x, XL) into a latent consistency model, which needs one to eight steps.

The student is a copy of the teacher's UNet that also takes the guidance scale as an input. The result is a complete
pipeline folder in diffusers' layout, with LCMScheduler; every ``checkpoint-N`` contains the student. Example:

    python train/lcm_distillation.py --pretrained_teacher_model diffuse-jax/emoji --train_data_dir my-images \\
        --resolution 64 --cache_latents --loss_type huber --learning_rate 1e-4 --max_train_steps 1000 \\
        --validation_prompt "a red apple, noto style"
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

from diffuse_jax.training.command import flags_first, train
from diffuse_jax.training.latent_flags import add_student, consistency_parser


@functools.cache
def parse_args() -> argparse.Namespace:
    parser = consistency_parser(__doc__, output_dir="runs/lcm", use_ema=True)
    add_student(parser)
    return parser.parse_args()


with flags_first(parse_args):  # JAX and the library, once the flags are known to be right
    from diffuse_jax.training.cached import inputs_from
    from diffuse_jax.training.checked import checked_source
    from diffuse_jax.training.consistency import (
        consistency_from,
        consistency_loss_of,
        frozen_from,
        teacher_of,
        with_guidance,
    )
    from diffuse_jax.training.data import batches_from, data_from
    from diffuse_jax.training.devices import mesh_from
    from diffuse_jax.training.flags import settings_from
    from diffuse_jax.training.latent import networks, save_networks, whole
    from diffuse_jax.training.latent_model import configured_from, pipeline_from, save_rest
    from diffuse_jax.training.loop import fit
    from diffuse_jax.training.settings import (
        ConsistencySettings,
        DeviceSettings,
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
    mesh = mesh_from(settings_from(args, DeviceSettings))
    check_output(run, data.caches.data_cache_dir)
    plan = configured_from(model, "distillation")
    distillation = consistency_from(settings, plan)
    shapes = {"unet": with_guidance(plan, settings.unet_time_cond_proj_dim).params["unet"]}
    images: dict[str, Any] = {"shown": shown, "sampler": distillation.sampler}
    source = checked_source(run, model, data, ObjectiveSettings(), mesh, plan, trainable=shapes, **images)
    pipe = pipeline_from(model, mesh, float32=TRAINED)
    student, teacher = with_guidance(pipe, settings.unet_time_cond_proj_dim), teacher_of(pipe)

    inputs = inputs_from(data, model, teacher, trained=TRAINED, source=source)
    fit(
        run,
        mesh,
        trainable={"unet": student.params["unet"]},
        frozen=frozen_from(teacher, inputs.unused),
        loss=consistency_loss_of(teacher, whole(networks(student)), distillation),
        batches=batches_from(data, run.batch, mesh, inputs.finish, source=inputs.source, pixels=inputs.pixels),
        export=functools.partial(save_networks, student),
        validate=validation_from(
            shown, model, student, lambda trained: trained, run.seed, sampler=distillation.sampler
        ),
        finish=functools.partial(save_rest, model, student, run.output_dir, sampler=distillation.sampler),
        config=vars(args),
    )
    print(run.output_dir)
    push_to_hub(run.upload, run.output_dir)


if __name__ == "__main__":
    train(main)
