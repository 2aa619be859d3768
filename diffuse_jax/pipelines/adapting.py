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
    """The tokenizer and text encoder with one more token; see ``DiffusionPipeline.load_textual_inversion``."""
    if pipe.components.get("text_encoder_2") is not None:
        raise ValueError(f"textual inversion supports one text encoder; {type(pipe).__name__} has two")
    word, rows = tokens.load_rows(source, token)
    encoder, params = pipe.components["text_encoder"], pipe.params["text_encoder"]
    table = tokens.table_of(params)
    width = encoder.config.hidden_size
    if rows.shape[1] != width:
        raise ValueError(f"{source}: embeddings of size {rows.shape[1]} do not fit a text encoder of width {width}")
    return {
        "tokenizer": tokens.with_words(pipe.components["tokenizer"], word, len(rows)),
        "text_encoder": tokens.with_rows(encoder, params, jnp.asarray(rows, table.dtype)),
    }
