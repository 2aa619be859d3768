"""The unconditional or class-conditional pixel-space UNet of DDPM (Ho et al. 2020; Dhariwal and Nichol 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.allowed import Index, Layers, Levels, Share, Signed
from diffuse_jax.config import NO_DROPOUT, NOT_QUANTIZED, Config
from diffuse_jax.models.attention import SpatialAttention
from diffuse_jax.models.base import Model
from diffuse_jax.models.embeddings import Embedding, TimestepEmbedding, sinusoidal_embedding
from diffuse_jax.models.layers import ACTIVATIONS, Conv, GroupNorm
from diffuse_jax.models.remat import check_policy, remat_block, remat_level
from diffuse_jax.models.resnet import Downsample, ResnetBlock, Upsample

KINDS = {
    "DownBlock2D": (False, "conv"),
    "UpBlock2D": (False, "conv"),
    "ResnetDownsampleBlock2D": (False, "resnet"),
    "ResnetUpsampleBlock2D": (False, "resnet"),
    "AttnDownBlock2D": (True, None),
    "AttnUpBlock2D": (True, None),
}
"""Block type -> whether it has attention, and how it resamples (None: by ``downsample_type`` or ``upsample_type``)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNet2DConfig(Config):
    """``config.json`` of a ``UNet2DModel``.

    ``time_embedding_type="learned"`` has a table of embeddings for ``num_train_timesteps`` integer timesteps.
    ``attention_head_dim`` is the width of a head; None means a single head. ``attn_norm_num_groups`` is for the middle
    block's attention: None means ``norm_num_groups``, or with ``scale_shift`` no norm.
    """

    class_name: ClassVar[str] = "UNet2DModel"
    fixed: ClassVar[Mapping[str, Any]] = {
        **NOT_QUANTIZED,
        "mid_block_scale_factor": 1,
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "dropout": NO_DROPOUT,
    }

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: Signed = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D",) + ("AttnDownBlock2D",) * 3
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D",) * 3 + ("UpBlock2D",)
    block_out_channels: Levels = (224, 448, 672, 896)
    layers_per_block: Layers = 2
    downsample_padding: Index = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: Share = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: Share = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "mid_block_type": (None, "UNetMidBlock2D"),
            "time_embedding_type": ("positional", "learned"),
            "downsample_type": ("conv", "resnet"),
            "upsample_type": ("conv", "resnet"),
            "resnet_time_scale_shift": ("default", "scale_shift"),
            "class_embed_type": (None, "timestep", "identity"),
            "act_fn": tuple(ACTIVATIONS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"UNet2DModel: {name}={getattr(self, name)!r}; expected one of {allowed}")
        learned = self.time_embedding_type == "learned"
        if learned and (self.num_train_timesteps is None or self.class_embed_type == "timestep"):
            raise ValueError(
                "UNet2DModel: time_embedding_type='learned' needs num_train_timesteps, no class_embed_type='timestep'"
            )
        for name, direction in (("down_block_types", "Down"), ("up_block_types", "Up")):
            kinds, known = getattr(self, name), sorted(kind for kind in KINDS if direction in kind)
            unknown = sorted(set(kinds) - set(known))
            if unknown:
                raise ValueError(f"UNet2DModel: unknown block type {unknown[0]!r} in {name}; known: {known}")
            if len(kinds) != len(self.block_out_channels):
                raise ValueError(
                    f"UNet2DModel: {name} has {len(kinds)} entries for {len(self.block_out_channels)} levels"
                )
        for width in sorted(self.attention_widths()):
            if width % (self.attention_head_dim or width):
                raise ValueError(
                    f"UNet2DModel: attention over {width} channels cannot be split into heads of width "
                    f"attention_head_dim={self.attention_head_dim}"
                )

    def attention_widths(self) -> set[int]:
        """The channel counts of all attention layers."""
        levels = zip(self.block_out_channels, self.down_block_types, self.up_block_types[::-1], strict=True)
        widths = {channels for channels, down, up in levels if KINDS[down][0] or KINDS[up][0]}
        middle = self.mid_block_type is not None and self.add_attention
        return widths | ({self.block_out_channels[-1]} if middle else set())

    @property
    def time_embed_dim(self) -> int:
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def has_classes(self) -> bool:
        """Whether the network takes ``class_labels``."""
        return self.class_embed_type is not None or self.num_class_embeds is not None


class UNet2DModel(Model):
    """Predicts noise (or the sample) from a noisy image, a timestep and, if trained with classes, a class label.

    Dropout is never applied: ``config.dropout`` is only kept to be saved again.
    """

    config: UNet2DConfig = UNet2DConfig()
    remat: str = "none"  # or "blocks", "full": what the backward pass recomputes; see models/remat.py
    config_class: ClassVar[type[Config]] = UNet2DConfig

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
          timesteps: ``[B]`` or a scalar, in units of the training schedule (0 to 999).
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

        x = Conv(c.block_out_channels[0], **dtypes, name="conv_in")(x)
        skips, last = [x], len(c.block_out_channels) - 1
        down_block, mid_block, up_block = (remat_level(level, self.remat) for level in (DownBlock, MidBlock, UpBlock))
        shared = {**dtypes, "remat": self.remat}
        for i, channels in enumerate(c.block_out_channels):
            block = down_block(c, c.down_block_types[i], channels, i < last, **shared, name=f"down_blocks_{i}")
            x, new = block(x, temb)
            skips += new
        if c.mid_block_type is not None:
            x = mid_block(c, "", c.block_out_channels[-1], **shared, name="mid_block")(x, temb)
        for i, channels in enumerate(c.block_out_channels[::-1]):
            taken, skips = skips[-c.layers_per_block - 1 :], skips[: -c.layers_per_block - 1]
            x = up_block(c, c.up_block_types[i], channels, i < last, **shared, name=f"up_blocks_{i}")(x, taken, temb)

        x = GroupNorm(c.norm_num_groups, c.norm_eps, **dtypes, name="conv_norm_out")(x)
        return Conv(c.out_channels, **dtypes, name="conv_out")(nn.silu(x))

    def embed(self, batch: int, timesteps: jax.Array, labels: jax.Array | None) -> jax.Array:
        """Embedding of timestep and class, ``[B,time_embed_dim]``."""
        c = self.config
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if (labels is None) == c.has_classes:
            raise ValueError(
                f"this UNet takes {'' if c.has_classes else 'no '}class_labels (num_class_embeds in its config)"
            )
        sinusoids = lambda t: sinusoidal_embedding(
            t, c.block_out_channels[0], flip_sin_to_cos=c.flip_sin_to_cos, freq_shift=c.freq_shift
        ).astype(self.dtype)
        t = jnp.broadcast_to(jnp.asarray(timesteps), (batch,))
        if c.time_embedding_type == "learned":
            table = Embedding(c.num_train_timesteps or 0, c.block_out_channels[0], **dtypes, name="time_proj")
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


class Block(nn.Module):
    """Base class of the three kinds of block."""

    config: UNet2DConfig
    kind: str
    channels: int
    resamples: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def resnet(self, name: str, x: jax.Array, temb: jax.Array, resample: str | None = None) -> jax.Array:
        c = self.config
        return remat_block(ResnetBlock, self.remat)(
            self.channels,
            c.norm_num_groups,
            c.norm_eps,
            c.act_fn,
            c.resnet_time_scale_shift,
            resample,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )(x, temb)

    def attend(self, i: int, x: jax.Array, groups: int | None) -> jax.Array:
        width = self.config.attention_head_dim or self.channels
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attention = remat_block(SpatialAttention, self.remat)
        heads = self.channels // width
        return x + attention(heads, groups, self.config.norm_eps, **dtypes, name=f"attentions_{i}")(x)

    def layer(self, i: int, x: jax.Array, temb: jax.Array) -> jax.Array:
        """Residual block ``i``, with attention in blocks that have it."""
        x = self.resnet(f"resnets_{i}", x, temb)
        return self.attend(i, x, self.config.norm_num_groups) if KINDS[self.kind][0] else x


class DownBlock(Block):
    """One level of the downward path; returns its output and its skip connections."""

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        c, skips = self.config, []
        for i in range(c.layers_per_block):
            x = self.layer(i, x, temb)
            skips.append(x)
        if self.resamples:
            if (KINDS[self.kind][1] or c.downsample_type) == "resnet":
                x = self.resnet("downsamplers_0", x, temb, "down")
            else:
                dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
                x = Downsample(self.channels, c.downsample_padding, **dtypes, name="downsamplers_0")(x)
            skips.append(x)
        return x, skips


class MidBlock(Block):
    """Residual block, attention unless ``add_attention`` is off, residual block."""

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array) -> jax.Array:
        c = self.config
        x = self.resnet("resnets_0", x, temb)
        if c.add_attention:
            groups = c.norm_num_groups if c.resnet_time_scale_shift == "default" else None
            x = self.attend(0, x, c.attn_norm_num_groups or groups)
        return self.resnet("resnets_1", x, temb)


class UpBlock(Block):
    """One level of the upward path; each residual block takes one skip connection."""

    @nn.compact
    def __call__(self, x: jax.Array, skips: list[jax.Array], temb: jax.Array) -> jax.Array:
        c = self.config
        for i in range(c.layers_per_block + 1):
            x = self.layer(i, jnp.concatenate([x, skips[-1 - i]], -1), temb)
        if not self.resamples:
            return x
        if (KINDS[self.kind][1] or c.upsample_type) == "resnet":
            return self.resnet("upsamplers_0", x, temb, "up")
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Upsample(self.channels, **dtypes, name="upsamplers_0")(x)
