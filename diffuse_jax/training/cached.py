"""What the networks of a latent model are given: worked out in every step, or once before the run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.models import Params
from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.pipelines.family import output_size
from diffuse_jax.training.batches import Batch
from diffuse_jax.training.data import (
    DataSettings,
    Example,
    Source,
    buckets_from,
    cache_captions,
    cache_pictures,
    check_sides,
    fingerprint_params,
    source_from,
    transform_from,
    warn_of_size,
)
from diffuse_jax.training.data.sources import Record
from diffuse_jax.training.latent import (
    finish,
    normalised,
    prompt_states,
    sizes_of,
    token_ids,
    tokenizers_of,
)
from diffuse_jax.training.latent_model import component_from
from diffuse_jax.training.settings import ModelSettings

Told = Callable[[Example], np.ndarray] | None

PIXELS_AT_ONCE = 2**21
"""Pixels that are encoded in one call: eight pictures of 512 x 512."""


class Inputs(NamedTuple):
    """How examples become batches.

    Attributes:
      source: the data set; None for the stream that the settings describe.
      finish: makes the arrays of one example.
      pixels: whether it needs the picture.
      unused: networks that have done all their work already.
    """

    source: Source | None
    finish: Callable[[Example], Batch]
    pixels: bool
    unused: tuple[str, ...]


class Repeated:
    """Another source so many times over: a handful of pictures still fills an update."""

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
) -> Inputs:
    """What the networks are given.

    Args:
      data: the data set, and what of it is cached.
      model: where the pipeline came from.
      pipe: the pipeline to train.
      trained: networks that change during the run.
      source: instead of the one that the settings describe.
      times: repeat it so often.
      true_sizes: tell SDXL the size of each picture and where it was cut; else that all are whole and of the target's
        size.

    Raises:
      ValueError: a cache of what changes during the run, or pictures of a size that the autoencoder cannot take.
    """
    encoders = [name for name in pipe.family.encoders if pipe.components.get(name) is not None]
    if data.caches.cache_text_embeddings and set(encoders) & set(trained):
        raise ValueError("--cache_text_embeddings keeps what the text encoder says now, but it is trained")
    check_sides(data.images, pipe.components["vae"].config.scale)
    if pipe.components["unet"].config.sample_size is not None:
        warn_of_size(data.images, output_size(pipe, None, None))
    told: Told = None
    if pipe.components["unet"].config.addition_embed_type == "text_time":
        told = functools.partial(sizes_of, true_sizes)
    if source is None and data.streaming:
        return Inputs(None, functools.partial(finish, tokenizers_of(pipe), told, None, None), True, ())

    rows = source_from(data) if source is None else source
    pictures = latent_cache(data, model, pipe, rows, told, true_sizes) if data.caches.cache_latents else None
    texts = text_cache(data, model, pipe, rows) if data.caches.cache_text_embeddings else None
    make = functools.partial(finish, {} if texts else tokenizers_of(pipe), told, pictures, texts)
    unused = [*(["vae"] if pictures else []), *(encoders if texts else [])]
    if times > 1:
        make = functools.partial(finish_repeated, make, len(rows))
        rows = Repeated(rows, times)
    return Inputs(rows, make, pictures is None, tuple(unused))


def finish_repeated(make: Callable[[Example], Batch], length: int, example: Example) -> Batch:
    """``make`` for an example of a repeated source."""
    return make(dataclasses.replace(example, index=example.index % length))


def latent_cache(
    data: DataSettings, model: ModelSettings, pipe: DiffusionPipeline, source: Source, told: Told, true_sizes: bool
) -> Callable[[Example], Batch]:
    """``moments [h,w,2c]`` of every picture's latents and, for SDXL, ``time_ids [6]``."""
    vae, params = component_from(model, pipe, "vae")
    encode = jax.jit(lambda p, x: jnp.concatenate(vae.apply({"params": p}, normalised(x), method="encode"), -1))

    def compute(examples: list[Example]) -> Batch:
        pixels = np.stack([np.asarray(example.pixels) for example in examples])
        at_once = max(1, PIXELS_AT_ONCE // (pixels.shape[1] * pixels.shape[2]))
        parts = [encode(params, pixels[i : i + at_once]) for i in range(0, len(pixels), at_once)]
        found = {"moments": np.concatenate([np.asarray(part, np.float32) for part in parts])}
        return found | ({"time_ids": np.stack([told(example) for example in examples])} if told else {})

    key = {"vae": network_key(vae, params), "sizes": true_sizes if told else None}
    folder, buckets = data.caches.data_cache_dir, buckets_from(data, source)
    return cache_pictures(folder, "latents", key, source, transform_from(data), compute, buckets)


def text_cache(
    data: DataSettings, model: ModelSettings, pipe: DiffusionPipeline, source: Source
) -> Callable[[Example], Batch]:
    """``states [L,D]`` and, for SDXL, ``pooled [P]`` of every caption and of the empty one."""
    tokenizers = tokenizers_of(pipe)
    opened = {name: component_from(model, pipe, name) for name in tokenizers}
    models, params = ({name: pair[i] for name, pair in opened.items()} for i in (0, 1))
    text = jax.jit(lambda params, ids: prompt_states(pipe.family, models, params, ids))

    def compute(captions: list[str]) -> Batch:
        ids = lambda tokenizer, length: np.stack([token_ids(tokenizer, length, caption) for caption in captions])
        out = text(params, {name: ids(*own) for name, own in tokenizers.items()})
        return {name: np.asarray(value, np.float32) for name, value in out.items()}

    key = {name: network_key(models[name], params[name]) for name in tokenizers}
    for name, (tokenizer, length) in tokenizers.items():
        key[f"{name} tokens"] = str(token_ids(tokenizer, length, "the quick brown fox"))
    return cache_captions(data.caches.data_cache_dir, "text", key, source, compute)


def network_key(model: Any, params: Params) -> str:
    """What a network's outputs depend on."""
    return f"{model.config} {jnp.dtype(model.dtype)} {fingerprint_params(params)}"
