"""What text-conditioned UNets and their ControlNets share: conditioning, downward path and middle block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffuse_jax.models.base import Model
from diffuse_jax.models.embeddings import Embedding, FourierProjection, TimestepEmbedding, sinusoidal_embedding
from diffuse_jax.models.layers import Dense
from diffuse_jax.models.remat import remat_level
from diffuse_jax.models.unet_blocks import DownBlock, MidBlock, add_residuals
from diffuse_jax.models.unet_config import EncoderConfig


class EncoderModel(Model):
    """Base class of networks that begin like a UNet; its methods create layers in the caller's ``@nn.compact``."""

    config: EncoderConfig = EncoderConfig()
    remat: str = "none"  # or "blocks", "full": what the backward pass recomputes; see models/remat.py

    def example_inputs(self) -> dict[str, Any]:
        c = self.config
        size = 2 ** (len(c.block_out_channels) - (not c.has_k_blocks))
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
        """Raise ``ValueError`` unless channels and widths match the configuration and the batch sizes are equal."""
        channels, width = self.config.in_channels, self.config.text_width
        if sample.ndim != 4 or sample.shape[-1] != channels:
            raise ValueError(f"sample must be [B,h,w,{channels}] (channel-last), got {sample.shape}")
        given = encoder_hidden_states.shape
        if len(given) != 3 or (given[0], given[2]) != (sample.shape[0], width):
            raise ValueError(f"encoder_hidden_states must be [B,L,{width}] with B={sample.shape[0]}, got {given}")

    def encode(
        self, x: jax.Array, temb: jax.Array, context: jax.Array, residuals: Sequence[jax.Array] = ()
    ) -> tuple[list[jax.Array], jax.Array]:
        """From the output of ``conv_in`` to the skip connections, finest first, and the output of the middle block.

        ``x [B,h,w,C]``, ``temb [B,time_embed_dim]``, ``context [B,L,cross_attention_dim]``; ``residuals`` of an
        adapter for the first levels, each with the shape of what it is added to (:class:`DownBlock`), then for the
        middle block.

        Raises:
          ValueError: there are more residuals than levels and middle block, or one has another shape.
        """
        c = self.config
        places = len(c.block_out_channels) + (c.mid_block_type is not None)
        if len(residuals) > places:
            raise ValueError(f"an adapter adds at most {places} arrays to this network, got {len(residuals)}")
        own = [*residuals, *[None] * (places - len(residuals))]
        shared = {"dtype": self.dtype, "param_dtype": self.param_dtype, "remat": self.remat}
        down_block, mid_block = (remat_level(level, self.remat) for level in (DownBlock, MidBlock))
        skips, levels = [x], c.down_levels()
        for i, level in enumerate(levels):
            x, new = down_block(c, level, i + 1 < len(levels), **shared, name=f"down_blocks_{i}")(
                x, temb, context, own[i]
            )
            skips += new
        if c.mid_block_type is not None:
            x = mid_block(c, c.mid_level(), **shared, name="mid_block")(x, temb, context)
            if own[-1] is not None:
                (x,) = add_residuals([x], [own[-1]], "the adapter's residual of the middle block")
        return skips, x

    def embed_conditions(
        self,
        batch: int,
        timesteps: jax.Array,
        added: Mapping[str, jax.Array] | None,
        class_labels: jax.Array | None,
        timestep_cond: jax.Array | None,
    ) -> jax.Array:
        """Embedding of timestep, classes and other non-spatial conditioning, ``[B,time_embed_dim]``."""
        c = self.config
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        t = jnp.broadcast_to(jnp.asarray(timesteps), (batch,))
        embed = TimestepEmbedding(
            c.time_embed_dim, c.act_fn, c.time_cond_proj_dim, c.timestep_post_act, **dtypes, name="time_embedding"
        )
        temb = embed(self.waves(t), timestep_cond)
        if c.class_embed_type is not None or c.num_class_embeds is not None:
            if class_labels is None:
                raise ValueError("this network needs class_labels (class_embed_type or num_class_embeds is set)")
            labels = self.embed_class(class_labels)
            temb = jnp.concatenate([temb, labels], -1) if c.class_embeddings_concat else temb + labels
        return temb + self.embed_added(batch, added) if c.addition_embed_type == "text_time" else temb

    def embed_class(self, labels: jax.Array) -> jax.Array:
        """Embedding of classes, noise levels or vectors, depending on ``class_embed_type``: ``[B,time_embed_dim]``."""
        c = self.config
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype, "name": "class_embedding"}
        match c.class_embed_type:
            case None:
                return Embedding(c.num_class_embeds or 0, c.time_embed_dim, **dtypes)(labels)
            case "timestep":
                sinusoids = self.sinusoids(labels, c.block_out_channels[0])
                return TimestepEmbedding(c.time_embed_dim, c.act_fn, **dtypes)(sinusoids)
            case "projection":  # always SiLU, whatever act_fn says, as in embed_added
                return TimestepEmbedding(c.time_embed_dim, **dtypes)(jnp.asarray(labels, self.dtype))
            case "simple_projection":
                return Dense(c.time_embed_dim, **dtypes)(labels)
            case _:
                return jnp.asarray(labels, self.dtype)

    def embed_added(self, batch: int, added: Mapping[str, jax.Array] | None) -> jax.Array:
        """Embedding of SDXL's pooled prompt embeddings and micro-conditioning, ``[B,time_embed_dim]``."""
        c = self.config
        if added is None or {"text_embeds", "time_ids"} - set(added):
            raise ValueError("this network needs added_cond_kwargs={'text_embeds': [B,D], 'time_ids': [B,n]}")
        ids = self.sinusoids(added["time_ids"].reshape(-1), c.addition_time_embed_dim or 0).reshape(batch, -1)
        vector = jnp.concatenate([jnp.asarray(added["text_embeds"], self.dtype), ids], -1)
        if vector.shape[-1] != c.projection_class_embeddings_input_dim:
            raise ValueError(
                f"text_embeds {added['text_embeds'].shape} and time_ids {added['time_ids'].shape} make a vector of "
                f"{vector.shape[-1]}, but this network takes {c.projection_class_embeddings_input_dim}"
            )
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return TimestepEmbedding(c.time_embed_dim, **dtypes, name="add_embedding")(vector)

    def waves(self, t: jax.Array) -> jax.Array:
        """What is embedded of timesteps ``[B]``: sines and cosines at fixed frequencies, or at those of the file."""
        c = self.config
        if c.time_embedding_type == "positional":
            return self.sinusoids(t, c.block_out_channels[0])
        project = FourierProjection(
            c.time_embed_dim // 2, c.flip_sin_to_cos, param_dtype=self.param_dtype, name="time_proj"
        )
        return project(t).astype(self.dtype)

    def sinusoids(self, t: jax.Array, dim: int) -> jax.Array:
        """Sinusoidal embedding of ``t [B]`` in the checkpoint's order, ``[B,dim]``."""
        c = self.config
        embedding = sinusoidal_embedding(t, dim, flip_sin_to_cos=c.flip_sin_to_cos, freq_shift=c.freq_shift)
        return embedding.astype(self.dtype)
