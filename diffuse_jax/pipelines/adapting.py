"""Apply LoRA and textual inversion files to a pipeline's components, for ``DiffusionPipeline.replace``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from diffuse_jax.adapters import tokens
from diffuse_jax.adapters.lora import merge
from diffuse_jax.adapters.lora_file import load_lora


def with_lora(pipe: Any, source: str | Path, scale: float) -> dict[str, Any]:
    """The networks that a LoRA file targets, with its weights merged; see ``DiffusionPipeline.load_lora_weights``."""
    names = [name for name in pipe.params if name == "unet" or name.startswith("text_encoder")]
    pairs = load_lora(source, {name: pipe.components[name].shapes() for name in names})
    return {name: (pipe.components[name], merge(pipe.params[name], pair, scale)) for name, pair in pairs.items()}


def with_word(pipe: Any, source: str | Path, token: str | None) -> dict[str, Any]:
    """The tokenizers and text encoders with one more token; see ``DiffusionPipeline.load_textual_inversion``."""
    word, found = tokens.load_word(source, token)
    known = getattr(pipe.family, "encoders", {"text_encoder": "tokenizer"})
    encoders = {name: tokenizer for name, tokenizer in known.items() if pipe.components.get(name) is not None}
    by_encoder = {tokens.ENCODERS.get(tensor, next(iter(encoders))): rows for tensor, rows in found.items()}
    if by_encoder.keys() - known or encoders.keys() - by_encoder:
        raise ValueError(
            f"{source}: has {' and '.join(found)}, but {type(pipe).__name__} has {' and '.join(encoders)}; "
            f"a word for SDXL has {' and '.join(tokens.ENCODERS)}, any other a single tensor"
        )
    changed: dict[str, Any] = {}
    for name in encoders:
        rows = by_encoder[name]
        network, params, width = pipe.components[name], pipe.params[name], pipe.components[name].config.hidden_size
        if rows.shape[1] != width:
            raise ValueError(f"{source}: embeddings of size {rows.shape[1]} do not fit a text encoder of width {width}")
        table = tokens.table_of(params)
        changed[encoders[name]] = tokens.with_words(pipe.components[encoders[name]], word, len(rows))
        changed[name] = tokens.with_rows(network, params, jnp.asarray(rows, table.dtype))
    return changed
