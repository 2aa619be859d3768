"""The flags of a training script that concern its data, and what they describe."""

from __future__ import annotations

import argparse
from typing import Any

from jax.sharding import Mesh

from diffuse_jax.training.batches import Batches
from diffuse_jax.training.data.loader import Finish, Loader, Maker, process_rows
from diffuse_jax.training.data.order import Plain
from diffuse_jax.training.data.sources import FolderSource, Source, sample
from diffuse_jax.training.data.transform import INTERPOLATIONS, Transform


def add_data(parser: argparse.ArgumentParser, *, captions: bool = True, **defaults: Any) -> None:
    """The flag group "data"; ``captions=False`` leaves out what concerns captions."""
    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", default=None, help="image folder; with captions in metadata.jsonl")
    add("--max_train_samples", type=int, default=None, help="use so many pictures, drawn by --seed")
    if captions:
        add("--caption_column", default="text", help="column of the caption, or of a list of captions to draw from")
        add("--proportion_empty_prompts", type=float, default=0.0, help="share of captions replaced by the empty text")
    add("--dataloader_num_workers", type=int, default=0, help="processes that make batches; 0: threads of this one")
    add = parser.add_argument_group("pictures").add_argument
    add("--resolution", type=int, default=512, help="width and height of the training pictures, in pixels")
    add("--center_crop", action="store_true", help="cut the square out of the middle instead of a random place")
    add("--random_flip", action="store_true", help="mirror half of the pictures")
    add("--image_interpolation_mode", default="bilinear", choices=INTERPOLATIONS, help="how pictures are resized")
    parser.set_defaults(**defaults)


def source_from(args: argparse.Namespace) -> Source:
    """The data set that the flags describe."""
    source: Source = FolderSource(args.train_data_dir, getattr(args, "caption_column", None))
    return source if args.max_train_samples is None else sample(source, args.max_train_samples, args.seed)


def transform_from(args: argparse.Namespace, *, crop_size: int | None = None, pixels: bool = True) -> Transform:
    """How the flags make examples from records."""
    return Transform(
        resolution=args.resolution,
        crop_size=crop_size,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        interpolation=args.image_interpolation_mode,
        empty_share=getattr(args, "proportion_empty_prompts", 0.0),
        pixels=pixels,
        seed=args.seed,
    )


def batches_from(
    args: argparse.Namespace,
    mesh: Mesh,
    finish: Finish,
    *,
    source: Source | None = None,
    crop_size: int | None = None,
    pixels: bool = True,
) -> Batches:
    """The batches that the flags describe: of each update, the rows that this process provides.

    Args:
      args: with the flags of :func:`add_data`, and ``--seed``, ``--train_batch_size``,
        ``--gradient_accumulation_steps``.
      mesh: the batch is divided along its ``data`` and ``fsdp`` axes.
      finish: makes the arrays of one :class:`~diffuse_jax.training.data.transform.Example`, such as token ids and
        pixels. It runs in the worker processes, so it must pickle: a function of a module or a ``functools.partial``
        of one, without JAX in it.
      source: instead of the one that the flags describe.
      crop_size: squares of this size are cut out, after the shorter side was resized to ``--resolution``.
      pixels: False leaves the pictures unread, for a ``finish`` that takes latents from a cache.

    Raises:
      ValueError: an update has more examples than the data set.
    """
    source = source_from(args) if source is None else source
    parts = args.gradient_accumulation_steps
    rows = args.train_batch_size * mesh.shape["data"] * mesh.shape["fsdp"]
    if parts * rows > len(source):
        raise ValueError(
            f"an update takes {parts * rows} examples (--train_batch_size {args.train_batch_size} on "
            f"{rows // args.train_batch_size} devices, --gradient_accumulation_steps {parts}), but the data set has "
            f"{len(source)}; use a smaller batch"
        )
    transform = transform_from(args, crop_size=crop_size, pixels=pixels)
    order = Plain(args.seed, len(source), parts * rows)
    maker = Maker(source, transform, order, process_rows(mesh, parts, rows), finish)
    return Loader(maker, args.dataloader_num_workers)
