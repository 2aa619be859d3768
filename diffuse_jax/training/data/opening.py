"""Opening the data set, the transform and the batches that the settings describe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffuse_jax.messages import warn
from diffuse_jax.training.batches import Batches
from diffuse_jax.training.data import hub
from diffuse_jax.training.data.buckets import assign, bucket_sizes
from diffuse_jax.training.data.hub import Stream
from diffuse_jax.training.data.loader import Finish, Loader, Maker, process_rows
from diffuse_jax.training.data.order import Bucketed, Mixed, Plain, shares
from diffuse_jax.training.data.rescaling import Rescaled
from diffuse_jax.training.data.settings import DataSettings, ImageSettings
from diffuse_jax.training.data.shards import shard_source
from diffuse_jax.training.data.sources import FolderSource, Joined, Source, sample
from diffuse_jax.training.data.transform import Size, Transform
from diffuse_jax.training.settings import BatchSettings

if TYPE_CHECKING:  # worker processes import this module, and need no JAX for it
    from jax.sharding import Mesh


def check_named(data: DataSettings) -> None:
    """Check that the settings name exactly one data set.

    Raises:
      ValueError: they do not; the message names the flags.
    """
    sources = {f"--{name}": getattr(data, name) for name in ("train_data_dir", "dataset_name", "train_shards")}
    given = [name for name, value in sources.items() if value]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(sources)}; got {' and '.join(given) or 'none'}")
    if data.load_from_disk and not data.train_data_dir:
        raise ValueError("--load_from_disk reads the folder --train_data_dir, which is missing")
    if data.dataset_config_name and not data.dataset_name:
        raise ValueError("--dataset_config_name needs --dataset_name")
    if data.streaming and not data.dataset_name:
        raise ValueError("--streaming reads --dataset_name; local folders and shards are read lazily as they are")


def check_sides(images: ImageSettings, multiple: int) -> None:
    """Refuse image sizes that the model does not support.

    Raises:
      ValueError: the sides are not multiples of ``multiple`` pixels.
    """
    name = "bucket_step" if images.aspect_ratio_buckets else "resolution"
    if getattr(images, name) % multiple:
        raise ValueError(f"--{name} must be a multiple of {multiple} for this model, got {getattr(images, name)}")


def warn_of_size(images: ImageSettings, native: int | Sequence[int] | None) -> None:
    """Warn if the training resolution is not the native resolution of the model.

    Args:
      images: the image settings of the training.
      native: height and width of the model's images in pixels, or one number for both; None if unknown.
    """
    sides = (native, native) if isinstance(native, int) else native
    if sides is not None and tuple(sides) != (images.resolution,) * 2:
        warn(
            f"--resolution {images.resolution} is not the size of this model's images, {sides[0]} x {sides[1]} pixels "
            "by its sample_size; use that as --resolution, unless the model should learn another size"
        )


def source_from(data: DataSettings) -> Source:
    """Open the data set for random access.

    Raises:
      ValueError: no data set or several are named, columns are missing, or captions are not strings.
      FileNotFoundError: files are missing.
    """
    check_named(data)
    others = data.conditioning_image_column, data.mask_column
    columns = data.image_column, data.caption_column, *others
    source: Source
    if data.train_shards:
        source = shard_source([str(path) for path in data.train_shards], data.caption_column, *others)
    elif data.dataset_name:
        table = hub.load(str(data.dataset_name), data.dataset_config_name, cache_dir=data.cache_dir)
        source = hub.TableSource(table, *columns)
    else:
        opened = [_folder(data, folder, columns) for folder in data.folders]
        source = opened[0] if len(opened) == 1 else Joined(opened)
    return source if data.max_train_samples is None else sample(source, data.max_train_samples, data.seed)


def _folder(data: DataSettings, folder: str | Path, columns: Sequence[str | None]) -> Source:
    """One folder of ``train_data_dir``; ``columns`` are those of images, captions, control images and masks."""
    image, *others = columns
    if data.load_from_disk:
        return hub.TableSource(hub.load_saved(folder), str(image), *others)
    return FolderSource(folder, *others)


def lengths_of(source: Source) -> tuple[int, ...]:
    """The number of rows of each data set of a source."""
    return source.lengths if isinstance(source, Joined) else (len(source),)


def counts_from(data: DataSettings, source: Source) -> tuple[int, ...]:
    """The number of examples of each data set of a source in an epoch."""
    lengths = lengths_of(source)
    if data.data_repeats is not None:
        return tuple(length * times for length, times in zip(lengths, data.data_repeats, strict=True))
    return lengths if data.data_weights is None else shares(data.data_weights, sum(lengths))


def order_from(data: DataSettings, source: Source, rows: int) -> Plain | Bucketed | Mixed:
    """The rows of each batch of ``rows`` examples, with the buckets and shares of the settings."""
    counts, lengths = counts_from(data, source), lengths_of(source)
    buckets = buckets_from(data, source)
    if buckets is not None:
        times = np.repeat(np.array(counts) // np.array(lengths), lengths)
        members = [np.repeat(members, times[members]) for _, members in buckets]
        return Bucketed(data.seed, members, [size for size, _ in buckets], rows)
    return Plain(data.seed, len(source), rows) if counts == lengths else Mixed(data.seed, lengths, counts, rows)


def stream_from(data: DataSettings) -> Stream:
    """Open the data set for ``streaming``; errors as for :func:`source_from`."""
    check_named(data)
    assert data.dataset_name  # check_named
    return Stream(
        hub.load(str(data.dataset_name), data.dataset_config_name, streaming=True, cache_dir=data.cache_dir),
        image_column=data.image_column,
        caption_column=data.caption_column,
        conditioning_column=data.conditioning_image_column,
        mask_column=data.mask_column,
        seed=data.seed,
        window=data.shuffle_buffer_size,
        count=data.max_train_samples,
    )


def transform_from(data: DataSettings, *, crop_size: int | None = None, pixels: bool = True) -> Transform:
    """The transform from records to examples; ``crop_size`` and ``pixels`` as for :func:`batches_from`."""
    return Transform(
        resolution=data.images.resolution,
        crop_size=crop_size,
        center_crop=data.images.center_crop,
        random_flip=data.images.random_flip,
        interpolation=data.images.image_interpolation_mode,
        empty_share=data.proportion_empty_prompts,
        dropout=data.conditioning_dropout_prob,
        tags=data.tags,
        pixels=pixels,
        conditioning=data.conditioning,
        seed=data.seed,
    )


def buckets_from(data: DataSettings, source: Source) -> list[tuple[Size, np.ndarray]] | None:
    """The sizes and rows of the aspect-ratio buckets; None without ``aspect_ratio_buckets``."""
    images = data.images
    if not images.aspect_ratio_buckets:
        return None
    sizes = bucket_sizes(images.resolution, images.bucket_step, images.bucket_max_aspect)
    return assign(source, sizes, data.caches.data_cache_dir)


def batches_from(
    data: DataSettings,
    batch: BatchSettings,
    mesh: Mesh,
    finish: Finish,
    *,
    source: Source | None = None,
    crop_size: int | None = None,
    pixels: bool = True,
    cell: int | None = None,
) -> Batches:
    """The batches of a run: for each training step, the rows that this process provides.

    Args:
      data: the data set and how its images are prepared.
      batch: the number of images per training step.
      mesh: the batch is divided along the ``data`` and ``fsdp`` axes of this mesh.
      finish: makes the arrays of one :class:`~diffuse_jax.training.data.transform.Example`, such as token ids and
        pixels. It runs in worker processes, so it must be picklable (a module-level function, or a
        ``functools.partial`` of one) and must not use JAX.
      source: a source to use instead of the data set that ``data`` names.
      crop_size: size of the square crops, taken after the shorter side has been resized to ``resolution``; None for
        ``resolution``.
      pixels: False skips reading images, for a ``finish`` that takes latents from a cache.
      cell: give images random sizes, see :class:`~diffuse_jax.training.data.rescaling.Rescaled`; None for their own.

    Returns:
      An iterator whose ``total`` is the number of examples in an epoch (None for a stream of unknown length).

    Raises:
      ValueError: a step has more examples than the data set, or as for :func:`source_from`.
    """
    transform = transform_from(data, crop_size=crop_size, pixels=pixels)
    rows = batch.images_per_step(mesh)
    mine = process_rows(mesh, batch.gradient_accumulation_steps, batch.images_per_part(mesh))
    if data.streaming and source is None:
        return _streamed(data, batch, mesh, transform, finish, mine)
    source = source_from(data) if source is None else source
    order = order_from(data, source, rows)
    check_batch(batch, mesh, order.total)
    sized = transform if cell is None else Rescaled(transform, cell)
    return Loader(Maker(source, sized, order, mine, finish), data.dataloader_num_workers)


def _streamed(
    data: DataSettings, batch: BatchSettings, mesh: Mesh, transform: Transform, finish: Finish, mine: np.ndarray
) -> Batches:
    """The batches of a stream; processes that provide the same rows of a batch read the same share."""
    from diffuse_jax.training.data.stream import StreamLoader

    stream = stream_from(data)
    if stream.count is not None:
        check_batch(batch, mesh, stream.count)
    shares = batch.images_per_step(mesh) // len(mine)
    part = int(mine[0]) // (batch.images_per_part(mesh) // shares)
    stream = dataclasses.replace(stream, part=part, parts=shares)
    return StreamLoader(stream, transform, finish, len(mine), data.dataloader_num_workers)


def check_first(data: DataSettings, source: Source) -> None:
    """Make an example of the first row, since what is wrong with all rows is wrong with it.

    Raises:
      FileNotFoundError: its image is missing.
      ValueError: its image cannot be read.
    """
    transform_from(data).fixed(source[0], 0)


def check_batch(batch: BatchSettings, mesh: Mesh, total: int) -> None:
    """Check that a training step has no more examples than the data set, which has ``total``.

    Raises:
      ValueError: it has; the message names the flags.
    """
    rows = batch.images_per_step(mesh)
    if rows > total:
        raise ValueError(
            f"a training step takes {rows} examples (--train_batch_size {batch.train_batch_size} on "
            f"{batch.images_per_part(mesh) // batch.train_batch_size} devices, --gradient_accumulation_steps "
            f"{batch.gradient_accumulation_steps}), but the data set has {total}; use a smaller batch"
        )
