"""Textual inversion (Gal et al. 2022, arXiv 2208.01618): the prompts, and the rows that are trained."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffuse_jax.adapters import tokens
from diffuse_jax.models import Params
from diffuse_jax.pipelines import DiffusionPipeline, StableDiffusionPipeline
from diffuse_jax.training.batches import Batches
from diffuse_jax.training.cached import inputs_from
from diffuse_jax.training.data import FolderSource, Record, add_data, batches_from
from diffuse_jax.training.dreambooth import Prompted, refuse_other_data
from diffuse_jax.training.flags import Parser

_LOOKS = ("", "good ", "bright ", "dark ", "clear ", "blurred ", "cropped ", "close-up ", "small ")
_SIZES = ("", "small ", "large ", "dark ", "bright ", "detailed ")

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "object": tuple(f"a {look}photo of {which} {{}}" for look in _LOOKS for which in ("a", "the", "my")),
    "style": (
        "a work in the style of {}",
        *(f"a {size}{work} in the style of {{}}" for size in _SIZES for work in ("painting", "drawing", "picture")),
    ),
}
"""Prompts by what is learned; ``{}`` stands for the new word. Many neutral ones keep it from meaning one sentence."""


def add_inversion(parser: Parser) -> None:
    """The flags of the new word, and of how the pictures are read."""
    add = parser.group("textual inversion")
    add("--placeholder_token", required=True, help='the new word, such as "<cat-toy>"')
    add("--initializer_token", required=True, help="a word of one token whose meaning is the start")
    add("--num_vectors", type=int, default=1, help="rows of the table that the word stands for")
    add("--learnable_property", default="object", choices=sorted(TEMPLATES), help="which prompts are used")
    add("--caption_column", help="instead of those, captions of metadata.jsonl, in which {} stands for the word")
    add("--repeats", type=int, default=100, help="how often a picture counts in an epoch")
    add("--save_as_full_pipeline", action="store_true", help="write the whole pipeline with the new word too")
    add_data(parser, captions=False, caches=True)


def check_inversion(args: argparse.Namespace) -> None:
    """Refuse what cannot work, before anything is read.

    Raises:
      ValueError: there is no folder of pictures, or another data set is named.
    """
    refuse_other_data(args, "train_data_dir")
    if not args.train_data_dir:
        raise ValueError("--train_data_dir is missing: a folder with a few pictures of what the new word stands for")


def with_placeholder(args: argparse.Namespace, pipe: DiffusionPipeline) -> tuple[DiffusionPipeline, jax.Array]:
    """The pipeline with the new word, and its rows ``[n,D]`` float32, copies of the initializer's.

    Raises:
      ValueError: a pipeline with two text encoders, a word that is known already, or an initializer of several tokens.
    """
    if not isinstance(pipe, StableDiffusionPipeline):
        raise ValueError(f"textual inversion is for one text encoder; {type(pipe).__name__} has two")
    tokenizer = tokens.with_words(pipe.components["tokenizer"], args.placeholder_token, args.num_vectors)
    start = tokens.token_id(pipe.components["tokenizer"], args.initializer_token)
    encoder, params = pipe.components["text_encoder"], pipe.params["text_encoder"]
    row = tokens.table_of(params)[start]
    rows = jnp.tile(row.astype(jnp.float32), (args.num_vectors, 1))
    return pipe.replace(
        tokenizer=tokenizer, text_encoder=tokens.with_rows(encoder, params, rows.astype(row.dtype))
    ), rows


def inversion_batches(args: argparse.Namespace, mesh: Mesh, pipe: DiffusionPipeline) -> tuple[Batches, tuple[str, ...]]:
    """The batches that the flags describe, and the networks whose work is done already.

    Raises:
      ValueError: a caption without ``{}``.
    """
    pictures: Prompted | Worded
    if args.caption_column is None:
        captions = tuple(text.format(args.placeholder_token) for text in TEMPLATES[args.learnable_property])
        pictures = Prompted(args.train_data_dir, captions)
    else:
        pictures = Worded(args.train_data_dir, args.caption_column, args.placeholder_token)
    inputs = inputs_from(args, pipe, trained=("text_encoder",), source=pictures, times=args.repeats)
    return batches_from(args, mesh, inputs.finish, source=inputs.source, pixels=inputs.pixels), inputs.unused


class Worded:
    """An image folder in whose captions ``{}`` becomes the new word."""

    def __init__(self, folder: str | Path, column: str, word: str) -> None:
        self._source, self._word = FolderSource(folder, column), word
        self.fingerprint = f"{self._source.fingerprint}-{hashlib.sha1(word.encode()).hexdigest()}"
        for i in range(len(self._source)):
            record = self._source[i]
            if not all("{}" in text for text in record.captions):
                raise ValueError(f"{record.name}: every caption must hold {{}}, where the new word stands; got "
                                 f"{record.captions}")  # fmt: skip

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = self._source[index]
        return record._replace(captions=tuple(text.replace("{}", self._word) for text in record.captions))


def save_embeddings(args: argparse.Namespace, folder: Path, trained: Mapping[str, jax.Array]) -> None:
    """Write ``learned_embeds.safetensors``."""
    tokens.save_rows(folder / tokens.FILE, args.placeholder_token, trained["text_encoder"])


def combined(pipe: DiffusionPipeline, trained: Mapping[str, jax.Array]) -> dict[str, Params]:
    """The text encoder's parameters with the trained rows."""
    return {"text_encoder": tokens.combine(pipe.params["text_encoder"], trained["text_encoder"])}
