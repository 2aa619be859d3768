"""The flags of a training script that concern its data, and what they describe."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffuse_jax.training.batches import Batches
from diffuse_jax.training.data import hub
from diffuse_jax.training.data.buckets import assign, bucket_sizes
from diffuse_jax.training.data.hub import Stream
from diffuse_jax.training.data.loader import Finish, Loader, Maker, process_rows
from diffuse_jax.training.data.order import Bucketed, Plain
from diffuse_jax.training.data.shards import shard_source
from diffuse_jax.training.data.sources import FolderSource, Source, sample
from diffuse_jax.training.data.transform import INTERPOLATIONS, Size, Transform
from diffuse_jax.training.flags import Parser

if TYPE_CHECKING:  # worker processes import this module, and need no JAX for it
    from jax.sharding import Mesh


def add_data(parser: Parser, *, captions: bool = True, caches: bool = False, **defaults: Any) -> None:
    """The flag groups "data" and "pictures".

    Args:
      parser: where they are added.
      captions: False leaves out what concerns captions.
      caches: True adds ``--cache_latents`` and ``--cache_text_embeddings``.
      defaults: instead of those below.
    """
    add = parser.group("data")
    add("--train_data_dir", default=None, help="image folder; captions in metadata.jsonl")
    add("--dataset_name", default=None, help="data set of the Hub, or a local folder that `datasets` reads")
    add("--dataset_config_name", default=None, help="configuration of that data set")
    add("--train_shards", nargs="+", default=None, help='.tar (WebDataset) or .array_record files: "a-{000..127}.tar"')
    add("--load_from_disk", action="store_true", help="--train_data_dir was written by save_to_disk of `datasets`")
    add("--streaming", action="store_true", help="read --dataset_name while training instead of downloading it first")
    add("--shuffle_buffer_size", type=int, default=1000, help="rows that are shuffled with each other when streaming")
    add("--image_column", default="image", help="column of the pictures (not of image folders and shards)")
    if captions:
        add("--caption_column", default="text", help="column of the caption, or of a list of captions to draw from")
        add("--proportion_empty_prompts", type=float, default=0.0, help="share of captions replaced by the empty text")
    add("--max_train_samples", type=int, default=None, help="use so many pictures, drawn by --seed")
    add("--dataloader_num_workers", type=int, default=0, help="processes that make batches; 0: threads of this one")
    if caches:
        add("--cache_latents", action="store_true", help="encode every picture once, its middle, and train from that")
        add("--cache_text_embeddings", action="store_true", help="encode every caption once and train from that")
    add("--data_cache_dir", help="where such caches and the sizes of pictures are kept; OUTPUT/cache if left out")
    add = parser.group("pictures")
    add("--resolution", type=int, default=512, help="width and height of the training pictures, in pixels")
    add("--center_crop", action="store_true", help="cut the square out of the middle instead of a random place")
    add("--random_flip", action="store_true", help="mirror half of the pictures")
    add("--image_interpolation_mode", default="bilinear", choices=INTERPOLATIONS, help="how pictures are resized")
    add("--aspect_ratio_buckets", action="store_true", help="batches of like proportions and about resolution^2 pixels")
    add("--bucket_step", type=int, default=64, help="sides of the buckets are multiples of this")
    add("--bucket_max_aspect", type=float, default=2.0, help="longer side over shorter side of the longest bucket")
    parser.set_defaults(**defaults)


def check_data(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together.

    Raises:
      ValueError: naming them.
    """
    sources = {f"--{name}": getattr(args, name) for name in ("train_data_dir", "dataset_name", "train_shards")}
    given = [name for name, value in sources.items() if value]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(sources)}; got {' and '.join(given) or 'none'}")
    if args.load_from_disk and not args.train_data_dir:
        raise ValueError("--load_from_disk reads the folder --train_data_dir, which is missing")
    if args.dataset_config_name and not args.dataset_name:
        raise ValueError("--dataset_config_name needs --dataset_name")
    if args.max_train_samples is not None and args.max_train_samples < 1:
        raise ValueError(f"--max_train_samples must be at least 1, got {args.max_train_samples}")
    if args.streaming:
        _check_streaming(args)
    _check_examples(args)


def _check_examples(args: argparse.Namespace) -> None:
    if not 0 <= getattr(args, "proportion_empty_prompts", 0.0) <= 1:
        raise ValueError(f"--proportion_empty_prompts must be between 0 and 1, got {args.proportion_empty_prompts}")
    if args.resolution < 1:
        raise ValueError(f"--resolution must be at least 1, got {args.resolution}")
    if args.dataloader_num_workers < 0:
        raise ValueError(f"--dataloader_num_workers must be 0 or more, got {args.dataloader_num_workers}")
    if getattr(args, "cache_latents", False) and args.random_flip:
        raise ValueError("--cache_latents keeps one version of each picture; leave out --random_flip")


def check_sides(args: argparse.Namespace, multiple: int) -> None:
    """Refuse sizes of pictures that an autoencoder cannot take.

    Raises:
      ValueError: the sides are not multiples of ``multiple`` pixels.
    """
    name = "bucket_step" if args.aspect_ratio_buckets else "resolution"
    if getattr(args, name) % multiple:
        raise ValueError(f"--{name} must be a multiple of {multiple} for this autoencoder, got {getattr(args, name)}")


def _check_streaming(args: argparse.Namespace) -> None:
    if not args.dataset_name:
        raise ValueError("--streaming reads --dataset_name; local folders and shards are read lazily as they are")
    if args.max_train_samples is None and args.max_train_steps is None:
        raise ValueError(
            "--streaming: the length of an epoch is not known; give --max_train_samples, or --max_train_steps instead "
            "of epochs"
        )
    for flag in ("aspect_ratio_buckets", "cache_latents", "cache_text_embeddings"):
        if getattr(args, flag, False):
            raise ValueError(f"--{flag} has to see all pictures before training; leave out --streaming")
    if args.shuffle_buffer_size < 1:
        raise ValueError(f"--shuffle_buffer_size must be at least 1, got {args.shuffle_buffer_size}")


def source_from(args: argparse.Namespace) -> Source:
    """The data set that the flags describe, whose rows can be read in any order.

    Raises:
      ValueError: flags do not go together, columns are missing, captions are not texts.
      FileNotFoundError: files are missing.
    """
    check_data(args)
    caption_column = getattr(args, "caption_column", None)
    source: Source
    if args.train_shards:
        source = shard_source(args.train_shards, caption_column)
    elif args.dataset_name or args.load_from_disk:
        if args.load_from_disk:
            table = hub.load_saved(args.train_data_dir)
        else:
            table = hub.load(args.dataset_name, args.dataset_config_name, cache_dir=getattr(args, "cache_dir", None))
        source = hub.TableSource(table, args.image_column, caption_column)
    else:
        source = FolderSource(args.train_data_dir, caption_column)
    return source if args.max_train_samples is None else sample(source, args.max_train_samples, args.seed)


def stream_from(args: argparse.Namespace) -> Stream:
    """The same for ``--streaming``."""
    check_data(args)
    return Stream(
        hub.load(
            args.dataset_name, args.dataset_config_name, streaming=True, cache_dir=getattr(args, "cache_dir", None)
        ),
        image_column=args.image_column,
        caption_column=getattr(args, "caption_column", None),
        seed=args.seed,
        window=args.shuffle_buffer_size,
        count=args.max_train_samples,
    )


def transform_from(args: argparse.Namespace, *, crop_size: int | None = None, pixels: bool = True) -> Transform:
    """How the flags make examples from records; ``crop_size`` and ``pixels`` as of :func:`batches_from`."""
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


def cache_dir_from(args: argparse.Namespace) -> Path:
    """The folder of encoded pictures and captions."""
    return Path(getattr(args, "data_cache_dir", None) or Path(args.output_dir) / "cache")


def buckets_from(args: argparse.Namespace, source: Source) -> list[tuple[Size, np.ndarray]] | None:
    """Sizes and rows of the aspect-ratio buckets; None without ``--aspect_ratio_buckets``."""
    if not args.aspect_ratio_buckets:
        return None
    sizes = bucket_sizes(args.resolution, args.bucket_step, args.bucket_max_aspect)
    return assign(source, sizes, cache_dir_from(args))


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
      args: with the flags of :func:`add_data`, and ``--seed``, ``--train_batch_size``, ``--output_dir``,
        ``--max_train_steps``, ``--gradient_accumulation_steps``.
      mesh: the batch is divided along its ``data`` and ``fsdp`` axes.
      finish: makes the arrays of one :class:`~diffuse_jax.training.data.transform.Example`, such as token ids and
        pixels. It runs in the worker processes, so it must pickle: a function of a module or a ``functools.partial``
        of one, without JAX in it.
      source: instead of the one that the flags describe.
      crop_size: squares of this size are cut out, after the shorter side was resized to ``--resolution``.
      pixels: False leaves the pictures unread, for a ``finish`` that takes latents from a cache.

    Returns:
      An iterator whose ``total`` is the number of examples in an epoch (None for a stream of unknown length).

    Raises:
      ValueError: an update has more examples than the data set, or as :func:`source_from`.
    """
    _check_examples(args)
    transform = transform_from(args, crop_size=crop_size, pixels=pixels)
    parts = args.gradient_accumulation_steps
    rows = args.train_batch_size * mesh.shape["data"] * mesh.shape["fsdp"]
    mine = process_rows(mesh, parts, rows)
    if args.streaming and source is None:
        return _streamed(args, stream_from(args), transform, finish, mine, parts * rows)
    source = source_from(args) if source is None else source
    _check_batch(args, rows, len(source))
    buckets = buckets_from(args, source)
    order: Plain | Bucketed = Plain(args.seed, len(source), parts * rows)
    if buckets is not None:
        order = Bucketed(args.seed, [members for _, members in buckets], [size for size, _ in buckets], parts * rows)
    return Loader(Maker(source, transform, order, mine, finish), args.dataloader_num_workers)


def _streamed(
    args: argparse.Namespace, stream: Stream, transform: Transform, finish: Finish, mine: np.ndarray, rows: int
) -> Batches:
    """Batches of a stream. Processes that hold the same rows of a batch read the same share."""
    from diffuse_jax.training.data.stream import StreamLoader

    if stream.count is not None:
        _check_batch(args, rows // args.gradient_accumulation_steps, stream.count)
    shares = rows // len(mine)
    part = int(mine[0]) // (rows // args.gradient_accumulation_steps // shares)
    stream = dataclasses.replace(stream, part=part, parts=shares)
    return StreamLoader(stream, transform, finish, len(mine), args.dataloader_num_workers)


def _check_batch(args: argparse.Namespace, rows: int, total: int) -> None:
    parts = args.gradient_accumulation_steps
    if parts * rows > total:
        raise ValueError(
            f"an update takes {parts * rows} examples (--train_batch_size {args.train_batch_size} on "
            f"{rows // args.train_batch_size} devices, --gradient_accumulation_steps {parts}), but the data set has "
            f"{total}; use a smaller batch"
        )
