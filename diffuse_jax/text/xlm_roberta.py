"""The encoder of XLM-RoBERTa, a multilingual transformer over subwords (Conneau et al. 2020), in Flax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffuse_jax.allowed import Layers, Range, Share, TokenId
from diffuse_jax.config import NO_DROPOUT, NOT_QUANTIZED, Config
from diffuse_jax.kernels import attention
from diffuse_jax.models.clip_layers import HARMLESS, Part
from diffuse_jax.models.embeddings import Embedding
from diffuse_jax.models.layers import ACTIVATIONS, Dense


@dataclasses.dataclass(frozen=True, kw_only=True)
class XLMRobertaConfig(Config):
    """What ``config.json`` says of an XLM-RoBERTa, as transformers writes it."""

    fixed: ClassVar[Mapping[str, Any]] = {
        **NOT_QUANTIZED,
        "add_cross_attention": False,
        "is_decoder": False,
        "position_embedding_type": "absolute",
        "pruned_heads": {},
    }
    harmless: ClassVar[Mapping[str, str]] = {
        **{name: why for name, why in HARMLESS.items() if name not in ("add_cross_attention", "is_decoder")},
        **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"), NO_DROPOUT),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), "the tokenizer writes the text's first and last token"),
        "output_past": "of how PyTorch returns outputs",
    }
    model_types: ClassVar[tuple[str, ...]] = ("xlm-roberta",)
    """The values of ``model_type`` in files that this configuration reads."""

    vocab_size: Annotated[int, Range(1, 2**22)] = 30522
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: Share = 1e-12
    pad_token_id: TokenId = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        name, heads = type(self).__name__, self.num_attention_heads
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"{name}: hidden_act={self.hidden_act!r}; expected one of {sorted(ACTIVATIONS)}")
        if self.hidden_size % heads:
            raise ValueError(f"{name}: hidden_size {self.hidden_size} is not divisible by num_attention_heads {heads}")
        if not 0 <= self.pad_token_id < min(self.vocab_size, self.max_position_embeddings - 1):
            raise ValueError(
                f"{name}: pad_token_id must be a token of the vocabulary ({self.vocab_size}) that leaves positions "
                f"(max_position_embeddings={self.max_position_embeddings}) after it, got {self.pad_token_id}"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        if data.get("model_type", cls.model_types[0]) not in cls.model_types:
            raise ValueError(f"expected model_type={cls.model_types[0]!r}, got {data['model_type']!r}")
        return super().from_json(data)

    @property
    def longest(self) -> int:
        """The number of tokens that there are positions for: counting begins after the padding's."""
        return self.max_position_embeddings - self.pad_token_id - 1


class XLMRoberta(Part):
    """Embeddings and layers: ``ids [B,L]`` to hidden states ``[B,L,D]`` in ``dtype``.

    ``mask [B,L]``, true where a token may be attended to; all may if None. Files also have a pooling layer from
    pretraining, whose parameters are kept though nothing reads its output.
    """

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array | None) -> jax.Array:
        c = self.config
        if ids.ndim != 2 or ids.shape[1] > c.longest:
            raise ValueError(f"input_ids must be [B,L] with L up to {c.longest}, got {ids.shape}")
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"attention_mask must be {ids.shape}, as input_ids, got {mask.shape}")
        allowed = None if mask is None else mask.astype(bool)[:, None, None, :]
        x = Embeddings(c, **self.dtypes, name="embeddings")(ids)
        x = Stack(c, **self.dtypes, name="encoder")(x, allowed)
        Projected(c, **self.dtypes, width=c.hidden_size, name="pooler")(x[:, 0])  # declares it; never computed
        return x


def positions(ids: jax.Array, padding: int) -> jax.Array:
    """The row of the position table for each token ``[B,L]``: those that are no padding are counted from after it."""
    real = (ids != padding).astype(jnp.int32)
    return padding + real * jnp.cumsum(real, axis=1)


class Embeddings(Part):
    """The normalised sum of the embeddings of token, position and segment, of which there is one: ``[B,L,D]``."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        c = self.config
        table = lambda size, name: Embedding(size, c.hidden_size, **self.dtypes, name=name)
        x = table(c.vocab_size, "word_embeddings")(ids)
        x = x + table(c.max_position_embeddings, "position_embeddings")(positions(ids, c.pad_token_id))
        x = x + table(c.type_vocab_size, "token_type_embeddings")(jnp.zeros((1, 1), jnp.int32))
        return self.norm("LayerNorm")(x)


class Stack(Part):
    """All layers."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        for i in range(self.config.num_hidden_layers):
            x = Layer(self.config, **self.dtypes, name=f"layer_{i}")(x, mask)
        return x


class Layer(Part):
    """Self-attention and a two-layer perceptron, each with a residual and a norm after it."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        c = self.config
        x = Attention(c, **self.dtypes, name="attention")(x, mask)
        h = Projected(c, **self.dtypes, width=c.intermediate_size, name="intermediate")(x)
        return Residual(c, **self.dtypes, name="output")(ACTIVATIONS[c.hidden_act](h), x)


class Attention(Part):
    """Self-attention, its output's projection, the residual and the norm."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        h = Heads(self.config, **self.dtypes, name="self")(x, mask)
        return Residual(self.config, **self.dtypes, name="output")(h, x)


class Heads(Part):
    """The heads of self-attention, side by side: ``[B,L,D] -> [B,L,D]``."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        (B, L, D), heads = x.shape, self.config.num_attention_heads
        split = lambda name: Dense(D, **self.dtypes, name=name)(x).reshape(B, L, heads, D // heads)
        return attention(split("query"), split("key"), split("value"), mask=mask).reshape(B, L, D)


class Projected(Part):
    """One dense layer, by the name that files have for it."""

    width: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Dense(self.width, **self.dtypes, name="dense")(x)


class Residual(Part):
    """``LayerNorm(x + dense(h))``."""

    @nn.compact
    def __call__(self, h: jax.Array, x: jax.Array) -> jax.Array:
        return self.norm("LayerNorm")(x + Dense(x.shape[-1], **self.dtypes, name="dense")(h))
