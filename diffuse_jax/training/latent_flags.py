"""Flags that all trainers of latent text-to-image models have, and what they describe."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from diffuse_jax import weights
from diffuse_jax.adapters import lora
from diffuse_jax.models import Params
from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.schedulers import Scheduler
from diffuse_jax.training.arguments import PRECISIONS, add_objective, make_parser, remat_from
from diffuse_jax.training.flags import Parser
from diffuse_jax.training.latent import component_folder, family_of, open_pipeline, sample_pictures


def latent_parser(description: str | None, output_dir: str, *, text_encoders: bool = True, **defaults: Any) -> Parser:
    """The shared flags of :func:`~diffuse_jax.training.arguments.make_parser` and those of latent models.

    Args:
      description, output_dir, defaults: as there.
      text_encoders: whether the script can train them beside the UNet.
    """
    parser = make_parser(description, output_dir)
    add = parser.group("model")
    add("--pretrained_model_name_or_path", required=True, help="Stable Diffusion 1.x, 2.x or XL: a folder or a Hub id")
    add("--pretrained_vae_model_name_or_path", help="folder or Hub id whose vae/ replaces the pipeline's")
    add("--prediction_type", choices=("epsilon", "v_prediction", "sample"), help="instead of the scheduler's")
    if text_encoders:
        add("--train_text_encoder", action="store_true", help="train the text encoders together with the UNet")
        add("--text_encoder_lr", type=float, help="their highest learning rate, if not --learning_rate")
    add = parser.group("monitoring")
    add("--validation_prompt", "--validation_prompts", nargs="+", help="make pictures of these prompts while training")
    add("--num_validation_images", type=int, default=4, help="pictures per prompt")
    add("--validation_inference_steps", type=int, default=25, help="sampling steps of such a picture")
    add("--validation_guidance_scale", type=float, default=7.5, help="guidance of such a picture")
    add_objective(parser)
    parser.set_defaults(**defaults)
    return parser


def hub_options(args: argparse.Namespace) -> dict[str, Any]:
    """Where on the Hub a model is looked for."""
    return {name: getattr(args, name) for name in ("revision", "variant", "cache_dir")} | {"token": args.hub_token}


def source_folder(args: argparse.Namespace) -> Path:
    """The local folder of the model to start from."""
    return weights.resolve(args.pretrained_model_name_or_path, **hub_options(args))


def trained_names(args: argparse.Namespace) -> tuple[str, ...]:
    """The networks that are trained.

    Raises:
      ValueError: text encoders have a learning rate but are not trained.
    """
    if not args.train_text_encoder:
        if args.text_encoder_lr is not None:
            raise ValueError(f"--text_encoder_lr {args.text_encoder_lr:g} has no use without --train_text_encoder")
        return ("unet",)
    index = weights.read_index(source_folder(args))
    encoders = family_of(index.class_name, args.pretrained_model_name_or_path).encoders
    return ("unet", *(name for name in encoders if name in index.components))


def pipeline_from(args: argparse.Namespace, mesh: Mesh, float32: Sequence[str]) -> DiffusionPipeline:
    """The pipeline that the flags describe; the networks named in ``float32`` keep that precision."""
    pipe = open_pipeline(
        args.pretrained_model_name_or_path,
        trainable=float32,
        mesh=mesh,
        dtype=PRECISIONS[args.mixed_precision],
        vae_source=args.pretrained_vae_model_name_or_path,
        prediction_type=args.prediction_type,
        **hub_options(args),
    )
    unet = pipe.components["unet"].clone(remat=remat_from(args))
    return pipe.replace(unet=(unet, pipe.params["unet"]))


def component_from(args: argparse.Namespace, pipe: DiffusionPipeline, name: str) -> tuple[Any, Params]:
    """A network of the pipeline with parameters that this process can use alone."""
    model = pipe.components[name]
    if jax.process_count() == 1:
        return model, pipe.params[name]
    replaced = args.pretrained_vae_model_name_or_path if name == "vae" else None
    folder = component_folder(replaced or args.pretrained_model_name_or_path, name, **hub_options(args))
    return model, type(model).from_pretrained(folder, dtype=model.dtype, variant=args.variant)[1]


def save_rest(args: argparse.Namespace, pipe: DiffusionPipeline, trained: Iterable[str]) -> None:
    """Complete the trained networks in ``output_dir`` to a pipeline: every other file of the source, as it is there.

    The scheduler stays the source's sampler, with the prediction type that was trained. ``model_index.json`` comes
    last; it leaves out what the source names but does not hold.
    """
    source, folder = source_folder(args), Path(args.output_dir)
    index, kept, vae = weights.read_index(source), set(trained), args.pretrained_vae_model_name_or_path
    for name, entry in index.components.items():
        if entry.folder.is_dir() and name not in kept:
            own = component_folder(vae, name, **hub_options(args)) if vae and name == "vae" else entry.folder
            copy_component(own, folder / name, args.variant)
            kept.add(name)
    sampler = Scheduler.from_pretrained(source, subfolder="scheduler")
    sampler.replace(prediction_type=pipe.scheduler.prediction_type).save_pretrained(folder / "scheduler")
    entries: dict[str, tuple[str | None, str | None]] = dict.fromkeys(index.absent, (None, None))
    for name, entry in index.components.items():
        entries[name] = (entry.library, entry.class_name) if name in kept else (None, None)
    weights.write_index(folder, index.class_name, entries, index.options)


def copy_component(source: Path, target: Path, variant: str | None = None) -> None:
    """Copy the files of a component; other weights that lie there go. A folder that is copied onto itself stays.

    Files of a variant lose its name where there are no others: the trained networks beside them have none.
    """
    if not (target.is_dir() and target.samefile(source)):
        for old in target.glob("*"):
            if old.suffix in (".safetensors", ".bin", ".msgpack") or ".index." in old.name:
                old.unlink()
        shutil.copytree(source, target, dirs_exist_ok=True)
    for path in target.glob(f"*.{variant}[.-]*") if variant else ():
        plain = path.with_name(path.name.replace(f".{variant}", "", 1))
        if not plain.exists():
            if path.suffix == ".json":  # an index, with the names of shards in it
                path.write_text(path.read_text(encoding="utf-8").replace(f".{variant}-", "-"), encoding="utf-8")
            path.rename(plain)


def validation_from(
    args: argparse.Namespace, pipe: DiffusionPipeline, merged: Callable[[Any], Mapping[str, Params]]
) -> Callable[[Any], list[tuple[str, Any]]] | None:
    """Makes the pictures of ``--validation_prompt``, None without one.

    Args:
      pipe: its networks, tokenizers and frozen parameters are used.
      merged: trained numbers -> parameters of the networks that they change.

    Raises:
      ValueError: pictures cannot be made in so many steps, or none are asked for.
    """
    if not args.validation_prompt:
        return None
    if args.num_validation_images < 1:
        raise ValueError(f"--num_validation_images must be at least 1, got {args.num_validation_images}")
    sampler = Scheduler.from_pretrained(source_folder(args), subfolder="scheduler")
    sampler = sampler.replace(prediction_type=pipe.scheduler.prediction_type)
    sampler.plan(args.validation_inference_steps)  # what it refuses would else end the run at its first pictures

    def validate(trained: Any) -> list[tuple[str, Any]]:
        changed = {name: (pipe.components[name], params) for name, params in merged(trained).items()}
        return sample_pictures(
            pipe.replace(scheduler=sampler, **changed),
            args.validation_prompt,
            num_images_per_prompt=args.num_validation_images,
            num_inference_steps=args.validation_inference_steps,
            guidance_scale=args.validation_guidance_scale,
            seed=args.seed,
        )

    return validate


def add_lora(parser: Parser) -> None:
    """The flags of low-rank adaptation."""
    add = parser.group("LoRA")
    add("--rank", type=int, default=4, help="inner dimension of the pairs")
    add("--lora_targets", default=lora.TARGETS, help="regular expression: paths of the dense layers that get a pair")


def lora_from(args: argparse.Namespace, pipe: DiffusionPipeline) -> dict[str, Params]:
    """Fresh pairs for the UNet and, with ``--train_text_encoder``, the text encoders."""
    names = trained_names(args)
    keys = jax.random.split(jax.random.key(args.seed), len(names))
    return {
        name: lora.init(pipe.components[name].shapes(), args.rank, key, args.lora_targets)
        for name, key in zip(names, keys, strict=True)
    }


def merged_lora(pipe: DiffusionPipeline) -> Callable[[Any], dict[str, Params]]:
    """Pairs -> parameters of the networks that they change."""
    return lambda pairs: {name: lora.merge(pipe.params[name], own) for name, own in pairs.items()}
