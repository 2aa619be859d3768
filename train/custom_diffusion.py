"""Teach Stable Diffusion (1.x, 2.x) concepts from a few images of each: Custom Diffusion (Kumari et al. 2023).

Only keys and values of the UNet's cross-attention and the embeddings of new words are trained. The result is
``pytorch_custom_diffusion_weights.safetensors`` and a file for each new word, also in every ``checkpoint-N``;
``pipe.load_attn_procs`` and ``pipe.load_textual_inversion`` load them, here and in PyTorch diffusers. Example:

    python train/custom_diffusion.py --pretrained_model_name_or_path my-model --instance_data_dir my-cat \\
        --instance_prompt "photo of a <new1> cat" --modifier_token "<new1>" --class_data_dir cats --class_prompt cat \\
        --with_prior_preservation --num_class_images 200 --hflip --max_train_steps 250 --learning_rate 1e-5 --scale_lr
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

from diffuse_jax.training.command import flags_first, train
from diffuse_jax.training.latent_flags import add_custom, latent_parser


@functools.cache
def parse_args() -> argparse.Namespace:
    defaults: dict[str, Any] = {"train_batch_size": 4, "learning_rate": 1e-5}
    parser = latent_parser(__doc__, output_dir="runs/custom-diffusion", text_encoders=False, **defaults)
    add_custom(parser)
    return parser.parse_args()


with flags_first(parse_args):  # JAX and the library, once the flags are known to be right
    from diffuse_jax.training.checked import checked_source
    from diffuse_jax.training.custom import (
        cell_of,
        check_custom,
        class_images,
        combined,
        instance_images,
        make_classes,
        save_custom,
        trained_shapes,
        with_attention,
        with_concepts,
    )
    from diffuse_jax.training.data import data_from
    from diffuse_jax.training.devices import mesh_from
    from diffuse_jax.training.dreambooth import interleaved_batches
    from diffuse_jax.training.flags import settings_from
    from diffuse_jax.training.latent import loss_of, networks
    from diffuse_jax.training.latent_model import configured_from, pipeline_from
    from diffuse_jax.training.loop import fit
    from diffuse_jax.training.objective import objective_from
    from diffuse_jax.training.settings import (
        CustomSettings,
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
    run, model = settings_from(args, RunSettings), settings_from(args, ModelSettings)
    data = data_from(args, named=False)
    taught = settings_from(args, CustomSettings)
    concepts = check_custom(taught, data)
    learned, shown = settings_from(args, ObjectiveSettings), settings_from(args, ValidationSettings)
    mesh = mesh_from(settings_from(args, DeviceSettings))
    check_output(run, data.caches.data_cache_dir)
    plan = configured_from(model, "Custom Diffusion")
    shapes, instance = trained_shapes(taught, plan), instance_images(concepts, run.batch, mesh)
    source, times = instance
    checked_source(run, model, data, learned, mesh, plan, trainable=shapes, shown=shown, source=source, times=times)
    make_classes(taught, concepts, model, plan, run.seed)
    pipe, trainable = with_concepts(taught, pipeline_from(model, mesh, float32=("unet",)))

    others, cell = class_images(taught, concepts, run.batch, mesh), cell_of(taught, pipe)
    images, names = (data, run.batch, mesh, model, pipe), tuple(shapes)
    batches, unused = interleaved_batches(*images, trained=names, instance=instance, others=others, cell=cell)
    objective = objective_from(learned, pipe.scheduler, taught.prior_loss_weight)
    fit(
        run,
        mesh,
        trainable=trainable,
        frozen={name: params for name, params in pipe.params.items() if name not in unused},
        loss=loss_of(pipe, with_attention(networks(pipe)), objective),
        batches=batches,
        export=functools.partial(save_custom, taught, pipe),
        validate=validation_from(shown, model, pipe, functools.partial(combined, pipe.params), run.seed),
        config=vars(args),
    )
    print(run.output_dir)
    push_to_hub(run.upload, run.output_dir)


if __name__ == "__main__":
    train(main)
