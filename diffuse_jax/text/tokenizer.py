"""CLIP's tokenizer, from transformers, and calls of tokenizers that several threads may make at once."""

from __future__ import annotations

import copy
import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffuse_jax.limits import refuse_links
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
      WeightsError: ``source`` has no tokenizer, a damaged one, or links that leave the folder.
    """
    if Path(str(source)).is_dir():
        refuse_links(Path(source))
    try:
        tokenizer = _transformers().CLIPTokenizer.from_pretrained(source, **options)
    except Exception as error:  # what reads the files raises Exception itself
        raise WeightsError(f"{source}: no tokenizer of CLIP can be read there: {error}") from error
    # Where there is no vocabulary, transformers makes one of the special words alone: all prompts are then the same.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise WeightsError(f"{source}: no vocabulary there; expected vocab.json and merges.txt, or tokenizer.json")
    return tokenizer


def _transformers() -> Any:
    """The library, which would advise to install PyTorch; a tokenizer needs none."""
    logging.getLogger("transformers").addFilter(_is_not_about_torch)
    import transformers

    return transformers


def _is_not_about_torch(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


# Calls that change nothing

_COPIES: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def unpadded_ids(tokenizer: Any, prompts: Sequence[str], **options: Any) -> list[list[int]]:
    """The token ids of each prompt, neither padded nor cut.

    Args:
      tokenizer: see :func:`calls`.
      prompts: at least one.
      options: what the tokenizer takes besides, such as ``add_special_tokens=False``.
    """
    call = calls(tokenizer, truncation=False, padding=False, verbose=False, **options)
    return [list(ids) for ids in call(list(prompts))["input_ids"]]


def padded_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> np.ndarray:
    """Token ids int32 ``[B, length]``: what is too long is cut, what is too short is padded."""
    call = calls(tokenizer, truncation=True, padding="max_length", max_length=length)
    return np.array(call(list(prompts))["input_ids"], np.int32)


def padded_mask(tokenizer: Any, prompts: Sequence[str], length: int) -> np.ndarray:
    """Where the tokens of :func:`padded_ids` are no padding, bool ``[B, length]``."""
    call = calls(tokenizer, truncation=True, padding="max_length", max_length=length)
    return np.array(call(list(prompts))["attention_mask"], bool)


def calls(tokenizer: Any, **options: Any) -> Callable[[Any], Any]:
    """``tokenizer(texts, **options)`` as a function that changes nothing and may run in several threads.

    transformers keeps padding and truncation on the tokenizer and switches them at every call, so that two threads get
    each other's lengths. Here each set of options has a copy of its own, on which nothing is switched after the first
    call, and the tokenizer itself is only read.

    Args:
      tokenizer: of transformers, or a function of its own that keeps no state between calls; that is called as it is.
      options: keyword arguments of each call.
    """
    if not isinstance(tokenizer, _transformers().PreTrainedTokenizerBase):
        return functools.partial(tokenizer, **options)
    sides = tokenizer.pad_token_id, tokenizer.padding_side, tokenizer.truncation_side
    key = (len(tokenizer), *sides, *sorted(options.items()))
    copies = _COPIES.setdefault(tokenizer, {})
    if key not in copies:
        switched = copy.deepcopy(tokenizer)
        switched([""], **options)
        copies.setdefault(key, switched)  # which is one step: all threads use the copy that came first
    return functools.partial(copies[key], **options)
