"""The encoder of T5 (Raffel et al. 2020) and of its version 1.1, DeepFloyd IF's and others' text encoder, in Flax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.allowed import Layers, Range, Share
from diffuse_jax.config import NO_DROPOUT, NOT_QUANTIZED, Config
from diffuse_jax.models.base import Model
from diffuse_jax.models.clip_layers import HARMLESS, Part
from diffuse_jax.models.embeddings import Embedding
from diffuse_jax.models.layers import Activation, Dense, parameter

FEED_FORWARDS: dict[str, tuple[bool, Activation]] = {
    "relu": (False, nn.relu),
    "gated-gelu": (True, lambda x: nn.gelu(x, approximate=True)),
}
"""``feed_forward_proj`` -> whether a second projection is multiplied to the first, and the first one's activation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(Config):
    """``config.json`` of a T5, as transformers writes it; of the decoder's settings only the names are known."""

    fixed: ClassVar[Mapping[str, Any]] = {**NOT_QUANTIZED, "is_decoder": False}
    harmless: ClassVar[Mapping[str, str]] = {
        **{name: why for name, why in HARMLESS.items() if name != "is_decoder"},
        **dict.fromkeys(("dense_act_fn", "is_gated_act"), "say again what feed_forward_proj says"),
        **dict.fromkeys(("dropout_rate", "classifier_dropout"), NO_DROPOUT),
        **dict.fromkeys(
            ("num_decoder_layers", "scale_decoder_outputs", "n_positions", "output_past"), "of the decoder"
        ),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), "the tokenizer writes and pads the text"),
    }

    vocab_size: Annotated[int, Range(1, 2**22)] = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: Layers = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: Share = 1e-6
    feed_forward_proj: str = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feed_forward_proj not in FEED_FORWARDS:
            raise ValueError(
                f"T5: feed_forward_proj={self.feed_forward_proj!r}; expected one of {sorted(FEED_FORWARDS)}"
            )
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 2 or distance <= buckets // 4:
            raise ValueError(
                "T5: relative_attention_num_buckets must be even, 4 or more, and less than 4 times "
                f"relative_attention_max_distance, got {buckets} and {distance}"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> T5Config:
        if data.get("model_type", "t5") != "t5":
            raise ValueError(f"expected the config of a T5, got model_type={data['model_type']!r}")
        return super().from_json(data)

    @property
    def hidden_size(self) -> int:
        """The width of the hidden states, as other encoders call it."""
        return self.d_model


class T5Output(NamedTuple):
    """The encoder's output."""

    last_hidden_state: jax.Array  # [B,L,d_model], after the final norm


class T5EncoderModel(Model):
    """A transformer over token ids, each of which attends to all, with a bias by relative position.

    Hidden states are summed in float32 whatever ``dtype`` is, and in float16 the feed-forward layer's second projection
    is float32 too: the sums of T5's large sizes overflow float16, and lose what bfloat16 cannot hold.
    """

    config: T5Config = T5Config()
    config_class: ClassVar[type[Config]] = T5Config
    weights_name: ClassVar[str] = "model"
    model_type: ClassVar[str] = "t5"

    def example_inputs(self) -> dict[str, Any]:
        return {"input_ids": jax.ShapeDtypeStruct((1, 2), jnp.int32)}

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> T5Output:
        """Encode ``input_ids [B,L]`` int32, of any length.

        Args:
          input_ids: token ids, which are not checked against the vocabulary.
          attention_mask: ``[B,L]``, true (or 1) where a token may be attended to; all may if None.

        Returns: hidden states in ``dtype``.

        Raises:
          ValueError: ids or mask have another shape.
        """
        if input_ids.ndim != 2 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
            given = None if attention_mask is None else attention_mask.shape
            raise ValueError(f"input_ids and attention_mask must be [B,L], got {input_ids.shape} and {given}")
        c, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Embedding(c.vocab_size, c.d_model, **dtypes, name="shared")(input_ids)
        mask = None if attention_mask is None else attention_mask.astype(bool)
        return T5Output(Stack(c, **dtypes, name="encoder")(x.astype(jnp.float32), mask).astype(self.dtype))


class Stack(Part):
    """All blocks and the final norm; the first block's bias is every block's."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        bias = None
        for i in range(self.config.num_layers):
            x, bias = Block(self.config, **self.dtypes, name=f"block_{i}")(x, mask, bias)
        return ScaleNorm(self.config, **self.dtypes, name="final_layer_norm")(x)


class Block(Part):
    """Self-attention and feed-forward, each after a norm and with a residual."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        attended, bias = AttentionLayer(self.config, **self.dtypes, name="layer_0")(x, mask, bias)
        x = x + attended.astype(jnp.float32)
        return x + FeedForwardLayer(self.config, **self.dtypes, name="layer_1")(x).astype(jnp.float32), bias


class ScaleNorm(Part):
    """Scaling to a mean square of one and by a learned vector, without centring, in float32 (Zhang & Sennrich 2019)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones_init(), x.shape[-1:])
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.config.layer_norm_epsilon)
        return (x * jnp.asarray(scale, jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.dtype)


class AttentionLayer(Part):
    """Norm and attention."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        x = ScaleNorm(self.config, **self.dtypes, name="layer_norm")(x)
        return Attention(self.config, **self.dtypes, name="SelfAttention")(x, mask, bias)


class Attention(Part):
    """Multi-head self-attention whose scores are not scaled and get a bias; also returns the bias ``[1,heads,L,L]``."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        c, (B, L, D) = self.config, x.shape
        dense = lambda width, name: Dense(width, use_bias=False, **self.dtypes, name=name)
        split = lambda name: dense(c.num_heads * c.d_kv, name)(x).reshape(B, L, c.num_heads, c.d_kv)
        query, key, value = split("q"), split("k"), split("v")
        if bias is None:
            table = Embedding(
                c.relative_attention_num_buckets,
                c.num_heads,
                dtype=jnp.float32,
                param_dtype=self.param_dtype,
                name="relative_attention_bias",
            )
            bias = table(buckets(c, L)).transpose(2, 0, 1)[None]
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) + bias
        if mask is not None:
            scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
        shares = jax.nn.softmax(scores, -1).astype(self.dtype)
        h = jnp.einsum("bhqk,bkhd->bqhd", shares, value)
        return dense(D, "o")(h.reshape(B, L, -1)), bias


def buckets(config: T5Config, length: int) -> np.ndarray:
    """The bucket of each distance from a query to a key, int32 ``[L,L]`` (Raffel et al. 2020, 2.1).

    Half of the buckets are for keys behind the query. Of each half, distances below a half of it have a bucket of their
    own, larger ones share buckets whose width grows with the logarithm, up to ``relative_attention_max_distance``.
    """
    half, farthest = config.relative_attention_num_buckets // 2, config.relative_attention_max_distance
    exact = half // 2
    positions = np.arange(length)
    offset = positions[None, :] - positions[:, None]
    distance = np.abs(offset)
    # In float32 and in this order: at the borders of buckets, rounding decides.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    shared = exact + (ratio / np.float32(math.log(farthest / exact)) * np.float32(half - exact)).astype(np.int64)
    found = np.where(distance < exact, distance, np.minimum(shared, half - 1))
    return (found + half * (offset > 0)).astype(np.int32)


class FeedForwardLayer(Part):
    """Norm, and a layer of width ``d_ff`` that a second one may gate (Shazeer 2020), projected back."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ScaleNorm(self.config, **self.dtypes, name="layer_norm")(x)
        return FeedForward(self.config, **self.dtypes, name="DenseReluDense")(x)


class FeedForward(Part):
    """The feed-forward layer without its norm."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        wide = jnp.float32 if self.dtype == jnp.float16 else self.dtype
        dense = lambda width, name, dtype: Dense(
            width, use_bias=False, dtype=dtype, param_dtype=self.param_dtype, name=name
        )
        gated, activation = FEED_FORWARDS[c.feed_forward_proj]
        up = lambda name: dense(c.d_ff, name, self.dtype)(x).astype(wide)
        h = activation(up("wi_0")) * up("wi_1") if gated else activation(up("wi"))
        return dense(x.shape[-1], "wo", wide)(h)
