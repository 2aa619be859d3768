"""The text encoder of the first latent diffusion models (Rombach et al. 2022, 4.3.1), in Flax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffuse_jax.allowed import Layers, Range
from diffuse_jax.config import NO_DROPOUT, NOT_QUANTIZED, Config
from diffuse_jax.kernels import attention
from diffuse_jax.models.base import Model
from diffuse_jax.models.clip_layers import HARMLESS, Part
from diffuse_jax.models.embeddings import Embedding
from diffuse_jax.models.layers import ACTIVATIONS, Dense, LayerNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class LDMBertConfig(Config):
    """``config.json`` of an ``LDMBertModel``, as PyTorch diffusers writes it."""

    fixed: ClassVar[Mapping[str, Any]] = NOT_QUANTIZED
    harmless: ClassVar[Mapping[str, str]] = {
        **{name: why for name, why in HARMLESS.items() if name != "dropout"},
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "classifier_dropout"), NO_DROPOUT),
        "encoder_layerdrop": NO_DROPOUT,
        "init_std": "for weights before training",
        **dict.fromkeys(("num_hidden_layers", "hidden_size", "num_attention_heads"), "say again what others say"),
        "scale_embedding": "diffusers' network does not read it",
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), "the tokenizer writes and pads the text"),
    }

    vocab_size: Annotated[int, Range(1, 2**22)] = 30522
    max_position_embeddings: int = 77
    d_model: int = 1280
    encoder_layers: Layers = 32
    encoder_ffn_dim: int = 5120
    encoder_attention_heads: int = 8
    head_dim: int = 64
    activation_function: str = "gelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"LDMBert: activation_function={self.activation_function!r}; expected one of {sorted(ACTIVATIONS)}"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LDMBertConfig:
        if data.get("model_type", "ldmbert") != "ldmbert":
            raise ValueError(f"expected the config of an LDMBertModel, got model_type={data['model_type']!r}")
        return super().from_json(data)

    @property
    def hidden_size(self) -> int:
        """The width of the hidden states, as other encoders call it."""
        return self.d_model


class LDMBertOutput(NamedTuple):
    """The encoder's output."""

    last_hidden_state: jax.Array  # [B,L,d_model], after the final norm


class LDMBertModel(Model):
    """A transformer over token ids, each of which attends to all, padding included.

    Files also have a layer ``to_logits`` from pretraining, whose parameters are kept though nothing reads its output.
    """

    config: LDMBertConfig = LDMBertConfig()
    config_class: ClassVar[type[Config]] = LDMBertConfig
    weights_name: ClassVar[str] = "model"
    model_type: ClassVar[str] = "ldmbert"

    @classmethod
    def library(cls) -> str:
        """The module of PyTorch diffusers' pipelines that ``model_index.json`` names for this class."""
        return "latent_diffusion"

    def example_inputs(self) -> dict[str, Any]:
        return {"input_ids": jax.ShapeDtypeStruct((1, 2), jnp.int32)}

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> LDMBertOutput:
        """Encode ``input_ids [B,L]`` int32, ``L <= max_position_embeddings``.

        Args:
          input_ids: token ids, which are not checked against the vocabulary.
          attention_mask: ``[B,L]``, true (or 1) where a token may be attended to; all may if None, as in the published
            pipeline.

        Returns: hidden states in ``dtype``.

        Raises:
          ValueError: ids or mask have another shape.
        """
        c, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if input_ids.ndim != 2 or input_ids.shape[1] > c.max_position_embeddings:
            raise ValueError(f"input_ids must be [B,L] with L up to {c.max_position_embeddings}, got {input_ids.shape}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask must be {input_ids.shape}, as input_ids, got {attention_mask.shape}")
        mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, None, :]
        states = Encoder(c, **dtypes, name="model")(input_ids, mask)
        Dense(c.vocab_size, **dtypes, name="to_logits")(states[:, :1])  # declares the parameters; never computed
        return LDMBertOutput(states)


class Encoder(Part):
    """Token and position embeddings, the layers and the final norm: ``[B,L] -> [B,L,D]``."""

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array | None) -> jax.Array:
        c = self.config
        x = Embedding(c.vocab_size, c.d_model, **self.dtypes, name="embed_tokens")(ids)
        places = Embedding(c.max_position_embeddings, c.d_model, **self.dtypes, name="embed_positions")
        x = x + places(jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :])
        for i in range(c.encoder_layers):
            x = Layer(c, **self.dtypes, name=f"layers_{i}")(x, mask)
        return LayerNorm(**self.dtypes, name="layer_norm")(x)


class Layer(Part):
    """Self-attention, with heads of a width of their own, and a two-layer perceptron, each after a norm and with a
    residual."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        c = self.config
        norm = lambda name: LayerNorm(**self.dtypes, name=name)(x)
        x = x + Attention(c, **self.dtypes, name="self_attn")(norm("self_attn_layer_norm"), mask)
        h = Dense(c.encoder_ffn_dim, **self.dtypes, name="fc1")(norm("final_layer_norm"))
        return x + Dense(c.d_model, **self.dtypes, name="fc2")(ACTIVATIONS[c.activation_function](h))


class Attention(Part):
    """Multi-head self-attention; only the output's projection has a bias."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        c, (B, L, D) = self.config, x.shape
        heads, width = c.encoder_attention_heads, c.head_dim
        project = lambda name: Dense(heads * width, use_bias=False, **self.dtypes, name=name)(x)
        query, key, value = (project(name).reshape(B, L, heads, width) for name in ("q_proj", "k_proj", "v_proj"))
        h = attention(query, key, value, mask=mask)
        return Dense(D, **self.dtypes, name="out_proj")(h.reshape(B, L, -1))
