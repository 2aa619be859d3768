"""The prior of unCLIP models: a causal transformer that denoises CLIP image embeddings (Ramesh et al. 2022, 2.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.allowed import Index, Layers, Share
from diffuse_jax.config import NO_DROPOUT, NOT_QUANTIZED, Config
from diffuse_jax.models.attention import GELU, Attention, FeedForward
from diffuse_jax.models.base import Model
from diffuse_jax.models.embeddings import TimestepEmbedding, sinusoidal_embedding
from diffuse_jax.models.layers import ACTIVATIONS, Dense, LayerNorm, parameter

CHOICES: Mapping[str, tuple[str | None, ...]] = {
    "norm_in_type": (None, "layer"),
    "embedding_proj_norm_type": (None, "layer"),
    "encoder_hid_proj_type": (None, "linear"),
    "added_emb_type": (None, "prd"),
    "time_embed_act_fn": tuple(ACTIVATIONS),
}
"""Field -> the values that it may have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorTransformerConfig(Config):
    """``config.json`` of a ``PriorTransformer``.

    The sequence is: ``num_embeddings`` text tokens (if ``encoder_hid_proj_type``), the projected embedding, the
    timestep, the noisy image embedding and a learned token whose output is the result (if ``added_emb_type``; without
    it, the results are the outputs at the noisy embeddings). Widths that are None are those of ``embedding_dim``; the
    timestep's is that of the layers.
    """

    class_name: ClassVar[str] = "PriorTransformer"
    fixed: ClassVar[Mapping[str, Any]] = {**NOT_QUANTIZED}
    harmless: ClassVar[Mapping[str, str]] = {"dropout": NO_DROPOUT}

    num_attention_heads: int = 32
    attention_head_dim: int = 64
    num_layers: Layers = 20
    embedding_dim: int = 768
    num_embeddings: int = 77
    additional_embeddings: Index = 4
    dropout: Share = 0.0
    time_embed_act_fn: str = "silu"
    norm_in_type: str | None = None
    embedding_proj_norm_type: str | None = None
    encoder_hid_proj_type: str | None = "linear"
    added_emb_type: str | None = "prd"
    time_embed_dim: int | None = None
    embedding_proj_dim: int | None = None
    clip_embed_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"PriorTransformer: {name}={value!r}; expected one of {allowed}")

    @property
    def width(self) -> int:
        """The width of a token inside the transformer."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def output_dim(self) -> int:
        """The width of the predicted embedding."""
        return self.clip_embed_dim or self.embedding_dim


class PriorTransformer(Model):
    """Predicts a clean CLIP image embedding from a noisy one, its timestep, and a prompt's embedding and tokens."""

    config: PriorTransformerConfig = PriorTransformerConfig()
    config_class: ClassVar[type[Config]] = PriorTransformerConfig

    def setup(self) -> None:
        c, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        own = lambda name, *shape: parameter(self, name, nn.initializers.zeros_init(), shape)
        self.time_embedding = TimestepEmbedding(
            c.time_embed_dim or c.width, act_fn=c.time_embed_act_fn, out_dim=c.width, **dtypes
        )
        self.proj_in = Dense(c.width, **dtypes)
        if c.embedding_proj_norm_type:
            self.embedding_proj_norm = LayerNorm(**dtypes)
        self.embedding_proj = Dense(c.width, **dtypes)
        if c.encoder_hid_proj_type:
            self.encoder_hidden_states_proj = Dense(c.width, **dtypes)
        self.positional_embedding = own("positional_embedding", 1, c.num_embeddings + c.additional_embeddings, c.width)
        if c.added_emb_type:
            self.prd_embedding = own("prd_embedding", 1, 1, c.width)
        self.transformer_blocks = [PriorBlock(c.num_attention_heads, **dtypes) for _ in range(c.num_layers)]
        if c.norm_in_type:
            self.norm_in = LayerNorm(**dtypes)
        self.norm_out = LayerNorm(**dtypes)
        self.proj_to_clip_embeddings = Dense(c.output_dim, **dtypes)
        self.clip_mean, self.clip_std = own("clip_mean", 1, c.output_dim), own("clip_std", 1, c.output_dim)

    def example_inputs(self) -> dict[str, Any]:
        c = self.config
        shape = lambda *dims: jax.ShapeDtypeStruct((1, *dims), jnp.float32)
        count = max(1, c.additional_embeddings - 2) if c.encoder_hid_proj_type else c.num_embeddings
        inputs = {
            "hidden_states": shape(c.embedding_dim) if c.added_emb_type else shape(count, c.embedding_dim),
            "timesteps": shape(),
            "proj_embedding": shape(c.embedding_proj_dim or c.embedding_dim),
        }
        text = {"encoder_hidden_states": shape(c.num_embeddings, c.embedding_dim)} if c.encoder_hid_proj_type else {}
        return inputs | text

    def __call__(
        self,
        hidden_states: jax.Array,
        timesteps: jax.Array,
        proj_embedding: jax.Array,
        encoder_hidden_states: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
    ) -> jax.Array:
        """The predicted image embedding ``[B,output_dim]``; without ``added_emb_type`` one per token,
        ``[B,N,output_dim]``.

        Args:
          hidden_states: the noisy embedding ``[B,embedding_dim]``, or several, ``[B,N,embedding_dim]``.
          timesteps: ``[B]`` or a scalar.
          proj_embedding: the embedding that conditions the prediction, ``[B,embedding_proj_dim]``, or several.
          encoder_hidden_states: the prompt's hidden states ``[B,num_embeddings,embedding_dim]``.
          attention_mask: ``[B,num_embeddings]``, true where a text token may be attended to. With it, attention is
            causal; without it, every token attends to every other one.

        Raises:
          ValueError: hidden states are missing or not of the length that the config gives.
        """
        c = self.config
        timesteps = jnp.broadcast_to(timesteps, hidden_states.shape[:1])
        text = [] if encoder_hidden_states is None else [encoder_hidden_states]
        if len(text) != bool(c.encoder_hid_proj_type):
            wanted = "needs" if c.encoder_hid_proj_type else "takes no"
            raise ValueError(f"this PriorTransformer {wanted} encoder_hidden_states (encoder_hid_proj_type)")
        projected = proj_embedding
        if c.embedding_proj_norm_type:
            projected = self.embedding_proj_norm(projected)
        time = sinusoidal_embedding(timesteps, c.width).astype(self.dtype)
        given = [
            *(self.encoder_hidden_states_proj(states) for states in text),
            as_tokens(self.embedding_proj(projected)),
            as_tokens(self.time_embedding(time)),
        ]
        before = sum(part.shape[1] for part in given)
        x = jnp.concatenate([*given, as_tokens(self.proj_in(hidden_states)), *self.last_token(len(timesteps))], axis=1)
        x = x + self.positions(x.shape[1], before)
        mask = None if attention_mask is None else causal_mask(attention_mask, x.shape[1])
        x = self.norm_in(x) if c.norm_in_type else x
        for block in self.transformer_blocks:
            x = block(x, mask)
        x = self.norm_out(x)
        return self.proj_to_clip_embeddings(x[:, -1] if c.added_emb_type else x[:, before:])

    def last_token(self, batch: int) -> list[jax.Array]:
        """The learned token ``[B,1,width]`` whose output is the prediction, if there is one."""
        if not self.config.added_emb_type:
            return []
        return [jnp.broadcast_to(jnp.asarray(self.prd_embedding, self.dtype), (batch, 1, self.config.width))]

    def positions(self, length: int, before: int) -> jax.Array:
        """The positions' embeddings ``[1,length,width]``. If the table is for the noisy embeddings alone, those of the
        ``before`` tokens in front of them and of the learned one are zero."""
        table = jnp.asarray(self.positional_embedding, self.dtype)
        if table.shape[1] < length:
            table = jnp.pad(table, ((0, 0), (before, bool(self.config.added_emb_type)), (0, 0)))
        if table.shape[1] != length:
            c = self.config
            raise ValueError(
                f"the sequence has {length} tokens, but there are positions for {c.num_embeddings} text tokens and "
                f"{c.additional_embeddings} more"
            )
        return table

    def unnormalised(self, embeddings: jax.Array) -> jax.Array:
        """CLIP image embeddings from a sample ``[B,output_dim]``, in float32: the samples have about unit variance."""
        mean, std = (jnp.asarray(x, jnp.float32) for x in (self.clip_mean, self.clip_std))
        return jnp.asarray(embeddings, jnp.float32) * std + mean


class PriorBlock(nn.Module):
    """Self-attention and feed-forward, each after a norm and with a residual."""

    heads: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """``x [B,L,D]``, ``mask [B,1,L,L]``, true where a token attends to another -> ``[B,L,D]``."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attend = Attention(self.heads, qkv_bias=True, **dtypes, name="attn1")
        x = x + attend(LayerNorm(**dtypes, name="norm1")(x), mask=mask)
        return x + FeedForward(GELU, **dtypes, name="ff")(LayerNorm(**dtypes, name="norm3")(x))


def as_tokens(x: jax.Array) -> jax.Array:
    """``[B,D]`` as a sequence of one token, ``[B,1,D]``; a sequence as it is."""
    return x[:, None] if x.ndim == 2 else x


def causal_mask(attention_mask: jax.Array, length: int) -> jax.Array:
    """``[B,1,length,length]``: each token attends to itself and to those before it, except for masked ones."""
    keys = jnp.pad(attention_mask.astype(bool), ((0, 0), (0, length - attention_mask.shape[1])), constant_values=True)
    before = jnp.tri(length, dtype=bool)
    return (keys[:, None, :] & before[None])[:, None]
