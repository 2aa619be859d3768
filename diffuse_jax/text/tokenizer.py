"""CLIP's tokenizer, from transformers."""

from __future__ import annotations

import logging
from typing import Any

from diffuse_jax.weights import WeightsError

TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
"""Tokenizers that can be opened, by their class in transformers."""


def open_tokenizer(class_name: str, source: Any, **options: Any) -> Any:
    """The tokenizer of a class of :data:`TOKENIZERS`; see :func:`clip_tokenizer`."""
    return clip_tokenizer(source, **options)


def clip_tokenizer(source: Any, **options: Any) -> Any:
    """``transformers.CLIPTokenizer.from_pretrained``, without transformers' advice to install PyTorch.

    Args:
      source: a folder or Hub id with ``vocab.json`` and ``merges.txt``.
      options: what ``from_pretrained`` takes.

    Raises:
      WeightsError: ``source`` has no tokenizer, or a damaged one.
    """
    logging.getLogger("transformers").addFilter(_is_not_about_torch)  # a tokenizer needs none
    import transformers

    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(source, **options)
    except Exception as error:  # what reads the files raises Exception itself
        raise WeightsError(f"{source}: no tokenizer of CLIP can be read there: {error}") from error
    # Where there is no vocabulary, transformers makes one of the special words alone: all prompts are then the same.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise WeightsError(f"{source}: no vocabulary there; expected vocab.json and merges.txt, or tokenizer.json")
    return tokenizer


def _is_not_about_torch(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()
