"""What a text-conditioned UNet and its ControlNets compute alike: the conditions, the way down and the middle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffuse_jax.models.base import Model
from diffuse_jax.models.embeddings import Embedding, TimestepEmbedding, sinusoidal_embedding
from diffuse_jax.models.layers import Dense
from diffuse_jax.models.remat import remat_level
from diffuse_jax.models.unet_blocks import DownBlock, MidBlock
from diffuse_jax.models.unet_config import EncoderConfig


class EncoderModel(Model):
    """Base of networks that begin as a UNet does; its methods make their layers in the caller's ``@nn.compact``."""

    config: EncoderConfig = EncoderConfig()
    remat: str = "none"  # or "blocks", "full": what the backward pass computes again; see models/remat.py

    def example_inputs(self) -> dict[str, Any]:
        c = self.config
        size = 2 ** (len(c.block_out_channels) - 1)
        array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
        inputs: dict[str, Any] = {
            "sample": array(1, size, size, c.in_channels),
            "timesteps": array(1),
            "encoder_hidden_states": array(1, 1, c.text_width),
        }
        if c.addition_embed_type == "text_time":
            pooled = (c.projection_class_embeddings_input_dim or 0) - (c.addition_time_embed_dim or 0)
            inputs["added_cond_kwargs"] = {"text_embeds": array(1, pooled), "time_ids": array(1, 1)}
        if c.class_embed_type in ("projection", "simple_projection", "identity"):
            inputs["class_labels"] = array(1, c.projection_class_embeddings_input_dim or c.time_embed_dim)
        elif c.class_embed_type == "timestep":
            inputs["class_labels"] = array(1)
        elif c.num_class_embeds is not None:
            inputs["class_labels"] = array(1, dtype=jnp.int32)
        return inputs

    def check_inputs(self, sample: jax.Array, encoder_hidden_states: jax.Array) -> None:
        """Raise ``ValueError`` unless the channels and the widths are the configuration's and the batches equal."""
        channels, width = self.config.in_channels, self.config.text_width
        if sample.ndim != 4 or sample.shape[-1] != channels:
            raise ValueError(f"sample must be [B,h,w,{channels}] (channel-last), got {sample.shape}")
        given = encoder_hidden_states.shape
        if len(given) != 3 or (given[0], given[2]) != (sample.shape[0], width):
            raise ValueError(f"encoder_hidden_states must be [B,L,{width}] with B={sample.shape[0]}, got {given}")

    def encode(self, x: jax.Array, temb: jax.Array, context: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """From what ``conv_in`` made to every tensor that the upward path wants, finest first, and the middle's output.

        ``x [B,h,w,C]``, ``temb [B,time_embed_dim]``, ``context [B,L,cross_attention_dim]``.
        """
        c = self.config
        shared = {"dtype": self.dtype, "param_dtype": self.param_dtype, "remat": self.remat}
        down_block, mid_block = (remat_level(level, self.remat) for level in (DownBlock, MidBlock))
        skips, levels = [x], c.down_levels()
        for i, level in enumerate(levels):
            x, new = down_block(c, level, i + 1 < len(levels), **shared, name=f"down_blocks_{i}")(x, temb, context)
            skips += new
        if c.mid_block_type is not None:
            x = mid_block(c, c.mid_level(), **shared, name="mid_block")(x, temb, context)
        return skips, x

    def embed_conditions(
        self,
        batch: int,
        timesteps: jax.Array,
        added: Mapping[str, jax.Array] | None,
        class_labels: jax.Array | None,
        timestep_cond: jax.Array | None,
    ) -> jax.Array:
        """Everything that is not spatial as one vector ``[B,time_embed_dim]``."""
        c = self.config
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        t = jnp.broadcast_to(jnp.asarray(timesteps), (batch,))
        embed = TimestepEmbedding(c.time_embed_dim, c.act_fn, c.time_cond_proj_dim, **dtypes, name="time_embedding")
        temb = embed(self.waves(t, c.block_out_channels[0]), timestep_cond)
        if c.class_embed_type is not None or c.num_class_embeds is not None:
            if class_labels is None:
                raise ValueError("this network needs class_labels (class_embed_type or num_class_embeds is set)")
            labels = self.embed_class(class_labels)
            temb = jnp.concatenate([temb, labels], -1) if c.class_embeddings_concat else temb + labels
        return temb + self.embed_added(batch, added) if c.addition_embed_type == "text_time" else temb

    def embed_class(self, labels: jax.Array) -> jax.Array:
        """Classes, a noise level or a vector, whichever ``class_embed_type`` names, as ``[B,time_embed_dim]``."""
        c = self.config
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype, "name": "class_embedding"}
        match c.class_embed_type:
            case None:
                return Embedding(c.num_class_embeds or 0, c.time_embed_dim, **dtypes)(labels)
            case "timestep":
                waves = self.waves(labels, c.block_out_channels[0])
                return TimestepEmbedding(c.time_embed_dim, c.act_fn, **dtypes)(waves)
            case "projection":  # SiLU whatever act_fn says, and so are added conditions
                return TimestepEmbedding(c.time_embed_dim, **dtypes)(jnp.asarray(labels, self.dtype))
            case "simple_projection":
                return Dense(c.time_embed_dim, **dtypes)(labels)
            case _:
                return jnp.asarray(labels, self.dtype)

    def embed_added(self, batch: int, added: Mapping[str, jax.Array] | None) -> jax.Array:
        """SDXL's pooled text and sizes as ``[B,time_embed_dim]``."""
        c = self.config
        if added is None or {"text_embeds", "time_ids"} - set(added):
            raise ValueError("this network needs added_cond_kwargs={'text_embeds': [B,D], 'time_ids': [B,n]}")
        ids = self.waves(added["time_ids"].reshape(-1), c.addition_time_embed_dim or 0).reshape(batch, -1)
        vector = jnp.concatenate([jnp.asarray(added["text_embeds"], self.dtype), ids], -1)
        if vector.shape[-1] != c.projection_class_embeddings_input_dim:
            raise ValueError(
                f"text_embeds {added['text_embeds'].shape} and time_ids {added['time_ids'].shape} make a vector of "
                f"{vector.shape[-1]}, but this network takes {c.projection_class_embeddings_input_dim}"
            )
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return TimestepEmbedding(c.time_embed_dim, **dtypes, name="add_embedding")(vector)

    def waves(self, t: jax.Array, dim: int) -> jax.Array:
        """Sines and cosines of ``t [B]`` in the order of the checkpoint, ``[B,dim]``."""
        c = self.config
        embedding = sinusoidal_embedding(t, dim, flip_sin_to_cos=c.flip_sin_to_cos, freq_shift=c.freq_shift)
        return embedding.astype(self.dtype)
