"""Teach Stable Diffusion (1.x, 2.x, XL) or DeepFloyd IF one instance from a few images, with DreamBooth and LoRA.

The result is ``pytorch_lora_weights.safetensors``, also in every ``checkpoint-N``; ``pipe.load_lora_weights`` of this
library and of PyTorch diffusers loads it. Example:

    python train/dreambooth_lora.py --pretrained_model_name_or_path my-model --instance_data_dir my-dog \\
        --instance_prompt "a photo of sks dog" --rank 8 --max_train_steps 500 --validation_prompt "sks dog in a bucket"
"""

from __future__ import annotations

import argparse
import functools

from diffuse_jax.training.command import flags_first, train
from diffuse_jax.training.latent_flags import add_dreambooth, add_lora, latent_parser


@functools.cache
def parse_args() -> argparse.Namespace:
    parser = latent_parser(__doc__, output_dir="runs/dreambooth-lora", train_batch_size=4)
    add_dreambooth(parser)
    add_lora(parser)
    return parser.parse_args()


with flags_first(parse_args):  # JAX and the library, once the flags are known to be right
    from diffuse_jax.adapters.lora_file import save_lora
    from diffuse_jax.training.checked import checked_source
    from diffuse_jax.training.data import data_from
    from diffuse_jax.training.devices import mesh_from
    from diffuse_jax.training.dreambooth import (
        check_dreambooth,
        class_source,
        instance_source,
        interleaved_batches,
        make_class_images,
    )
    from diffuse_jax.training.flags import settings_from
    from diffuse_jax.training.latent import loss_of, networks, with_lora
    from diffuse_jax.training.latent_model import configured_from, pipeline_from, trained_names
    from diffuse_jax.training.loop import fit
    from diffuse_jax.training.low_rank import lora_from, lora_shapes, merged_lora
    from diffuse_jax.training.objective import objective_from
    from diffuse_jax.training.settings import (
        DeviceSettings,
        DreamBoothSettings,
        LoraSettings,
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
    run, model = settings_from(args, RunSettings), settings_from(args, ModelSettings)
    data = data_from(args, named=False)
    taught = settings_from(args, DreamBoothSettings)
    check_dreambooth(taught, data)
    learned, shown = settings_from(args, ObjectiveSettings), settings_from(args, ValidationSettings)
    lora = settings_from(args, LoraSettings)
    mesh = mesh_from(settings_from(args, DeviceSettings))
    check_output(run, data.caches.data_cache_dir)
    plan = configured_from(model, "DreamBooth")
    names = trained_names(model, run.optimizer, plan)
    shapes, instance = lora_shapes(lora, plan, names), instance_source(taught, data, run.batch, mesh)
    source, times = instance
    checked_source(run, model, data, learned, mesh, plan, trainable=shapes, shown=shown, source=source, times=times)
    make_class_images(taught, model, plan, run.seed)
    pipe = pipeline_from(model, mesh, float32=())
    pairs = lora_from(lora, pipe, names, run.seed)

    others, images = class_source(taught, run.batch, mesh), (data, run.batch, mesh, model, pipe)
    batches, unused = interleaved_batches(*images, trained=names, instance=instance, others=others)
    objective = objective_from(learned, pipe.scheduler, taught.prior_loss_weight)
    fit(
        run,
        mesh,
        trainable=pairs,
        frozen={name: params for name, params in pipe.params.items() if name not in unused},
        loss=loss_of(pipe, with_lora(networks(pipe)), objective, model.class_labels_conditioning),
        batches=batches,
        export=save_lora,
        validate=validation_from(shown, model, pipe, merged_lora(pipe), run.seed),
        config=vars(args),
    )
    print(run.output_dir)
    push_to_hub(run.upload, run.output_dir)


if __name__ == "__main__":
    train(main)
