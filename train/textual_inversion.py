"""Teach Stable Diffusion (1.x, 2.x) a new word from a few images: textual inversion (Gal et al. 2022).

Only the token embeddings of the word are trained. The result is ``learned_embeds.safetensors``, also in every
``checkpoint-N``; ``pipe.load_textual_inversion`` of this library and of PyTorch diffusers loads it. Example:

    python train/textual_inversion.py --pretrained_model_name_or_path my-model --train_data_dir my-cat \\
        --placeholder_token "<cat-toy>" --initializer_token toy --max_train_steps 3000 --learning_rate 5e-4 --scale_lr
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from diffuse_jax.training.command import flags_first, train
from diffuse_jax.training.latent_flags import add_inversion, latent_parser


@functools.cache
def parse_args() -> argparse.Namespace:
    defaults: dict[str, Any] = {"train_batch_size": 4, "max_grad_norm": None}
    parser = latent_parser(__doc__, output_dir="runs/textual-inversion", text_encoders=False, **defaults)
    add_inversion(parser)
    return parser.parse_args()


with flags_first(parse_args):  # JAX and the library, once the flags are known to be right
    import jax

    from diffuse_jax.models import Params
    from diffuse_jax.pipelines import DiffusionPipeline
    from diffuse_jax.sharding import readable
    from diffuse_jax.training.cached import inputs_from
    from diffuse_jax.training.checked import checked_source
    from diffuse_jax.training.data import batches_from, data_from
    from diffuse_jax.training.devices import mesh_from
    from diffuse_jax.training.flags import settings_from
    from diffuse_jax.training.inversion import (
        combined,
        inversion_source,
        row_shapes,
        save_embeddings,
        with_placeholder,
    )
    from diffuse_jax.training.latent import loss_of, networks, save_networks, with_tokens
    from diffuse_jax.training.latent_model import configured_from, pipeline_from, save_rest
    from diffuse_jax.training.loop import fit
    from diffuse_jax.training.objective import objective_from
    from diffuse_jax.training.settings import (
        DeviceSettings,
        InversionSettings,
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
    word = settings_from(args, InversionSettings)
    images = inversion_source(word, data)
    learned, shown = settings_from(args, ObjectiveSettings), settings_from(args, ValidationSettings)
    mesh = mesh_from(settings_from(args, DeviceSettings))
    check_output(run, data.caches.data_cache_dir)
    plan = configured_from(model, "textual inversion")
    shapes = {"text_encoder": row_shapes(word, plan)}
    checked_source(
        run, model, data, learned, mesh, plan, trainable=shapes, shown=shown, source=images, times=word.repeats
    )
    pipe, rows = with_placeholder(word, pipeline_from(model, mesh, float32=()))

    inputs = inputs_from(data, model, pipe, trained=("text_encoder",), source=images, times=word.repeats)
    objective = objective_from(learned, pipe.scheduler)
    fit(
        run,
        mesh,
        trainable={"text_encoder": rows},
        frozen={name: params for name, params in pipe.params.items() if name not in inputs.unused},
        loss=loss_of(pipe, with_tokens(networks(pipe)), objective),
        batches=batches_from(data, run.batch, mesh, inputs.finish, source=inputs.source, pixels=inputs.pixels),
        export=functools.partial(save_embeddings, word.placeholder_token),
        validate=validation_from(shown, model, pipe, functools.partial(combined, pipe), run.seed),
        finish=functools.partial(save_pipeline, model, pipe, run.output_dir) if word.save_as_full_pipeline else None,
        config=vars(args),
    )
    print(run.output_dir)
    push_to_hub(run.upload, run.output_dir)


def save_pipeline(model: ModelSettings, pipe: DiffusionPipeline, output_dir: str | Path, trained: Params) -> None:
    """The whole pipeline with the new word; all processes must call it."""
    full, folder = readable(combined(pipe, trained)), Path(output_dir)
    if jax.process_index() == 0:
        save_networks(pipe, folder, full)
        pipe.components["tokenizer"].save_pretrained(folder / "tokenizer")
        save_rest(model, pipe, folder, trained=("text_encoder", "tokenizer"))


if __name__ == "__main__":
    train(main)
