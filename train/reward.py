"""Tune a Stable Diffusion (1.x, 2.x, XL) to a reward of its images.

DDPO takes any reward, DRaFT those with a gradient. With LoRA the result is ``pytorch_lora_weights.safetensors``, also
in every ``checkpoint-N``, which ``pipe.load_lora_weights`` of this library and of PyTorch diffusers loads; with
``--no-use_lora`` it is a pipeline in diffusers' layout. Example:

    python train/reward.py --pretrained_model_name_or_path my-model --prompts animals.txt \\
        --method ddpo --reward jpeg_compressibility --sample_batch_size 8 --sample_num_batches_per_epoch 4 \\
        --train_batch_size 4 --gradient_accumulation_steps 2 --num_train_epochs 100 --learning_rate 3e-4
"""

from __future__ import annotations

import argparse
import functools

from diffuse_jax.training.command import flags_first, train
from diffuse_jax.training.reward_flags import reward_parser


@functools.cache
def parse_args() -> argparse.Namespace:
    defaults = {"train_batch_size": 1, "learning_rate": 3e-4, "lr_warmup_steps": 0, "logging_steps": 1}
    return reward_parser(__doc__, output_dir="runs/reward", **defaults).parse_args()


with flags_first(parse_args):  # JAX and the library, once the flags are known to be right
    from diffuse_jax.adapters.lora_file import save_lora
    from diffuse_jax.batch.lines import lines_of
    from diffuse_jax.training.data import DataSettings
    from diffuse_jax.training.devices import mesh_from
    from diffuse_jax.training.flags import settings_from
    from diffuse_jax.training.latent import save_networks
    from diffuse_jax.training.latent_model import configured_from, pipeline_from, save_rest
    from diffuse_jax.training.loop import fit
    from diffuse_jax.training.low_rank import lora_from, merged_lora
    from diffuse_jax.training.policy import image_size, prompts_from
    from diffuse_jax.training.reward_tuning import trained_shapes, tuning_from
    from diffuse_jax.training.rewards import check_reward, reward_from
    from diffuse_jax.training.settings import (
        DeviceSettings,
        LoraSettings,
        ModelSettings,
        RewardSettings,
        RunSettings,
        ValidationSettings,
    )
    from diffuse_jax.training.start import check_output, check_run
    from diffuse_jax.training.upload import push_to_hub
    from diffuse_jax.training.validation import validation_from

TRAINED = ("unet",)


def main() -> None:
    args = parse_args()
    run, model = settings_from(args, RunSettings), settings_from(args, ModelSettings)
    settings, shown = settings_from(args, RewardSettings), settings_from(args, ValidationSettings)
    lora = settings_from(args, LoraSettings)
    prompts = prompts_from(settings.prompts, settings_from(args, DataSettings), lines_of)
    mesh = mesh_from(settings_from(args, DeviceSettings))
    check_output(run)
    reward, plan = reward_from(settings), configured_from(model, "reward")
    shapes = trained_shapes(settings, lora, plan)
    planned = tuning_from(settings, run, plan, reward, prompts, mesh)
    check_reward(reward, settings.method == "draft", image_size(settings, plan), prompts)
    validation_from(shown, model, plan, lambda trained: trained)
    check_run(planned.run, mesh, planned.batches.total, shapes)

    whole = not settings.use_lora
    pipe = pipeline_from(model, mesh, float32=TRAINED if whole else ())
    tuning = tuning_from(settings, run, pipe, reward, prompts, mesh)
    finish = lambda trained: save_rest(model, pipe, run.output_dir, trained)
    fit(
        tuning.run,
        mesh,
        trainable={"unet": pipe.params["unet"]} if whole else lora_from(lora, pipe, TRAINED, run.seed),
        frozen=tuning.frozen,
        loss=tuning.loss,
        batches=tuning.batches,
        export=functools.partial(save_networks, pipe) if whole else save_lora,
        validate=validation_from(shown, model, pipe, (lambda t: t) if whole else merged_lora(pipe), run.seed),
        finish=finish if whole else None,
        config=vars(args),
    )
    print(run.output_dir)
    push_to_hub(run.upload, run.output_dir)


if __name__ == "__main__":
    train(main)
