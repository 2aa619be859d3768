"""The transformer that CLIP's text and vision encoders share (Radford et al. 2021), and what their configs share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.allowed import Layers, Share
from diffuse_jax.config import NO_DROPOUT, NOT_QUANTIZED, Config
from diffuse_jax.kernels import attention
from diffuse_jax.models.layers import ACTIVATIONS, Dense, LayerNorm

ABOUT_FILES = (
    "_name_or_path",
    "architectures",
    "model_type",
    "text_config_dict",
    "tokenizer_class",
    "transformers_version",
)
ABOUT_OTHERS = (
    *("add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward"),
    *("cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dropout"),
    *("early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task"),
    *("forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label", "is_decoder"),
    *("is_encoder_decoder", "label2id", "length_penalty", "logit_scale_init_value", "max_length", "min_length"),
    *("no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions"),
    *("output_hidden_states", "output_scores", "prefix", "problem_type", "remove_invalid_values"),
    *("repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens"),
    *("task_specific_params", "temperature", "text_config", "tf_legacy_loss", "tie_encoder_decoder"),
    *("tie_word_embeddings", "top_k", "top_p", "torchscript", "typical_p", "use_bfloat16", "use_cache"),
    *("vision_config", "vision_config_dict"),
)
"""Keys that every configuration of transformers has, or has had."""

HARMLESS: Mapping[str, str] = {
    **dict.fromkeys(("initializer_factor", "initializer_range"), "for weights before training"),
    **dict.fromkeys(("dtype", "torch_dtype"), "the caller says what the network computes in"),
    **dict.fromkeys(ABOUT_FILES, "about the file"),
    **dict.fromkeys(ABOUT_OTHERS, "of other kinds of model, or of how PyTorch returns outputs"),
}
"""Keys of transformers' configurations that change no result."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPLayersConfig(Config):
    """What ``config.json`` says of the transformer; the base of the text and the vision encoder's configurations."""

    fixed: ClassVar[Mapping[str, Any]] = {**NOT_QUANTIZED, "pruned_heads": {}}
    harmless: ClassVar[Mapping[str, str]] = {**HARMLESS, "attention_dropout": NO_DROPOUT}

    label: ClassVar[str] = "CLIP"
    """What errors call the network."""
    section: ClassVar[str] = ""
    """The key under which the file of a whole CLIP holds this configuration."""
    model_types: ClassVar[tuple[str, ...]] = ("clip",)
    """The values of ``model_type`` in files that this configuration reads."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: Layers = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Share = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"{self.label}: hidden_act={self.hidden_act!r}; expected one of {sorted(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"{self.label}: hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        if isinstance(data.get(cls.section), Mapping):  # a whole CLIP's file: take this side of it
            top = {"projection_dim": data["projection_dim"]} if "projection_dim" in data else {}
            data = {**data[cls.section], **top}
        if data.get("model_type", cls.model_types[0]) not in cls.model_types:
            raise ValueError(f"expected the config of a {cls.label} encoder, got model_type={data['model_type']!r}")
        return super().from_json(data)


class Part(nn.Module):
    """Base of the encoders' parts: a config and two dtypes."""

    config: Any  # with the fields of CLIPLayersConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def dtypes(self) -> Mapping[str, DTypeLike]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def norm(self, name: str | None = None) -> LayerNorm:
        return LayerNorm(self.config.layer_norm_eps, **self.dtypes, name=name)


class TransformerLayers(Part):
    """All layers; returns their input and every output.

    ``is_causal``: each token attends to itself and to those before it, as in the text encoder.
    """

    is_causal: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """``x [B,L,D]``, ``mask [B,L]``, true where a token may be attended to."""
        states = [x]
        for i in range(self.config.num_hidden_layers):
            layer = TransformerLayer(self.config, **self.dtypes, is_causal=self.is_causal, name=f"layers_{i}")
            states.append(layer(states[-1], mask))
        return tuple(states)


class TransformerLayer(Part):
    """Self-attention and a two-layer perceptron, each after a norm and with a residual."""

    is_causal: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        attend = SelfAttention(self.config, **self.dtypes, is_causal=self.is_causal, name="self_attn")
        x = x + attend(self.norm("layer_norm1")(x), mask)
        return x + MLP(self.config, **self.dtypes, name="mlp")(self.norm("layer_norm2")(x))


class SelfAttention(Part):
    """Multi-head self-attention."""

    is_causal: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        B, L, D = x.shape
        heads = self.config.num_attention_heads
        project = lambda name: Dense(D, **self.dtypes, name=name)(x).reshape(B, L, heads, D // heads)
        query, key, value = project("q_proj"), project("k_proj"), project("v_proj")
        mask = None if mask is None else mask.astype(bool)[:, None, None, :]
        h = attention(query, key, value, mask=mask, is_causal=self.is_causal)
        return Dense(D, **self.dtypes, name="out_proj")(h.reshape(B, L, D))


class MLP(Part):
    """``fc2(act(fc1(x)))``."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = Dense(self.config.intermediate_size, **self.dtypes, name="fc1")(x)
        return Dense(x.shape[-1], **self.dtypes, name="fc2")(ACTIVATIONS[self.config.hidden_act](h))
