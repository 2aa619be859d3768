"""The text encoders of Stable Diffusion: CLIP (Radford et al. 2021) and OpenCLIP (Cherti et al. 2023), in Flax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffuse_jax.allowed import Range, TokenId
from diffuse_jax.config import Config
from diffuse_jax.models.base import Model
from diffuse_jax.models.clip_layers import CLIPLayersConfig, Part, TransformerLayers
from diffuse_jax.models.embeddings import Embedding
from diffuse_jax.models.layers import Dense
from diffuse_jax.models.one_file import OneFile


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(CLIPLayersConfig):
    """``config.json`` of a CLIP text encoder, as transformers writes it (or its ``text_config`` part).

    An ``eos_token_id`` of 2 marks files from before the id was corrected; there, the text ends at the largest id. With
    ``use_attention_mask``, pipelines of Stable Diffusion 1.x and 2.x mask the padding.
    """

    harmless: ClassVar[Mapping[str, str]] = {
        **CLIPLayersConfig.harmless,
        "bos_token_id": "the tokenizer writes the text's first token",
        "pad_token_id": "the tokenizer pads",
    }
    label: ClassVar[str] = "CLIP text"
    section: ClassVar[str] = "text_config"
    model_types: ClassVar[tuple[str, ...]] = ("clip_text_model", "clip")

    vocab_size: Annotated[int, Range(1, 2**22)] = 49408
    max_position_embeddings: int = 77
    bos_token_id: TokenId | None = 49406
    eos_token_id: TokenId = 49407
    pad_token_id: TokenId | None = 1
    use_attention_mask: bool = False


class CLIPTextOutput(NamedTuple):
    """The encoder's outputs; ``hidden_states`` are the embeddings and each layer's output, before the final norm."""

    last_hidden_state: jax.Array  # [B,L,D], after the final norm
    pooled_output: jax.Array  # [B,D], the final state at the end-of-text token
    hidden_states: tuple[jax.Array, ...]  # num_hidden_layers + 1 times [B,L,D]
    text_embeds: jax.Array | None  # [B,projection_dim]; None without a projection

    def skipped(self, clip_skip: int) -> jax.Array:
        """The hidden states before the last ``clip_skip`` layers, ``[B,L,D]``, without the final norm.

        Raises:
          ValueError: ``clip_skip`` is out of range.
        """
        if not 0 <= clip_skip < len(self.hidden_states):
            raise ValueError(f"clip_skip must be from 0 to {len(self.hidden_states) - 1}, got {clip_skip}")
        return self.hidden_states[-1 - clip_skip]


class CLIPTextModel(OneFile, Model):
    """A causal transformer over token ids, without projection of the pooled state (SD 1.x, 2.x, SDXL's first
    encoder)."""

    config: CLIPTextConfig = CLIPTextConfig()
    config_class: ClassVar[type[Config]] = CLIPTextConfig
    weights_name: ClassVar[str] = "model"
    model_type: ClassVar[str] = "clip_text_model"
    has_projection: ClassVar[bool] = False

    def setup(self) -> None:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.text_model = TextTransformer(self.config, **dtypes)
        if self.has_projection:
            self.text_projection = Dense(self.config.projection_dim, use_bias=False, **dtypes)

    def example_inputs(self) -> dict[str, Any]:
        return {"input_ids": jax.ShapeDtypeStruct((1, 2), jnp.int32)}

    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> CLIPTextOutput:
        """Encode ``input_ids`` ``[B,L]`` int32, ``L <= max_position_embeddings``.

        Args:
          input_ids: token ids. They are not checked against the vocabulary, since that is impossible under ``jit``.
          attention_mask: ``[B,L]``, true where a token may be attended to; Stable Diffusion passes one only if the
            config has ``use_attention_mask``.

        Raises:
          ValueError: the sequence is longer than the position embedding table.
        """
        if input_ids.ndim != 2 or input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"input_ids must be [B,L] with L up to {self.config.max_position_embeddings}, got {input_ids.shape}"
            )
        last, states = self.text_model(input_ids, attention_mask)
        ends = end_of_text(input_ids, self.config.eos_token_id)
        pooled = jnp.take_along_axis(last, ends[:, None, None], axis=1)[:, 0]
        return CLIPTextOutput(last, pooled, states, self.text_projection(pooled) if self.has_projection else None)

    def final_norm(self, states: jax.Array) -> jax.Array:
        """The encoder's final layer norm, for hidden states selected by ``clip_skip`` in SD 1.x and 2.x."""
        return self.text_model.final_layer_norm(states)


class CLIPTextModelWithProjection(CLIPTextModel):
    """A :class:`CLIPTextModel` with ``text_embeds``, the projected pooled state (SDXL's second encoder, the
    refiner's)."""

    has_projection: ClassVar[bool] = True


def end_of_text(input_ids: jax.Array, eos_token_id: int) -> jax.Array:
    """Position of the first end-of-text token, ``[B,L] -> [B]``; with the old id 2, the position of the largest id."""
    return jnp.argmax(input_ids if eos_token_id == 2 else input_ids == eos_token_id, axis=-1)


class TextTransformer(Part):
    """Embeddings, layers and the final norm."""

    def setup(self) -> None:
        self.embeddings = TextEmbeddings(self.config, **self.dtypes)
        self.encoder = TransformerLayers(self.config, **self.dtypes, is_causal=True)
        self.final_layer_norm = self.norm()

    def __call__(self, ids: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        states = self.encoder(self.embeddings(ids), mask)
        return self.final_layer_norm(states[-1]), states


class TextEmbeddings(Part):
    """Token plus position embeddings: ``[B,L] -> [B,L,D]``."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        c = self.config
        tokens = Embedding(c.vocab_size, c.hidden_size, **self.dtypes, name="token_embedding")(ids)
        table = Embedding(c.max_position_embeddings, c.hidden_size, **self.dtypes, name="position_embedding")
        return tokens + table(jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :])
