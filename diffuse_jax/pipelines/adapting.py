"""Apply LoRA and textual inversion files to a pipeline's components, for ``DiffusionPipeline.replace``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from diffuse_jax.adapters import tokens
from diffuse_jax.adapters.lora_file import read_adapter
from diffuse_jax.adapters.merging import merged
from diffuse_jax.models import Model, Params


def with_lora(pipe: Any, source: str | Path, scale: float, **options: Any) -> dict[str, Any]:
    """The networks that a LoRA file targets, with its weights merged; see ``DiffusionPipeline.load_lora_weights``."""
    adapter = read_adapter(source, adaptable(pipe), **options)
    return {
        name: (pipe.components[name], merged(pipe.params[name], changes, scale)) for name, changes in adapter.items()
    }


def adaptable(pipe: Any) -> dict[str, Params]:
    """The shapes of the networks of a pipeline that adapters can change: UNet, text encoders, a single ControlNet."""
    names = [name for name in pipe.params if name in ("unet", "controlnet") or name.startswith("text_encoder")]
    return {name: pipe.components[name].shapes() for name in names if isinstance(pipe.components[name], Model)}


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
