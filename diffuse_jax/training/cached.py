"""The inputs of a text-to-image model's networks: computed in every training step, or cached once before the run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.models import Params
from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.training.batches import Batch
from diffuse_jax.training.data import (
    DataSettings,
    Example,
    Source,
    buckets_from,
    cache_captions,
    cache_images,
    check_sides,
    fingerprint_params,
    source_from,
    transform_from,
)
from diffuse_jax.training.data.sources import Record
from diffuse_jax.training.families import tokens_of, trained_family
from diffuse_jax.training.families.base import PIXELS
from diffuse_jax.training.latent import finish
from diffuse_jax.training.latent_model import component_from
from diffuse_jax.training.settings import ModelSettings

PIXELS_AT_ONCE = 2**21
"""Number of pixels that are encoded in one call: eight images of 512 x 512."""


class Inputs(NamedTuple):
    """How examples become batches.

    Attributes:
      source: the data set; None for the stream that the settings describe.
      finish: makes the arrays of one example.
      pixels: whether ``finish`` needs the pixels of the image.
      unused: networks that the run no longer needs, because their outputs are cached.
    """

    source: Source | None
    finish: Callable[[Example], Batch]
    pixels: bool
    unused: tuple[str, ...]


class RepeatedSource:
    """Another source repeated several times, so that even a handful of images fills a batch."""

    def __init__(self, source: Source, times: int) -> None:
        self._source, self._times = source, times
        self.fingerprint = f"{source.fingerprint}-{times}"

    def __len__(self) -> int:
        return len(self._source) * self._times

    def __getitem__(self, index: int) -> Record:
        return self._source[index % len(self._source)]


def inputs_from(
    data: DataSettings,
    model: ModelSettings,
    pipe: DiffusionPipeline,
    *,
    trained: Sequence[str],
    source: Source | None = None,
    times: int = 1,
    true_sizes: bool = True,
    masked: bool | None = None,
) -> Inputs:
    """The data source of a run and the function that makes the networks' inputs from it, with caches where requested.

    Args:
      data: the data set, and what to cache.
      model: where the pipeline was loaded from.
      pipe: the pipeline to train.
      trained: names of the networks that are trained.
      source: a source to use instead of the one that the settings describe.
      times: number of times the source is repeated.
      true_sizes: whether SDXL's micro-conditioning is the true original size and crop of each image; otherwise every
        image counts as uncropped and as having the target size.
      masked: whether examples have masks, which become ``loss_mask [h,w]``; if None, they do with a column of masks.

    Raises:
      ValueError: an output of a trained network would be cached, or the autoencoder does not support the image size.
    """
    check_inputs(data, pipe, trained)
    family = trained_family(pipe)
    masked = data.mask_column is not None if masked is None else masked
    words, arrays = family.words(pipe), arrays_of(pipe, true_sizes, masked)
    if source is None and data.streaming:
        return Inputs(None, functools.partial(finish, words, arrays, None, None), True, ())

    rows = source_from(data) if source is None else source
    images = image_cache(data, model, pipe, rows, true_sizes, masked) if data.caches.cache_latents else None
    texts = text_cache(data, model, pipe, rows) if data.caches.cache_text_embeddings else None
    make = functools.partial(finish, words, arrays, images, texts)
    unused = [*(family.image_encoders if images else []), *(family.text_encoders(pipe) if texts else [])]
    if times > 1:
        make = functools.partial(finish_repeated, make, len(rows))
        rows = RepeatedSource(rows, times)
    return Inputs(rows, make, images is None, tuple(unused))


def check_inputs(data: DataSettings, pipe: DiffusionPipeline, trained: Iterable[str]) -> None:
    """Check that the images and caches suit the networks, by their configurations.

    Raises:
      ValueError: an output of a trained network would be cached, the model does not support the image size or masks, or
        it has no text encoder.
    """
    family = trained_family(pipe)
    family.words(pipe)
    if data.mask_column is not None and family.cell(pipe) is None:
        raise ValueError(
            f"--mask_column cannot be used with {type(pipe).__name__}: its samples are embeddings of whole images"
        )
    if data.caches.cache_text_embeddings and set(family.text_encoders(pipe)) & set(trained):
        raise ValueError("--cache_text_embeddings needs a frozen text encoder, but the text encoder is trained")
    check_sides(data.images, family.multiple(pipe))


def arrays_of(pipe: DiffusionPipeline, true_sizes: bool, masked: bool) -> dict[str, Callable[[Example], np.ndarray]]:
    """What is made of an example, by its name in the batch; with ``masked``, also ``loss_mask``."""
    family = trained_family(pipe)
    arrays = family.arrays(pipe, true_sizes)
    if masked:
        cell = family.cell(pipe)
        assert cell is not None  # check_inputs
        arrays["loss_mask"] = functools.partial(mask_of, cell)
    return arrays


def mask_of(cell: int, example: Example) -> np.ndarray:
    """The weight of every latent, or pixel, of an example in the loss, float32 ``[h,w]``: the mean of ``cell x cell``
    pixels."""
    height, width = (side // cell for side in example.target_size)
    if example.mask is None:
        return np.ones((height, width), np.float32)
    cells = example.mask[: height * cell, : width * cell].reshape(height, cell, width, cell)
    return (cells.mean((1, 3)) / 255).astype(np.float32)


def finish_repeated(make: Callable[[Example], Batch], length: int, example: Example) -> Batch:
    """``make`` applied to an example of a repeated source, with the index of the example in the original source."""
    return make(dataclasses.replace(example, index=example.index % length))


def image_cache(
    data: DataSettings,
    model: ModelSettings,
    pipe: DiffusionPipeline,
    source: Source,
    true_sizes: bool,
    masked: bool = False,
) -> Callable[[Example], Batch]:
    """A cache of what the family's networks make of every image, for Stable Diffusion ``moments [h,w,2c]`` of its
    latent distribution, and of the other arrays: for SDXL ``time_ids [6]``, with ``masked`` also ``loss_mask [h,w]``,
    and the control images ``conditioning [H,W,3]`` if there are any, unless the family encodes these too."""
    family = trained_family(pipe)
    arrays = arrays_of(pipe, true_sizes, masked)
    opened = {name: component_from(model, pipe, name) for name in family.image_encoders}
    models, params = ({name: pair[i] for name, pair in opened.items()} for i in (0, 1))
    encode = jax.jit(lambda params, batch: family.encode_images(models, params, batch))

    def compute(examples: list[Example]) -> Batch:
        made = {name: np.stack([make(example) for example in examples]) for name, make in arrays.items()}
        pixels = {name: made.pop(name) for name in PIXELS if name in made}
        if control := [example.conditioning for example in examples if example.conditioning is not None]:
            (pixels if family.encodes_conditioning else made)["conditioning"] = np.stack(control)
        area = max(array.shape[1] * array.shape[2] for array in pixels.values())
        at_once = max(1, PIXELS_AT_ONCE // area)
        parts = [
            encode(params, {name: array[i : i + at_once] for name, array in pixels.items()})
            for i in range(0, len(examples), at_once)
        ]
        found = {name: np.concatenate([np.asarray(part[name], np.float32) for part in parts]) for name in parts[0]}
        return found | made

    key: dict[str, Any] = {name: network_key(models[name], params[name]) for name in models}
    key["sizes"] = true_sizes if "time_ids" in arrays else None
    if masked:
        key["mask"] = data.mask_column
    if (control := data.conditioning or data.conditioning_image_column) is not None:
        key["conditioning"] = f"latents of {control}" if family.encodes_conditioning else control
    folder, buckets = data.caches.data_cache_dir, buckets_from(data, source)
    return cache_images(folder, "latents", key, source, transform_from(data), compute, buckets)


def text_cache(
    data: DataSettings, model: ModelSettings, pipe: DiffusionPipeline, source: Source
) -> Callable[[Example], Batch]:
    """A cache of the prompt embeddings of every caption and of the empty prompt: ``states [L,D]``, for SDXL also
    ``pooled [P]``."""
    family = trained_family(pipe)
    words = family.words(pipe)
    opened = {name: component_from(model, pipe, name) for name in words}
    models, params = ({name: pair[i] for name, pair in opened.items()} for i in (0, 1))
    text = jax.jit(lambda params, batch: family.encode_text(models, params, batch))

    def compute(captions: list[str]) -> Batch:
        rows = [tokens_of(words, caption) for caption in captions]
        out = text(params, {name: np.stack([row[name] for row in rows]) for name in rows[0]})
        return {name: np.asarray(value, np.float32) for name, value in out.items()}

    key = {name: network_key(models[name], params[name]) for name in words}
    for name, own in words.items():
        key[f"{name} tokens"] = str(own.ids("the quick brown fox"))
    return cache_captions(data.caches.data_cache_dir, "text", key, source, compute)


def network_key(model: Any, params: Params) -> str:
    """Everything that a network's outputs depend on, as part of the key of a cache."""
    return f"{model.config} {jnp.dtype(model.dtype)} {fingerprint_params(params)}"
