"""What the trainers of text-to-image models must know of a family of checkpoints; see :class:`TrainedFamily`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.adapters import tokens
from diffuse_jax.models import Params
from diffuse_jax.pipelines.family import output_size
from diffuse_jax.schedulers import DDPMScheduler, Scheduler
from diffuse_jax.text.tokenizer import padded_ids, padded_mask
from diffuse_jax.training.batches import Batch

Arrays = Mapping[str, jax.Array]
Networks = Mapping[str, Any]

PIXELS = ("pixel_values", "image_pixels")
"""Arrays of a batch that :meth:`TrainedFamily.encode_images` replaces."""

METHODS = (
    "text to image",
    "DreamBooth",
    "textual inversion",
    "Custom Diffusion",
    "control",
    "editing",
    "distillation",
    "reward",
    "comparison",
)
"""The trainers, and the comparison of a training step with PyTorch."""


class Words(NamedTuple):
    """How a caption becomes the tokens of one text encoder.

    Attributes:
      tokenizer: a transformers tokenizer.
      length: number of tokens, padding included.
      masked: whether the padding is hidden, by a mask in the batch.
      plain: whether captions are written in small letters without outer white space.
    """

    tokenizer: Any
    length: int
    masked: bool = False
    plain: bool = False

    def ids(self, caption: str) -> np.ndarray:
        """Token ids int32 ``[length]``, truncated and padded; words with several embeddings are expanded to all
        tokens."""
        return padded_ids(self.tokenizer, [self._read(caption)], self.length)[0]

    def mask(self, caption: str) -> np.ndarray:
        """Bool ``[length]``, false for padding."""
        return padded_mask(self.tokenizer, [self._read(caption)], self.length)[0]

    def _read(self, caption: str) -> str:
        return tokens.expand_words(caption.lower().strip() if self.plain else caption, self.tokenizer)


def mask_name(encoder: str) -> str:
    """The name of a text encoder's mask in a batch; its token ids have the name of the encoder."""
    return f"{encoder}_mask"


def tokens_of(words: Mapping[str, Words], caption: str) -> Batch:
    """The token ids of a caption, and the masks of those encoders whose padding is hidden."""
    ids = {encoder: own.ids(caption) for encoder, own in words.items()}
    return ids | {mask_name(encoder): own.mask(caption) for encoder, own in words.items() if own.masked}


def normalised(pixels: jax.Array) -> jax.Array:
    """uint8 pixels as float32 in [-1, 1]; other dtypes unchanged."""
    return pixels.astype(jnp.float32) / 127.5 - 1 if pixels.dtype == jnp.uint8 else pixels


def apply(models: Networks, params: Params, name: str, *args: Any, **options: Any) -> Any:
    """The output of the network of that name."""
    return models[name].apply({"params": params[name]}, *args, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedFamily:
    """How checkpoints of a family are trained. Subclasses are in the other files of this package.

    An example of the data becomes arrays: tokens of its caption (:meth:`words`) and what is made of its image
    (:meth:`arrays`). Frozen networks encode both, in every step or, with caches, once before the run
    (:meth:`encode_text`, :meth:`encode_images`). A step makes clean samples of them (:meth:`begin`), adds noise, and
    evaluates the trained network (:meth:`predict`).

    Attributes:
      denoiser: the network that is trained.
      parts: the other networks that a step may need, besides text encoders.
      encoders: text encoder -> its tokenizer.
      methods: the entries of :data:`METHODS` that support it.
      trains_text: whether text encoders can be trained too.
      fixed: parameters of the denoiser, at its top level, that are not trained.
      image_encoders: the networks that :meth:`encode_images` uses.
      encoded_images: what it makes of every image; empty if images need no network.
      encodes_conditioning: whether :meth:`encode_images` also replaces ``conditioning``, which a network beside the
        denoiser reads otherwise.
      borrowed: network -> the setting that names another folder, which it comes from.
      beside: borrowed network -> what comes with it: the component's name there -> its name here.
      refused: setting -> what to do instead, for those that make no sense here.
    """

    denoiser: str = "unet"
    parts: tuple[str, ...] = ()
    encoders: Mapping[str, str] = dataclasses.field(default_factory=dict)
    methods: tuple[str, ...] = ("text to image",)
    trains_text: bool = False
    fixed: tuple[str, ...] = ()
    image_encoders: tuple[str, ...] = ()
    encoded_images: tuple[str, ...] = ()
    encodes_conditioning: bool = False
    borrowed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    beside: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

    # Configurations

    def check(self, configs: Mapping[str, Any], what: str) -> None:
        """Refuse a checkpoint whose networks take or return something else.

        Args:
          configs: the configurations of its networks, those that the index names.
          what: the beginning of the message, "FOLDER is a CLASS".

        Raises:
          ValueError: it is one for another task.
        """

    def read(self, path: Path) -> tuple[Any, Params]:
        """A borrowed network from a single file.

        Raises:
          ValueError: the family has none in such files.
        """
        raise ValueError(f"{path} is a file; give a folder or Hub id")

    def refusals(self, pipe: Any) -> Mapping[str, str]:
        """The settings that make no sense for a pipeline -> what to do instead."""
        return self.refused

    def scheduler(self, folder: Path) -> Scheduler:
        """The noise schedule of training."""
        return DDPMScheduler.from_pretrained(folder, subfolder="scheduler")

    def sampler(self, sampler: Scheduler, schedule: Scheduler) -> Scheduler:
        """The sampler of a checkpoint, as a model that was trained with a noise schedule needs it."""
        return sampler.replace(prediction_type=schedule.prediction_type)

    def multiple(self, pipe: Any) -> int:
        """Sides of images are multiples of this."""
        return 1

    def cell(self, pipe: Any) -> int | None:
        """Pixels per side of a place of the samples that are denoised; None if these have no places."""
        return None

    def size(self, pipe: Any) -> tuple[int, int] | None:
        """(height, width) of the model's images in pixels; None if it has no own."""
        return None if pipe.components[self.denoiser].config.sample_size is None else output_size(pipe, None, None)

    def draws(self, pipe: Any) -> bool:
        """Whether a pipeline makes images of a prompt alone."""
        return True

    # Examples

    def text_encoders(self, pipe: Any) -> list[str]:
        """The names of a pipeline's text encoders."""
        return [name for name in self.encoders if pipe.components.get(name) is not None]

    def words(self, pipe: Any) -> dict[str, Words]:
        """How captions become tokens, by text encoder."""
        found = {}
        for name in self.text_encoders(pipe):
            tokenizer = pipe.components[self.encoders[name]]
            length = min(pipe.components[name].config.max_position_embeddings, int(tokenizer.model_max_length))
            found[name] = Words(tokenizer, length)
        return found

    def arrays(self, pipe: Any, true_sizes: bool) -> dict[str, Callable[[Any], np.ndarray]]:
        """What is made of the image of an example, by its name in the batch.

        Args:
          pipe: the pipeline.
          true_sizes: whether what depends on an image's original size is to be its own.
        """
        return {"pixel_values": pixels_of}

    # The loss

    def with_class_labels(self, class_labels: str | None) -> TrainedFamily:
        """The family whose super-resolution has this as class labels; None for the default."""
        return self

    def encode_text(self, models: Networks, params: Params, batch: Arrays) -> dict[str, jax.Array]:
        """The prompts' embeddings, among them ``states``, from a batch with tokens."""
        return {}

    def unconditional(self, pipe: Any) -> dict[str, jax.Array]:
        """What guidance puts in place of :meth:`encode_text`'s arrays, for one image: ``[1,...]``."""
        raise NotImplementedError

    def encode_images(self, models: Networks, params: Params, batch: Arrays) -> dict[str, jax.Array]:
        """The arrays :attr:`encoded_images`, from a batch with pixels."""
        return {}

    def encoded(self, models: Networks, params: Params, batch: Arrays) -> dict[str, jax.Array]:
        """A batch with what :meth:`encode_text` and :meth:`encode_images` make, unless caches have made it before."""
        text = {} if "states" in batch else self.encode_text(models, params, batch)
        cached = bool(self.encoded_images) and self.encoded_images[0] in batch
        images = {} if cached else self.encode_images(models, params, batch)
        return {**batch, **text, **images}

    def begin(self, models: Networks, params: Params, batch: Arrays, key: jax.Array) -> tuple[jax.Array, Arrays]:
        """Clean samples ``[B,...]`` float32 from an encoded batch, and the batch with what the network sees besides."""
        raise NotImplementedError

    def predict(self, models: Networks, params: Params, batch: Arrays, x: jax.Array, t: jax.Array) -> jax.Array:
        """The trained network's prediction for noisy samples ``x [B,...]`` at timesteps ``t [B]``."""
        raise NotImplementedError


def pixels_of(example: Any) -> np.ndarray:
    """The image of an example, uint8 ``[H,W,3]``."""
    return np.asarray(example.pixels)


def changed_settings(*settings: Any) -> Iterator[tuple[str, Any]]:
    """The names and values of all fields of settings, and of those within them, that are not the default."""
    for one in settings:
        for field in dataclasses.fields(one):
            value = getattr(one, field.name)
            if dataclasses.is_dataclass(value):
                yield from changed_settings(value)
            elif value != field.default:
                yield field.name, value


def refuse_settings(family: TrainedFamily, pipe: Any, *settings: Any) -> None:
    """Refuse settings that make no sense for a pipeline.

    Raises:
      ValueError: the message names the flag, and says what to do instead.
    """
    refused = family.refusals(pipe)
    for name, _ in changed_settings(*settings):
        if name in refused:
            raise ValueError(f"--{name} cannot be used with {type(pipe).__name__}: {refused[name]}")
