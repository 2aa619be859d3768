"""CLIP's tokenizer, from transformers."""

from __future__ import annotations

import logging
from typing import Any


def clip_tokenizer(source: Any, **options: Any) -> Any:
    """``transformers.CLIPTokenizer.from_pretrained``, without transformers' advice to install PyTorch.

    Args:
      source: a folder or Hub id with ``vocab.json`` and ``merges.txt``.
      options: what ``from_pretrained`` takes.

    Raises:
      OSError: ``source`` has no tokenizer.
    """
    logging.getLogger("transformers").addFilter(_is_not_about_torch)  # a tokenizer needs none
    import transformers

    return transformers.CLIPTokenizer.from_pretrained(source, **options)


def _is_not_about_torch(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()
