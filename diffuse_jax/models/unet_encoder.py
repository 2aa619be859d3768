"""What text-conditioned UNets and their ControlNets share: conditioning, downward path and middle block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffuse_jax.models.added_conditions import IMAGE_TOKENS, ImageAndHint, ImageTokens, PooledText, TextAndImage
from diffuse_jax.models.base import Model
from diffuse_jax.models.embeddings import Embedding, FourierProjection, TimestepEmbedding, sinusoidal_embedding
from diffuse_jax.models.layers import ACTIVATIONS, Dense
from diffuse_jax.models.remat import remat_level
from diffuse_jax.models.unet_blocks import DownBlock, MidBlock, add_residuals
from diffuse_jax.models.unet_config import HINT_CHANNELS, EncoderConfig


class EncoderModel(Model):
    """Base class of networks that begin like a UNet; its methods create layers in the caller's ``@nn.compact``."""

    config: EncoderConfig = EncoderConfig()
    remat: str = "none"  # or "blocks", "full": what the backward pass recomputes; see models/remat.py

    def example_inputs(self) -> dict[str, Any]:
        c = self.config
        size = 2 ** (len(c.block_out_channels) - (not c.has_k_blocks))
        array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
        inputs: dict[str, Any] = {
            "sample": array(1, size, size, c.sample_channels),
            "timesteps": array(1),
        }
        if c.reads_text:
            inputs["encoder_hidden_states"] = array(1, 1, c.text_width)
        if added := {name: array(1, *shape) for name, shape in self.added_shapes(size, size).items()}:
            inputs["added_cond_kwargs"] = added
        if c.class_embed_type in ("projection", "simple_projection", "identity"):
            inputs["class_labels"] = array(1, c.projection_class_embeddings_input_dim or c.time_embed_dim)
        elif c.class_embed_type == "timestep":
            inputs["class_labels"] = array(1)
        elif c.num_class_embeds is not None:
            inputs["class_labels"] = array(1, dtype=jnp.int32)
        return inputs

    def added_shapes(self, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape, without the batch, of what ``added_cond_kwargs`` must have for a sample of that size.

        The number of time ids is what may differ: with one, the embedding of the prompt is the rest.
        """
        c, shapes = self.config, dict[str, tuple[int, ...]]()
        if c.addition_embed_type == "text_time":
            pooled = (c.projection_class_embeddings_input_dim or 0) - (c.addition_time_embed_dim or 0)
            shapes |= {"text_embeds": (pooled,), "time_ids": (1,)}
        if c.image_width is not None:
            shapes["image_embeds"] = (c.image_width,)
        if c.addition_embed_type == "text_image":
            shapes["text_embeds"] = (max(c.per_level("cross_attention_dim")),)
        if c.addition_embed_type == "image_hint":
            shapes["hint"] = (8 * height, 8 * width, 3)
        return shapes

    def check_inputs(
        self,
        sample: jax.Array,
        encoder_hidden_states: jax.Array | None,
        added: Mapping[str, jax.Array] | None = None,
    ) -> None:
        """Raise ``ValueError`` unless channels and widths match the configuration and the batch sizes are equal."""
        channels, width = self.config.sample_channels, self.config.text_width
        if sample.ndim != 4 or sample.shape[-1] != channels:
            raise ValueError(f"sample must be [B,h,w,{channels}] (channel-last), got {sample.shape}")
        B, h, w, _ = sample.shape
        if self.config.has_joint_attention:
            divisor = self.config.divisor
            if h % divisor or w % divisor:
                raise ValueError(
                    f"height and width of this network's sample must be multiples of {divisor}, got {h} x {w}"
                )
        given = None if encoder_hidden_states is None else encoder_hidden_states.shape
        if self.config.reads_text and (given is None or len(given) != 3 or (given[0], given[2]) != (B, width)):
            raise ValueError(f"encoder_hidden_states must be [B,L,{width}] with B={B}, got {given}")
        if self.config.addition_embed_type == "text_time":
            return  # whose widths are checked where they are added up
        for name, shape in self.added_shapes(h, w).items():
            has = (added or {}).get(name)
            if has is None or has.shape != (B, *shape):
                raise ValueError(
                    f"this network needs added_cond_kwargs[{name!r}] of shape {(B, *shape)}, got "
                    f"{None if has is None else has.shape}"
                )

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
        text: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Embedding of timestep, classes and other non-spatial conditioning, ``[B,time_embed_dim]``, and of a hint.

        ``text`` are the prompt embeddings, ``[B,L,D]``, of which some networks add one vector. The hint's features,
        ``[B,h,w,4]`` or None, are what the sample is concatenated with.
        """
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
        hint = None
        if c.addition_embed_type is not None:
            vector, hint = self.embed_added(batch, added or {}, text)
            temb = temb + vector
        return temb if c.time_embedding_act_fn is None else ACTIVATIONS[c.time_embedding_act_fn](temb), hint

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

    def embed_added(
        self, batch: int, added: Mapping[str, jax.Array], text: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Embedding of a pooled prompt, of an image, or of both, ``[B,time_embed_dim]``, and features of a hint."""
        c = self.config
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "name": "add_embedding"}
        given = lambda name: jnp.asarray(added[name], self.dtype)
        match c.addition_embed_type:
            case "text":
                heads = c.addition_embed_type_num_heads
                return PooledText(dim=c.time_embed_dim, heads=heads, **dtypes)(jnp.asarray(text, self.dtype)), None
            case "text_image":
                layer = TextAndImage(dim=c.time_embed_dim, **dtypes)
                return layer(given("text_embeds"), given("image_embeds")), None
            case "image":
                return ImageAndHint(dim=c.time_embed_dim, **dtypes)(given("image_embeds"))
            case "image_hint":
                layer = ImageAndHint(dim=c.time_embed_dim, channels=HINT_CHANNELS, **dtypes)
                return layer(given("image_embeds"), given("hint"))
        return TimestepEmbedding(c.time_embed_dim, **dtypes)(self.size_vector(batch, added)), None

    def context(self, text: jax.Array | None, added: Mapping[str, jax.Array] | None) -> jax.Array:
        """What attention reads beside pixels, ``[B,L,cross_attention_dim]``: the prompt, an image, or both."""
        c, text = self.config, None if text is None else jnp.asarray(text, self.dtype)
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "name": "encoder_hid_proj"}
        width = max(c.per_level("cross_attention_dim"))
        match c.projection:
            case None:
                assert text is not None
                return text
            case "text_proj":
                return Dense(width, **dtypes)(text)
        tokens = ImageTokens(tokens=IMAGE_TOKENS[c.projection], width=width, **dtypes)
        image = jnp.asarray((added or {})["image_embeds"], self.dtype)
        return tokens(image, text if c.reads_text else None)

    def size_vector(self, batch: int, added: Mapping[str, jax.Array]) -> jax.Array:
        """SDXL's pooled prompt embeddings and micro-conditioning, ``[B,projection_class_embeddings_input_dim]``."""
        c = self.config
        if {"text_embeds", "time_ids"} - set(added):
            raise ValueError("this network needs added_cond_kwargs={'text_embeds': [B,D], 'time_ids': [B,n]}")
        ids = self.sinusoids(added["time_ids"].reshape(-1), c.addition_time_embed_dim or 0).reshape(batch, -1)
        vector = jnp.concatenate([jnp.asarray(added["text_embeds"], self.dtype), ids], -1)
        if vector.shape[-1] != c.projection_class_embeddings_input_dim:
            raise ValueError(
                f"text_embeds {added['text_embeds'].shape} and time_ids {added['time_ids'].shape} make a vector of "
                f"{vector.shape[-1]}, but this network takes {c.projection_class_embeddings_input_dim}"
            )
        return vector

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
