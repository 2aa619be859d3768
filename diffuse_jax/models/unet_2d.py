"""The unconditional or class-conditional pixel-space UNet of DDPM (Ho et al. 2020; Dhariwal and Nichol 2021), and
NCSN++ (Song et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffuse_jax.config import Config
from diffuse_jax.models.base import Model
from diffuse_jax.models.embeddings import Embedding, FourierProjection, TimestepEmbedding, sinusoidal_embedding
from diffuse_jax.models.layers import Conv, GroupNorm
from diffuse_jax.models.remat import check_policy, remat_level
from diffuse_jax.models.unet_2d_blocks import DOWN, UP, MidBlock
from diffuse_jax.models.unet_2d_config import UNet2DConfig, is_skip

__all__ = ["UNet2DConfig", "UNet2DModel"]

FOURIER_DEVIATION = 16.0
"""Standard deviation of the frequencies that noise levels are embedded with (Song et al. 2021, C.2)."""


class UNet2DModel(Model):
    """Predicts noise (or the sample) from a noisy image, a timestep and, if trained with classes, a class label.

    Dropout is never applied: ``config.dropout`` is only kept to be saved again.
    """

    config: UNet2DConfig = UNet2DConfig()
    remat: str = "none"  # or "blocks", "full": what the backward pass recomputes; see models/remat.py
    config_class: ClassVar[type[Config]] = UNet2DConfig

    @property
    def initial_deviations(self) -> Mapping[str, float]:
        """As of other networks."""
        return {"time_proj/weight": FOURIER_DEVIATION} if self.config.time_embedding_type == "fourier" else {}

    def example_inputs(self) -> dict[str, Any]:
        c = self.config
        size = 2 ** (len(c.block_out_channels) - 1)
        inputs: dict[str, Any] = {
            "sample": jax.ShapeDtypeStruct((1, size, size, c.in_channels), jnp.float32),
            "timesteps": jax.ShapeDtypeStruct((1,), jnp.float32),
        }
        if c.has_classes:
            width = (c.time_embed_dim,) if c.class_embed_type == "identity" else ()
            dtype = jnp.int32 if c.class_embed_type is None else jnp.float32
            inputs["class_labels"] = jax.ShapeDtypeStruct((1, *width), dtype)
        return inputs

    @nn.compact
    def __call__(self, sample: jax.Array, timesteps: jax.Array, class_labels: jax.Array | None = None) -> jax.Array:
        """One evaluation of the network.

        Args:
          sample: ``[B,h,w,in_channels]``; ``h`` and ``w`` must halve evenly at every level.
          timesteps: ``[B]`` or a scalar, in units of the training schedule (0 to 999); noise levels above 0 for
            ``time_embedding_type="fourier"``.
          class_labels: ``[B]`` integers (real numbers for ``class_embed_type="timestep"``), ``[B,D]`` for "identity".

        Returns: ``[B,h,w,out_channels]`` in ``dtype``.

        Raises:
          ValueError: the channels of ``sample`` are wrong, its edges do not halve evenly at every level, or
            ``class_labels`` are missing or unexpected.
        """
        c = self.config
        check_policy(self.remat)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if sample.ndim != 4 or sample.shape[-1] != c.in_channels:
            raise ValueError(f"sample must be [B,h,w,{c.in_channels}] (channel-last), got {sample.shape}")
        multiple = 2 ** (len(c.block_out_channels) - 1)
        if any(edge % multiple for edge in sample.shape[1:3]):
            raise ValueError(f"height and width of sample must be multiples of {multiple}, got {sample.shape[1:3]}")
        temb = self.embed(sample.shape[0], timesteps, class_labels)
        x = jnp.asarray(sample, self.dtype)
        if c.center_input_sample:
            x = 2 * x - 1

        image, x = x, Conv(c.block_out_channels[0], **dtypes, name="conv_in")(x)
        skips, last = [x], len(c.block_out_channels) - 1
        shared = {**dtypes, "remat": self.remat}
        for i, (kind, channels) in enumerate(zip(c.down_block_types, c.block_out_channels, strict=True)):
            level = remat_level(DOWN[is_skip(kind)], self.remat)
            x, new, image = level(c, kind, channels, i < last, **shared, name=f"down_blocks_{i}")(x, temb, image)
            skips += new
        if c.mid_block_type is not None:
            middle = remat_level(MidBlock, self.remat)
            x = middle(c, "", c.block_out_channels[-1], **shared, name="mid_block")(x, temb)
        added = None
        for i, (kind, channels) in enumerate(zip(c.up_block_types, c.block_out_channels[::-1], strict=True)):
            taken, skips = skips[-c.layers_per_block - 1 :], skips[: -c.layers_per_block - 1]
            level = remat_level(UP[is_skip(kind)], self.remat)
            x, added = level(c, kind, channels, i < last, **shared, name=f"up_blocks_{i}")(x, taken, temb, added)

        x = GroupNorm(c.groups(x.shape[-1]), c.norm_eps, **dtypes, name="conv_norm_out")(x)
        x = Conv(c.out_channels, **dtypes, name="conv_out")(nn.silu(x))
        x = x if added is None else x + added
        if c.time_embedding_type != "fourier":
            return x
        levels = jnp.broadcast_to(jnp.asarray(timesteps, jnp.float32), (len(x),)).reshape(-1, 1, 1, 1)
        return (x.astype(jnp.float32) / levels).astype(self.dtype)

    def embed(self, batch: int, timesteps: jax.Array, labels: jax.Array | None) -> jax.Array:
        """Embedding of timestep and class, ``[B,time_embed_dim]``."""
        c = self.config
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if (labels is None) == c.has_classes:
            raise ValueError(
                f"this UNet takes {'' if c.has_classes else 'no '}class_labels (num_class_embeds in its config)"
            )
        width = c.block_out_channels[0]
        project: Callable[[jax.Array], jax.Array]
        if c.time_embedding_type == "fourier":
            spread = {"deviation": FOURIER_DEVIATION, "param_dtype": self.param_dtype}
            project = FourierProjection(width, False, log=True, **spread, name="time_proj")
        else:
            project = lambda t: sinusoidal_embedding(
                t, width, flip_sin_to_cos=c.flip_sin_to_cos, freq_shift=c.freq_shift
            )
        sinusoids = lambda t: project(t).astype(self.dtype)
        t = jnp.broadcast_to(jnp.asarray(timesteps), (batch,))
        if c.time_embedding_type == "learned":
            table = Embedding(c.num_train_timesteps or 0, width, **dtypes, name="time_proj")
            features = table(t.astype(jnp.int32))
        else:
            features = sinusoids(t)
        temb = TimestepEmbedding(c.time_embed_dim, **dtypes, name="time_embedding")(features)
        match c.class_embed_type:
            case None if labels is not None:
                table = Embedding(c.num_class_embeds or 0, c.time_embed_dim, **dtypes, name="class_embedding")
                return temb + table(labels)
            case "timestep":
                return temb + TimestepEmbedding(c.time_embed_dim, **dtypes, name="class_embedding")(sinusoids(labels))
            case "identity":
                return temb + jnp.asarray(labels, self.dtype)
        return temb
