"""Fine-tune Stable Diffusion (1.x, 2.x, XL), DeepFloyd IF, Kandinsky 2.2 or Würstchen's prior on captioned images
with LoRA.

The result is ``pytorch_lora_weights.safetensors``, also in every ``checkpoint-N``; ``pipe.load_lora_weights`` of this
library and of PyTorch diffusers loads it. Example:

    python train/text_to_image_lora.py --pretrained_model_name_or_path diffuse-jax/emoji \\
        --train_data_dir my-images --resolution 64 --rank 8 --max_train_steps 500 --learning_rate 1e-3
"""

from __future__ import annotations

import argparse
import functools

from diffuse_jax.training.command import flags_first, train
from diffuse_jax.training.data.flags import add_data
from diffuse_jax.training.latent_flags import add_lora, latent_parser


@functools.cache
def parse_args() -> argparse.Namespace:
    parser = latent_parser(__doc__, output_dir="runs/text-to-image-lora")
    add_lora(parser)
    add_data(parser, caches=True, masks=True)
    return parser.parse_args()


with flags_first(parse_args):  # JAX and the library, once the flags are known to be right
    from diffuse_jax.adapters.lora_file import save_lora
    from diffuse_jax.training.cached import inputs_from
    from diffuse_jax.training.checked import checked_source
    from diffuse_jax.training.data import batches_from, data_from
    from diffuse_jax.training.devices import mesh_from
    from diffuse_jax.training.flags import settings_from
    from diffuse_jax.training.latent import loss_of, networks, with_lora
    from diffuse_jax.training.latent_model import configured_from, pipeline_from, trained_names
    from diffuse_jax.training.loop import fit
    from diffuse_jax.training.low_rank import lora_from, lora_shapes, merged_lora
    from diffuse_jax.training.objective import objective_from
    from diffuse_jax.training.settings import (
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


def main() -> None:
    args = parse_args()
    run, model, data = settings_from(args, RunSettings), settings_from(args, ModelSettings), data_from(args)
    learned, shown = settings_from(args, ObjectiveSettings), settings_from(args, ValidationSettings)
    lora = settings_from(args, LoraSettings)
    mesh = mesh_from(settings_from(args, DeviceSettings))
    check_output(run, data.caches.data_cache_dir)
    plan = configured_from(model, "text to image")
    names = trained_names(model, run.optimizer, plan)
    shapes = lora_shapes(lora, plan, names)
    source = checked_source(run, model, data, learned, mesh, plan, trainable=shapes, shown=shown)
    pipe = pipeline_from(model, mesh, float32=())
    pairs = lora_from(lora, pipe, names, run.seed)

    inputs = inputs_from(data, model, pipe, trained=names, source=source)
    objective = objective_from(learned, pipe.scheduler)
    fit(
        run,
        mesh,
        trainable=pairs,
        frozen={name: params for name, params in pipe.params.items() if name not in inputs.unused},
        loss=loss_of(pipe, with_lora(networks(pipe)), objective, model.class_labels_conditioning),
        batches=batches_from(data, run.batch, mesh, inputs.finish, source=inputs.source, pixels=inputs.pixels),
        export=save_lora,
        validate=validation_from(shown, model, pipe, merged_lora(pipe), run.seed),
        config=vars(args),
    )
    print(run.output_dir)
    push_to_hub(run.upload, run.output_dir)


if __name__ == "__main__":
    train(main)
