"""The two diffusion networks of Würstchen: the prior makes small semantic maps from text, the decoder latents from such
a map (Pernias et al. 2023, arXiv 2306.00637)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffuse_jax.allowed import MAX_REPEATED, Layers, Levels, Range, Share
from diffuse_jax.config import NO_DROPOUT, NOT_QUANTIZED, Config
from diffuse_jax.models.base import Model
from diffuse_jax.models.layers import Conv, Dense
from diffuse_jax.models.resampling import bicubic_antialiased
from diffuse_jax.models.wuerstchen_layers import (
    AttentionBlock,
    ConvBlock,
    Layer,
    TimeBlock,
    Transposed,
    centred,
    shuffled,
    time_embedding,
    unshuffled,
)

KINDS = {"C": "convolution", "T": "time", "A": "attention"}
"""Letter of ``level_config`` -> what the block does."""

MARGIN = 1e-3
"""The decoder's scale is between this and one minus this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WuerstchenPriorConfig(Config):
    """``config.json`` of a ``WuerstchenPrior``: ``c_in`` channels of a map, ``c`` of the network, ``c_cond`` of the
    text's states, ``c_r`` of the time's embedding."""

    class_name: ClassVar[str] = "WuerstchenPrior"
    fixed: ClassVar[Mapping[str, Any]] = NOT_QUANTIZED
    harmless: ClassVar[Mapping[str, str]] = {"dropout": NO_DROPOUT}

    c_in: int = 16
    c: int = 1280
    c_cond: int = 1024
    c_r: int = 64
    depth: Layers = 16
    nhead: int = 16
    dropout: Share = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.class_name, self.c, self.nhead)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WuerstchenDiffNeXtConfig(Config):
    """``config.json`` of a ``WuerstchenDiffNeXt``. Its tuples have one entry for each level, the finest first.

    ``level_config`` has the blocks of a layer as letters: C convolution, T time, A attention. ``inject_effnet`` says
    whether the level's convolutions see the map.
    """

    class_name: ClassVar[str] = "WuerstchenDiffNeXt"
    fixed: ClassVar[Mapping[str, Any]] = NOT_QUANTIZED
    harmless: ClassVar[Mapping[str, str]] = {"dropout": NO_DROPOUT}

    c_in: int = 4
    c_out: int = 4
    c_r: int = 64
    patch_size: int = 2
    c_cond: int = 1024
    c_hidden: Levels = (320, 640, 1280, 1280)
    nhead: tuple[Annotated[int, Range(-1, 65_536)], ...] = (-1, 10, 20, 20)
    blocks: tuple[Layers, ...] = (4, 4, 14, 4)
    level_config: tuple[str, ...] = ("CT", "CTA", "CTA", "CTA")
    inject_effnet: tuple[bool, ...] = (False, True, True, True)
    effnet_embd: int = 16
    clip_embd: int = 1024
    kernel_size: int = 3
    dropout: Share | tuple[Share, ...] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.c_hidden)
        for name in ("nhead", "blocks", "level_config", "inject_effnet"):
            if len(getattr(self, name)) != levels:
                given = len(getattr(self, name))
                raise ValueError(f"{self.class_name}: {name} has {given} entries for the {levels} levels of c_hidden")
        for letters, channels, heads in zip(self.level_config, self.c_hidden, self.nhead, strict=True):
            if unknown := sorted({*letters} - {*KINDS}):
                raise ValueError(f"{self.class_name}: unknown block {unknown[0]!r} in level_config; known: C, T, A")
            if "A" in letters:
                check_heads(self.class_name, channels, heads)
        if (
            count := sum(map(len, (x * n for x, n in zip(self.level_config, self.blocks, strict=True))))
        ) > MAX_REPEATED:
            raise ValueError(f"{self.class_name}: {count} blocks on the way down; at most {MAX_REPEATED}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"{self.class_name}: kernel_size must be odd, got {self.kernel_size}")
        if self.c_in != self.c_out:
            raise ValueError(f"{self.class_name}: c_in and c_out must be equal, got {self.c_in} and {self.c_out}")


def check_heads(name: str, channels: int, heads: int) -> None:
    """Refuse a width that heads do not divide.

    Raises:
      ValueError: it names both.
    """
    if heads < 1 or channels % heads:
        raise ValueError(f"{name}: {channels} channels cannot be split into nhead={heads} heads")


class WuerstchenPrior(Model):
    """Predicts the noise of a semantic map from a text's states."""

    config: WuerstchenPriorConfig = WuerstchenPriorConfig()
    config_class: ClassVar[type[Config]] = WuerstchenPriorConfig

    @classmethod
    def library(cls) -> str:
        """The module of PyTorch diffusers that published folders name for this class."""
        return "wuerstchen"

    def example_inputs(self) -> dict[str, Any]:
        c, shape = self.config, jax.ShapeDtypeStruct
        return {
            "sample": shape((1, 1, 1, c.c_in), jnp.float32),
            "timesteps": shape((1,), jnp.float32),
            "encoder_hidden_states": shape((1, 1, c.c_cond), jnp.float32),
        }

    @nn.compact
    def __call__(self, sample: jax.Array, timesteps: jax.Array, encoder_hidden_states: jax.Array) -> jax.Array:
        """One evaluation.

        Args:
          sample: noisy maps ``[B,h,w,c_in]``, of any size.
          timesteps: from 1 (noise) to 0, ``[B]`` or a scalar.
          encoder_hidden_states: the text's states, ``[B,L,c_cond]``.

        Returns: the predicted noise, ``[B,h,w,c_in]`` in float32.
        """
        c, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        words = Dense(c.c, **dtypes, name="cond_mapper_0")(encoder_hidden_states)
        words = Dense(c.c, **dtypes, name="cond_mapper_2")(nn.leaky_relu(words, 0.2))
        time = time_embedding(timesteps, len(sample), c.c_r).astype(self.dtype)
        x = Conv(c.c, kernel_size=1, padding=0, **dtypes, name="projection")(sample)
        for i in range(0, 3 * c.depth, 3):
            x = ConvBlock(**dtypes, name=f"blocks_{i}")(x)
            x = TimeBlock(**dtypes, name=f"blocks_{i + 1}")(x, time)
            x = AttentionBlock(heads=c.nhead, **dtypes, name=f"blocks_{i + 2}")(x, words)
        both = Conv(2 * c.c_in, kernel_size=1, padding=0, **dtypes, name="out_1")(centred(x)).astype(jnp.float32)
        mean, spread = jnp.split(both, 2, -1)
        return (sample.astype(jnp.float32) - mean) / (jnp.abs(1 - spread) + 1e-5)


class WuerstchenDiffNeXt(Model):
    """Predicts the noise of latents from a semantic map and a text's states."""

    config: WuerstchenDiffNeXtConfig = WuerstchenDiffNeXtConfig()
    config_class: ClassVar[type[Config]] = WuerstchenDiffNeXtConfig

    @classmethod
    def library(cls) -> str:
        """The module of PyTorch diffusers that published folders name for this class."""
        return "wuerstchen"

    def example_inputs(self) -> dict[str, Any]:
        c, shape = self.config, jax.ShapeDtypeStruct
        size = c.patch_size * 2 ** (len(c.c_hidden) - 1)
        return {
            "sample": shape((1, size, size, c.c_in), jnp.float32),
            "timesteps": shape((1,), jnp.float32),
            "effnet": shape((1, 1, 1, c.effnet_embd), jnp.float32),
            "encoder_hidden_states": shape((1, 1, c.clip_embd), jnp.float32),
        }

    @nn.compact
    def __call__(
        self, sample: jax.Array, timesteps: jax.Array, effnet: jax.Array, encoder_hidden_states: jax.Array
    ) -> jax.Array:
        """One evaluation.

        Args:
          sample: noisy latents ``[B,h,w,c_in]``; ``h`` and ``w`` must be multiples of ``patch_size 2**(levels - 1)``.
          timesteps: from 1 (noise) to 0, ``[B]`` or a scalar.
          effnet: semantic maps of any size, ``[B,k,l,effnet_embd]``.
          encoder_hidden_states: the text's states, ``[B,L,clip_embd]``.

        Returns: the predicted noise, ``[B,h,w,c_in]`` in float32.

        Raises:
          ValueError: a side of the latents is not such a multiple.
        """
        c, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        multiple = c.patch_size * 2 ** (len(c.c_hidden) - 1)
        if any(side % multiple for side in sample.shape[1:3]):
            raise ValueError(f"latents must have sides that are multiples of {multiple}, got {sample.shape[1:3]}")
        words = centred(Dense(c.c_cond, **dtypes, name="clip_mapper")(encoder_hidden_states))
        time = time_embedding(timesteps, len(sample), c.c_r).astype(self.dtype)
        pointwise = lambda width, name: Conv(width, kernel_size=1, padding=0, **dtypes, name=name)

        def known(i: int, mapper: int) -> jax.Array | None:
            """The map as level ``i`` sees it."""
            if not c.inject_effnet[i]:
                return None
            size = (sample.shape[1] // c.patch_size >> i, sample.shape[2] // c.patch_size >> i)
            return pointwise(c.c_cond, f"effnet_mappers_{mapper}")(bicubic_antialiased(effnet, size))

        def level(i: int, **options: Any) -> DiffNeXtLevel:
            shape = {"letters": c.level_config[i] * c.blocks[i], "heads": c.nhead[i], "kernel_size": c.kernel_size}
            return DiffNeXtLevel(**shape, **options, **dtypes)

        x = centred(pointwise(c.c_hidden[0], "embedding_1")(unshuffled(sample, c.patch_size)))
        levels, skips = len(c.c_hidden), []
        for i, width in enumerate(c.c_hidden):
            x = level(i, before=width if i else 0, name=f"down_blocks_{i}")(x, time, words, known(i, i))
            skips.append(x)
        for j, i in enumerate(reversed(range(levels))):
            after = c.c_hidden[i - 1] if i else 0
            skip = skips[i] if j else None
            x = level(i, after=after, name=f"up_blocks_{j}")(x, time, words, known(i, levels + j), skip)
        both = shuffled(pointwise(2 * c.c_out * c.patch_size**2, "clf_1")(centred(x)), c.patch_size)
        mean, spread = jnp.split(both.astype(jnp.float32), 2, -1)
        return (sample.astype(jnp.float32) - mean) / (nn.sigmoid(spread) * (1 - 2 * MARGIN) + MARGIN)


class DiffNeXtLevel(Layer):
    """The blocks of one resolution on the way down, after the resolution is halved, or on the way up, before it is
    doubled.

    Attributes:
      letters: the blocks, as keys of :data:`KINDS`.
      heads: of attention.
      kernel_size: of convolutions.
      before: channels to halve the resolution to; 0 leaves it.
      after: channels to double the resolution to; 0 leaves it.
    """

    letters: str = ""
    heads: int = 1
    kernel_size: int = 3
    before: int = 0
    after: int = 0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        time: jax.Array,
        words: jax.Array,
        known: jax.Array | None,
        skip: jax.Array | None = None,
    ) -> jax.Array:
        first = int(self.before > 0)
        if self.before:
            x = Conv(self.before, kernel_size=2, stride=2, padding=0, **self.dtypes, name="0_1")(centred(x))
        for i, letter in enumerate(self.letters):
            name = f"{first + i}"
            if letter == "C":
                beside = [y for y in (skip if i == 0 else None, known) if y is not None]
                block = ConvBlock(kernel_size=self.kernel_size, **self.dtypes, name=name)
                x = block(x, jnp.concatenate(beside, -1) if beside else None)
            elif letter == "T":
                x = TimeBlock(**self.dtypes, name=name)(x, time)
            else:
                x = AttentionBlock(heads=self.heads, **self.dtypes, name=name)(x, words)
        if not self.after:
            return x
        return Transposed(features=self.after, **self.dtypes, name=f"{len(self.letters)}_1")(centred(x))
