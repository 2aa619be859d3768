"""The tokenizers of BERT, CLIP, T5 and XLM-RoBERTa from transformers, and thread-safe calls of tokenizers."""

from __future__ import annotations

import copy
import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffuse_jax.limits import refuse_links
from diffuse_jax.weights import WeightsError
from diffuse_jax.writing import expanded

FILES = {
    "Bert": "vocab.txt",
    "CLIP": "vocab.json and merges.txt",
    "T5": "spiece.model",
    "XLMRoberta": "sentencepiece.bpe.model",
}
"""Tokenizer -> the files with its vocabulary, if there is no ``tokenizer.json``."""

SPACE = "▁"
"""What the tokenizers of T5 and XLM-RoBERTa have for a space, T5's even without a vocabulary."""

TOKENIZERS = tuple(f"{kind}Tokenizer{suffix}" for kind in FILES for suffix in ("", "Fast"))
"""The tokenizer classes of transformers that can be opened."""


def clip_tokenizer(source: Any, **options: Any) -> Any:
    """CLIP's tokenizer; see :func:`open_tokenizer`."""
    return open_tokenizer("CLIPTokenizer", source, **options)


def open_tokenizer(class_name: str, source: Any, **options: Any) -> Any:
    """``from_pretrained`` of a class of transformers, without transformers' advice to install PyTorch.

    Args:
      class_name: one of :data:`TOKENIZERS`.
      source: a folder or Hub id with the files of :data:`FILES`, or ``tokenizer.json``.
      **options: options of ``from_pretrained``.

    Raises:
      WeightsError: ``source`` has no tokenizer or a damaged one, or links that lead out of the folder.
    """
    kind = class_name.removesuffix("Fast").removesuffix("Tokenizer")
    if (folder := expanded(str(source))).is_dir():
        source = refuse_links(folder)
    try:
        tokenizer = getattr(_transformers(), f"{kind}Tokenizer").from_pretrained(source, **options)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise WeightsError(f"{source}: cannot read a {kind} tokenizer: {error}") from error
    # Without a vocabulary, transformers makes one of only the special tokens, so all prompts would be the same.
    if set(tokenizer.get_vocab()) <= {*tokenizer.all_special_tokens, SPACE}:
        raise WeightsError(f"{source}: no vocabulary; expected {FILES[kind]}, or tokenizer.json")
    return tokenizer


def _transformers() -> Any:
    """The library, without its advice to install PyTorch, which tokenizers do not need."""
    logging.getLogger("transformers").addFilter(_is_not_about_torch)
    import transformers

    return transformers


def _is_not_about_torch(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


# Calls without side effects

_COPIES: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def unpadded_ids(tokenizer: Any, prompts: Sequence[str], **options: Any) -> list[list[int]]:
    """The token ids of each prompt, neither padded nor truncated.

    Args:
      tokenizer: see :func:`stateless`.
      prompts: at least one prompt.
      **options: further arguments of the tokenizer, such as ``add_special_tokens=False``.
    """
    call = stateless(tokenizer, truncation=False, padding=False, verbose=False, **options)
    return [list(ids) for ids in call(list(prompts))["input_ids"]]


def padded_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> np.ndarray:
    """Token ids int32 ``[B, length]``, truncated or padded."""
    call = stateless(tokenizer, truncation=True, padding="max_length", max_length=length)
    return np.array(call(list(prompts))["input_ids"], np.int32)


def padded_mask(tokenizer: Any, prompts: Sequence[str], length: int) -> np.ndarray:
    """Attention mask of :func:`padded_ids`, bool ``[B, length]``: true for tokens, false for padding."""
    call = stateless(tokenizer, truncation=True, padding="max_length", max_length=length)
    return np.array(call(list(prompts))["attention_mask"], bool)


def stateless(tokenizer: Any, **options: Any) -> Callable[[Any], Any]:
    """``tokenizer(texts, **options)`` as a function without side effects that several threads may call.

    A transformers tokenizer stores padding and truncation as state and changes them at every call, so threads can get
    each other's lengths. Here each set of options has its own copy of the tokenizer, whose state does not change after
    the first call; the tokenizer itself is only read.

    Args:
      tokenizer: a transformers tokenizer, or a function without state, which is called directly.
      **options: keyword arguments of each call.
    """
    if not isinstance(tokenizer, _transformers().PreTrainedTokenizerBase):
        return functools.partial(tokenizer, **options)
    sides = tokenizer.pad_token_id, tokenizer.padding_side, tokenizer.truncation_side
    key = (len(tokenizer), *sides, *sorted(options.items()))
    copies = _COPIES.setdefault(tokenizer, {})
    if key not in copies:
        configured = copy.deepcopy(tokenizer)
        configured([""], **options)
        copies.setdefault(key, configured)  # atomic, so all threads use the first copy
    return functools.partial(copies[key], **options)
