"""Textual inversion (Gal et al. 2022, arXiv 2208.01618): the prompts, and the token embeddings that are trained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from diffuse_jax.adapters import tokens
from diffuse_jax.models import Params
from diffuse_jax.pipelines import DiffusionPipeline, StableDiffusionPipeline
from diffuse_jax.training.data import DataSettings, FolderSource, Record, Source
from diffuse_jax.training.dreambooth import FixedPrompts, refuse_other_data
from diffuse_jax.training.families import trained_family
from diffuse_jax.training.settings import InversionSettings
from diffuse_jax.training.settings.methods import TEMPLATES


def inversion_source(settings: InversionSettings, data: DataSettings) -> Source:
    """The images of ``train_data_dir``, with prompts that contain the new word.

    Raises:
      ValueError: no image folder is given, another data set is named, or a caption has no ``{}``.
      FileNotFoundError: there are no images, or captions are asked for and there are none.
    """
    refuse_other_data(data, "train_data_dir")
    if len(data.folders) != 1:
        raise ValueError(
            "--train_data_dir must be one folder, with a few images of what the new word stands for; got "
            + (", ".join(map(str, data.folders)) or "none")
        )
    (folder,) = data.folders
    if settings.caption_column is not None:
        return WithPlaceholder(folder, settings.caption_column, settings.placeholder_token)
    captions = tuple(text.format(settings.placeholder_token) for text in TEMPLATES[settings.learnable_property])
    return FixedPrompts(folder, captions)


def placeholder(settings: InversionSettings, pipe: DiffusionPipeline) -> tuple[Any, int]:
    """The tokenizer with the new word, and the id of the initializer's token.

    Raises:
      ValueError: the pipeline has two text encoders, the word is already known or longer than a prompt, or the
        initializer has several tokens.
    """
    if not isinstance(pipe, StableDiffusionPipeline):
        raise ValueError(
            f"textual inversion supports one text encoder; {type(pipe).__name__} has two: give a Stable Diffusion 1.x "
            "or 2.x"
        )
    words = trained_family(pipe).words(pipe)["text_encoder"]
    if settings.num_vectors > (most := words.length - 2):
        raise ValueError(
            f"--num_vectors must be at most {most}, got {settings.num_vectors}: a prompt has no more tokens besides "
            "its start and end"
        )
    extended = tokens.with_words(words.tokenizer, settings.placeholder_token, settings.num_vectors)
    return extended, tokens.token_id(words.tokenizer, settings.initializer_token)


def row_shapes(settings: InversionSettings, pipe: DiffusionPipeline) -> jax.ShapeDtypeStruct:
    """The shape of the embeddings of :func:`with_placeholder`; no weights are needed.

    Raises:
      ValueError: as for :func:`placeholder`.
    """
    placeholder(settings, pipe)
    return jax.ShapeDtypeStruct((settings.num_vectors, pipe.components["text_encoder"].config.hidden_size), jnp.float32)


def with_placeholder(settings: InversionSettings, pipe: DiffusionPipeline) -> tuple[DiffusionPipeline, jax.Array]:
    """The pipeline with the new word, and its embeddings ``[n,D]`` float32, copies of the initializer's.

    Raises:
      ValueError: as for :func:`placeholder`.
    """
    tokenizer, start = placeholder(settings, pipe)
    encoder, params = pipe.components["text_encoder"], pipe.params["text_encoder"]
    row = tokens.table_of(params)[start]
    rows = jnp.tile(row.astype(jnp.float32), (settings.num_vectors, 1))
    return pipe.replace(
        tokenizer=tokenizer, text_encoder=tokens.with_rows(encoder, params, rows.astype(row.dtype))
    ), rows


class WithPlaceholder:
    """An image folder; ``{}`` in its captions is replaced by the new word."""

    def __init__(self, folder: str | Path, column: str, word: str) -> None:
        self._source, self._word = FolderSource(folder, column), word
        self.fingerprint = f"{self._source.fingerprint}-{hashlib.sha1(word.encode()).hexdigest()}"
        for i in range(len(self._source)):
            record = self._source[i]
            if not all("{}" in text for text in record.captions):
                raise ValueError(f"{record.name}: every caption must contain {{}} in place of the new word, got "
                                 f"{record.captions}")  # fmt: skip

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = self._source[index]
        return record._replace(captions=tuple(text.replace("{}", self._word) for text in record.captions))


def save_embeddings(word: str, folder: Path, trained: Mapping[str, jax.Array]) -> None:
    """Write ``learned_embeds.safetensors``, the trained embeddings of ``word``."""
    tokens.save_rows(folder / tokens.FILE, word, trained["text_encoder"])


def combined(pipe: DiffusionPipeline, trained: Mapping[str, jax.Array]) -> dict[str, Params]:
    """The text encoder's parameters with the trained embeddings."""
    return {"text_encoder": tokens.combine(pipe.params["text_encoder"], trained["text_encoder"])}
