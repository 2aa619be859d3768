"""Teach Stable Diffusion (1.x, 2.x, XL) or DeepFloyd IF one instance from a few images: DreamBooth (Ruiz et al.
2023).

With ``--with_prior_preservation``, the model is also trained on images of the class, which it generates beforehand. The
result is a complete pipeline folder; every ``checkpoint-N`` contains the trained networks. Example:

    python train/dreambooth.py --pretrained_model_name_or_path my-model --instance_data_dir my-dog \\
        --instance_prompt "a photo of sks dog" --class_data_dir dogs --class_prompt "a photo of dog" \\
        --with_prior_preservation --max_train_steps 800 --learning_rate 2e-6 --train_text_encoder
"""

from __future__ import annotations

import argparse
import functools

from diffuse_jax.training.command import flags_first, train
from diffuse_jax.training.latent_flags import add_dreambooth, latent_parser


@functools.cache
def parse_args() -> argparse.Namespace:
    parser = latent_parser(__doc__, output_dir="runs/dreambooth", learning_rate=5e-6, train_batch_size=4)
    add_dreambooth(parser)
    return parser.parse_args()


with flags_first(parse_args):  # JAX and the library, once the flags are known to be right
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
    from diffuse_jax.training.latent import divided, loss_of, networks, save_networks, whole
    from diffuse_jax.training.latent_model import configured_from, pipeline_from, save_rest, trained_names
    from diffuse_jax.training.loop import fit
    from diffuse_jax.training.objective import objective_from
    from diffuse_jax.training.settings import (
        DeviceSettings,
        DreamBoothSettings,
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
    mesh = mesh_from(settings_from(args, DeviceSettings))
    check_output(run, data.caches.data_cache_dir)
    plan = configured_from(model, "DreamBooth")
    names = trained_names(model, run.optimizer, plan)
    shapes, instance = divided(plan, names)[0], instance_source(taught, data, run.batch, mesh)
    source, times = instance
    checked_source(run, model, data, learned, mesh, plan, trainable=shapes, shown=shown, source=source, times=times)
    make_class_images(taught, model, plan, run.seed)
    pipe = pipeline_from(model, mesh, float32=names)
    trainable, frozen = divided(pipe, names)

    others, images = class_source(taught, run.batch, mesh), (data, run.batch, mesh, model, pipe)
    batches, unused = interleaved_batches(*images, trained=names, instance=instance, others=others)
    objective = objective_from(learned, pipe.scheduler, taught.prior_loss_weight)
    fit(
        run,
        mesh,
        trainable=trainable,
        frozen={name: params for name, params in frozen.items() if name not in unused},
        loss=loss_of(pipe, whole(networks(pipe)), objective, model.class_labels_conditioning),
        batches=batches,
        export=functools.partial(save_networks, pipe),
        validate=validation_from(shown, model, pipe, lambda trained: trained, run.seed),
        finish=functools.partial(save_rest, model, pipe, run.output_dir),
        config=vars(args),
    )
    print(run.output_dir)
    push_to_hub(run.upload, run.output_dir)


if __name__ == "__main__":
    train(main)
