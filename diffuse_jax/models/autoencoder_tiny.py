"""Tiny autoencoders distilled from the large ones (TAESD, madebyollin): previews, and latents without much memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.allowed import Positive, Range, Signed
from diffuse_jax.config import NOT_QUANTIZED, Config
from diffuse_jax.models.autoencoder_kl import check_images, check_latents
from diffuse_jax.models.base import Model
from diffuse_jax.models.layers import ACTIVATIONS, Conv, GroupNorm
from diffuse_jax.models.remat import check_policy, remat_block
from diffuse_jax.models.resampling import bilinear
from diffuse_jax.models.resnet import nearest

UPSAMPLING = ("nearest", "bilinear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderTinyConfig(Config):
    """``config.json`` of an ``AutoencoderTiny``.

    ``latent_magnitude`` and ``latent_shift`` map latents to [0, 1] and to bytes, see :meth:`AutoencoderTiny.to_unit`.
    ``use_midblock_gn`` is for weights of later releases (FLUX.2's), which diffusers has no class for: the blocks at the
    resolution of the latents begin with a normalised branch.
    """

    class_name: ClassVar[str] = "AutoencoderTiny"
    fixed: ClassVar[Mapping[str, Any]] = NOT_QUANTIZED
    harmless: ClassVar[Mapping[str, str]] = {
        "block_out_channels": "repeats decoder_block_out_channels",
        "force_upcast": "these autoencoders do not overflow",
    }
    latents_mean: ClassVar[None] = None
    latents_std: ClassVar[None] = None

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    upsample_fn: str = "nearest"
    latent_channels: int = 4
    upsampling_scaling_factor: Annotated[int, Range(1, 16)] = 2
    num_encoder_blocks: tuple[Annotated[int, Range(0, 64)], ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[Annotated[int, Range(0, 64)], ...] = (3, 3, 3, 1)
    latent_magnitude: Positive = 3
    latent_shift: Signed = 0.5
    force_upcast: bool = False
    scaling_factor: Positive = 1.0
    shift_factor: Signed | None = 0.0
    use_midblock_gn: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for side in ("encoder", "decoder"):
            widths, blocks = getattr(self, f"{side}_block_out_channels"), getattr(self, f"num_{side}_blocks")
            if len(widths) != len(blocks) or not 0 < len(blocks) <= 8 or len(set(widths)) != 1:
                raise ValueError(
                    f"AutoencoderTiny: {side}_block_out_channels={list(widths)} must be one width, repeated for each "
                    f"of the {len(blocks)} (1 to 8) entries of num_{side}_blocks"
                )
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(f"AutoencoderTiny: act_fn={self.act_fn!r}; expected one of {tuple(ACTIVATIONS)}")
        if self.upsample_fn not in UPSAMPLING:
            raise ValueError(f"AutoencoderTiny: upsample_fn={self.upsample_fn!r}; expected one of {UPSAMPLING}")
        halved = 2 ** (len(self.num_encoder_blocks) - 1)
        if halved != self.scale:
            raise ValueError(
                f"AutoencoderTiny: num_encoder_blocks makes {halved} pixels a latent, num_decoder_blocks and "
                f"upsampling_scaling_factor make a latent {self.scale} pixels"
            )

    @property
    def scale(self) -> int:
        """Pixels per latent along an edge: 8 in all published ones."""
        return int(self.upsampling_scaling_factor ** (len(self.num_decoder_blocks) - 1))

    def to_json(self) -> dict[str, Any]:
        found = super().to_json()
        return found if self.use_midblock_gn else {k: v for k, v in found.items() if k != "use_midblock_gn"}


class Encoded(NamedTuple):
    """Latents ``[B,h,w,c]`` of an encoder without randomness, with the methods of a ``Posterior``."""

    latents: jax.Array

    def sample(self, key: jax.Array) -> jax.Array:
        """The latents, whatever ``key`` is."""
        return self.latents

    def mode(self) -> jax.Array:
        """The latents."""
        return self.latents


class AutoencoderTiny(Model):
    """Maps images ``[B,H,W,3]`` in [-1, 1] to latents ``[B,H/scale,W/scale,latent_channels]`` and back.

    A pipeline takes it as its ``vae``: its latents are those of the large autoencoder that it was distilled from,
    already scaled (``scaling_factor`` is 1).
    """

    config: AutoencoderTinyConfig = AutoencoderTinyConfig()
    remat: str = "none"  # or "blocks", "full": what the backward pass recomputes; see models/remat.py
    config_class: ClassVar[type[Config]] = AutoencoderTinyConfig

    def setup(self) -> None:
        check_policy(self.remat)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.encoder = EncoderTiny(self.config, self.remat, **dtypes)
        self.decoder = DecoderTiny(self.config, self.remat, **dtypes)

    def example_inputs(self) -> dict[str, Any]:
        edge = self.config.scale
        return {"images": jax.ShapeDtypeStruct((1, edge, edge, self.config.in_channels), jnp.float32)}

    def encode(self, images: jax.Array) -> Encoded:
        """``images [B,H,W,3]`` in [-1, 1] -> latents, float32. ``H``, ``W``: multiples of ``scale``."""
        check_images(images, self.config)
        return Encoded(self.encoder(jnp.asarray(images, self.dtype)).astype(jnp.float32))

    def decode(self, latents: jax.Array) -> jax.Array:
        """``latents [B,h,w,c]`` (not scaled) -> images ``[B,H,W,3]``, about [-1, 1], in ``dtype``."""
        check_latents(latents, self.config)
        return self.decoder(jnp.asarray(latents, self.dtype))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Reconstruction through latents that are rounded to bytes, as an RGBA image stores them."""
        rounded = jnp.round(self.to_unit(self.encode(images).latents) * 255) / 255
        return self.decode(self.from_unit(rounded))

    @nn.nowrap
    def to_unit(self, latents: jax.Array) -> jax.Array:
        """Latents -> [0, 1], clipped."""
        return jnp.clip(latents / (2 * self.config.latent_magnitude) + self.config.latent_shift, 0, 1)

    @nn.nowrap
    def from_unit(self, values: jax.Array) -> jax.Array:
        """The inverse of :meth:`to_unit`."""
        return (values - self.config.latent_shift) * (2 * self.config.latent_magnitude)


class TinyPart(nn.Module):
    """Base of both halves: a config, a remat policy and two dtypes. Layers are numbered as PyTorch's list has them."""

    config: AutoencoderTinyConfig
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def dtypes(self) -> Mapping[str, DTypeLike]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def blocks(self, x: jax.Array, count: int, first: int, normalised: bool) -> jax.Array:
        """``count`` residual blocks, the layers from ``first`` on."""
        block = remat_block(TinyBlock, self.remat)
        for i in range(first, first + count):
            x = block(self.config.act_fn, normalised, **self.dtypes, name=f"layers_{i}")(x)
        return x

    def conv(self, channels: int, index: int, **options: Any) -> Conv:
        return Conv(channels, **options, **self.dtypes, name=f"layers_{index}")


class TinyBlock(nn.Module):
    """Three convolutions with activations between them, and a residual; ``normalised`` adds a branch before."""

    act_fn: str
    normalised: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        C, act = x.shape[-1], ACTIVATIONS[self.act_fn]
        if self.normalised:
            mix = lambda channels, name: Conv(channels, 1, padding=0, use_bias=False, **dtypes, name=name)
            h = GroupNorm(4, 1e-5, **dtypes, name="pool_1")(mix(4 * C, "pool_0")(x))
            x = x + mix(C, "pool_3")(nn.relu(h))
        h = act(Conv(C, **dtypes, name="conv_0")(x))
        h = act(Conv(C, **dtypes, name="conv_2")(h))
        return nn.relu(x + Conv(C, **dtypes, name="conv_4")(h))


class EncoderTiny(TinyPart):
    """Images in [-1, 1] -> latents."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, index = self.config, 0
        x = (x + 1) / 2
        for i, (width, count) in enumerate(zip(c.encoder_block_out_channels, c.num_encoder_blocks, strict=True)):
            conv = self.conv(width, index, stride=2, use_bias=False) if i else self.conv(width, index)
            coarsest = i + 1 == len(c.num_encoder_blocks)
            x = self.blocks(conv(x), count, index + 1, c.use_midblock_gn and coarsest)
            index += 1 + count
        return self.conv(c.latent_channels, index)(x)


class DecoderTiny(TinyPart):
    """Latents, squashed to [-3, 3] -> images in [-1, 1]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, index = self.config, 2
        x = self.conv(c.decoder_block_out_channels[0], 0)(jnp.tanh(x / 3) * 3)
        x = ACTIVATIONS[c.act_fn](x)
        for i, (width, count) in enumerate(zip(c.decoder_block_out_channels, c.num_decoder_blocks, strict=True)):
            x = self.blocks(x, count, index, c.use_midblock_gn and i == 0)
            index += count
            if i + 1 < len(c.num_decoder_blocks):
                x = enlarged(x, c.upsampling_scaling_factor, c.upsample_fn)
                x = self.conv(width, index + 1, use_bias=False)(x)
                index += 2
        return self.conv(c.out_channels, index)(x) * 2 - 1


def enlarged(x: jax.Array, factor: int, how: str) -> jax.Array:
    """``[B,H,W,C]`` with ``factor`` times as many rows and columns; "nearest" or "bilinear"."""
    size = (x.shape[1] * factor, x.shape[2] * factor)
    return nearest(x, size) if how == "nearest" else bilinear(x, size)
