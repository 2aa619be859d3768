"""The inputs of a latent model's networks: computed in every training step, or cached once before the run."""

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
from diffuse_jax.training.latent import (
    encoded_condition,
    finish,
    micro_conditioning,
    networks,
    normalised,
    prompt_embeddings,
    reads_control,
    token_ids,
    tokenizers_of,
)
from diffuse_jax.training.latent_model import component_from
from diffuse_jax.training.settings import ModelSettings

TimeIds = Callable[[Example], np.ndarray] | None
"""Makes SDXL's micro-conditioning ``time_ids [6]`` of an example; None for other models."""

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

    Raises:
      ValueError: an output of a trained network would be cached, or the autoencoder does not support the image size.
    """
    check_inputs(data, pipe, trained)
    encoders = encoders_of(pipe)
    time_ids: TimeIds = None
    if pipe.components["unet"].config.addition_embed_type == "text_time":
        time_ids = functools.partial(micro_conditioning, true_sizes)
    if source is None and data.streaming:
        return Inputs(None, functools.partial(finish, tokenizers_of(pipe), time_ids, None, None), True, ())

    rows = source_from(data) if source is None else source
    latents = latent_cache(data, model, pipe, rows, time_ids, true_sizes) if data.caches.cache_latents else None
    texts = text_cache(data, model, pipe, rows) if data.caches.cache_text_embeddings else None
    make = functools.partial(finish, {} if texts else tokenizers_of(pipe), time_ids, latents, texts)
    unused = [*(["vae"] if latents else []), *(encoders if texts else [])]
    if times > 1:
        make = functools.partial(finish_repeated, make, len(rows))
        rows = RepeatedSource(rows, times)
    return Inputs(rows, make, latents is None, tuple(unused))


def encoders_of(pipe: DiffusionPipeline) -> list[str]:
    """The names of a pipeline's text encoders."""
    return [name for name in pipe.family.encoders if pipe.components.get(name) is not None]


def check_inputs(data: DataSettings, pipe: DiffusionPipeline, trained: Iterable[str]) -> None:
    """Check that the images and caches suit the networks, by their configurations.

    Raises:
      ValueError: an output of a trained network would be cached, or the autoencoder does not support the image size.
    """
    if data.caches.cache_text_embeddings and set(encoders_of(pipe)) & set(trained):
        raise ValueError("--cache_text_embeddings needs a frozen text encoder, but the text encoder is trained")
    check_sides(data.images, pipe.components["vae"].config.scale)


def finish_repeated(make: Callable[[Example], Batch], length: int, example: Example) -> Batch:
    """``make`` applied to an example of a repeated source, with the index of the example in the original source."""
    return make(dataclasses.replace(example, index=example.index % length))


def latent_cache(
    data: DataSettings,
    model: ModelSettings,
    pipe: DiffusionPipeline,
    source: Source,
    time_ids: TimeIds,
    true_sizes: bool,
) -> Callable[[Example], Batch]:
    """A cache of ``moments [h,w,2c]`` of every image's latent distribution, for SDXL also of ``time_ids [6]``, and of
    the control images ``conditioning [H,W,3]`` if there are any, or of their latents ``image_condition [h,w,c]`` if the
    UNet reads those."""
    vae, params = component_from(model, pipe, "vae")
    encode = jax.jit(lambda p, x: jnp.concatenate(vae.apply({"params": p}, normalised(x), method="encode"), -1))
    condition = None if reads_control(networks(pipe)) else jax.jit(functools.partial(encoded_condition, vae))

    def compute(examples: list[Example]) -> Batch:
        pixels = np.stack([np.asarray(example.pixels) for example in examples])
        at_once = max(1, PIXELS_AT_ONCE // (pixels.shape[1] * pixels.shape[2]))

        def in_parts(encode: Callable[[Params, np.ndarray], jax.Array], images: np.ndarray) -> np.ndarray:
            parts = [encode(params, images[i : i + at_once]) for i in range(0, len(images), at_once)]
            return np.concatenate([np.asarray(part, np.float32) for part in parts])

        found = {"moments": in_parts(encode, pixels)}
        if control := [example.conditioning for example in examples if example.conditioning is not None]:
            images = np.stack(control)
            found |= {"conditioning": images} if condition is None else {"image_condition": in_parts(condition, images)}
        return found | ({"time_ids": np.stack([time_ids(example) for example in examples])} if time_ids else {})

    key = {"vae": network_key(vae, params), "sizes": true_sizes if time_ids else None}
    if (control := data.conditioning or data.conditioning_image_column) is not None:
        key["conditioning"] = control if condition is None else f"latents of {control}"
    folder, buckets = data.caches.data_cache_dir, buckets_from(data, source)
    return cache_images(folder, "latents", key, source, transform_from(data), compute, buckets)


def text_cache(
    data: DataSettings, model: ModelSettings, pipe: DiffusionPipeline, source: Source
) -> Callable[[Example], Batch]:
    """A cache of the prompt embeddings of every caption and of the empty prompt: ``states [L,D]``, for SDXL also
    ``pooled [P]``."""
    tokenizers = tokenizers_of(pipe)
    opened = {name: component_from(model, pipe, name) for name in tokenizers}
    models, params = ({name: pair[i] for name, pair in opened.items()} for i in (0, 1))
    text = jax.jit(lambda params, ids: prompt_embeddings(pipe.family, models, params, ids))

    def compute(captions: list[str]) -> Batch:
        ids = lambda tokenizer, length: np.stack([token_ids(tokenizer, length, caption) for caption in captions])
        out = text(params, {name: ids(*tokenizer) for name, tokenizer in tokenizers.items()})
        return {name: np.asarray(value, np.float32) for name, value in out.items()}

    key = {name: network_key(models[name], params[name]) for name in tokenizers}
    for name, (tokenizer, length) in tokenizers.items():
        key[f"{name} tokens"] = str(token_ids(tokenizer, length, "the quick brown fox"))
    return cache_captions(data.caches.data_cache_dir, "text", key, source, compute)


def network_key(model: Any, params: Params) -> str:
    """Everything that a network's outputs depend on, as part of the key of a cache."""
    return f"{model.config} {jnp.dtype(model.dtype)} {fingerprint_params(params)}"
