"""An autoencoder whose larger decoder also sees the image outside a mask (Zhu et al. 2023, 2306.04632)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.allowed import Layers, Levels, Positive
from diffuse_jax.config import NOT_QUANTIZED, Config
from diffuse_jax.models.autoencoder_kl import AutoencoderKLConfig, Posterior, check_images, check_latents
from diffuse_jax.models.autoencoder_layers import Decoder, Encoder
from diffuse_jax.models.base import Model
from diffuse_jax.models.layers import Conv
from diffuse_jax.models.remat import check_policy
from diffuse_jax.models.resnet import nearest

CONDITION_SCALE = 8
"""Pixels per position of the coarsest features of the image that the decoder sees."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AsymmetricAutoencoderKLConfig(Config):
    """``config.json`` of an ``AsymmetricAutoencoderKL``: encoder ("down") and decoder ("up") have their own sizes."""

    class_name: ClassVar[str] = "AsymmetricAutoencoderKL"
    fixed: ClassVar[Mapping[str, Any]] = NOT_QUANTIZED
    harmless: ClassVar[Mapping[str, str]] = {
        **AutoencoderKLConfig.harmless,
        "block_out_channels": "repeats up_block_out_channels",
        "force_upcast": "written by PyTorch diffusers, always false",
    }
    shift_factor: ClassVar[None] = None
    latents_mean: ClassVar[None] = None
    latents_std: ClassVar[None] = None

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    down_block_out_channels: Levels = (64,)
    layers_per_down_block: Layers = 1
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    up_block_out_channels: Levels = (64,)
    layers_per_up_block: Layers = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: Positive = 0.18215

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.down_block_out_channels) == len(self.up_block_out_channels) <= 4:
            raise ValueError(
                f"AsymmetricAutoencoderKL: {len(self.down_block_out_channels)} levels in the encoder and "
                f"{len(self.up_block_out_channels)} in the decoder; both must have the same number, up to 4"
            )
        if self.in_channels != self.out_channels:
            raise ValueError(
                "AsymmetricAutoencoderKL: the decoder sees the encoder's image, so in_channels and out_channels must "
                f"be equal, got {self.in_channels} and {self.out_channels}"
            )
        self.half(self.down_block_out_channels, self.layers_per_down_block)  # its checks are for both halves

    def half(self, widths: tuple[int, ...], layers: int) -> AutoencoderKLConfig:
        """The symmetric autoencoder that has one of the halves."""
        return AutoencoderKLConfig(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            down_block_types=self.down_block_types,
            up_block_types=self.up_block_types,
            block_out_channels=widths,
            layers_per_block=layers,
            act_fn=self.act_fn,
            latent_channels=self.latent_channels,
            norm_num_groups=self.norm_num_groups,
        )

    @property
    def scale(self) -> int:
        """Pixels per latent along an edge: 8 in all published ones."""
        return 2 ** (len(self.up_block_out_channels) - 1)


class AsymmetricAutoencoderKL(Model):
    """As :class:`AutoencoderKL`, with a decoder that can be given the image and a mask of what to replace in it."""

    config: AsymmetricAutoencoderKLConfig = AsymmetricAutoencoderKLConfig()
    remat: str = "none"  # or "blocks", "full": what the backward pass recomputes; see models/remat.py
    config_class: ClassVar[type[Config]] = AsymmetricAutoencoderKLConfig

    def setup(self) -> None:
        c = self.config
        check_policy(self.remat)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        down = c.half(c.down_block_out_channels, c.layers_per_down_block)
        up = c.half(c.up_block_out_channels, c.layers_per_up_block)
        self.encoder = Encoder(down, **dtypes, remat=self.remat)
        self.decoder = MaskedDecoder(up, **dtypes, remat=self.remat)
        self.quant_conv = Conv(2 * c.latent_channels, kernel_size=1, padding=0, **dtypes)
        self.post_quant_conv = Conv(c.latent_channels, kernel_size=1, padding=0, **dtypes)

    def example_inputs(self) -> dict[str, Any]:
        shape = lambda channels: jax.ShapeDtypeStruct((1, CONDITION_SCALE, CONDITION_SCALE, channels), jnp.float32)
        return {"images": shape(self.config.in_channels), "mask": shape(1)}

    def encode(self, images: jax.Array) -> Posterior:
        """``images [B,H,W,3]`` in [-1, 1] -> posterior over latents, float32. ``H``, ``W``: multiples of ``scale``."""
        check_images(images, self.config)
        return Posterior.of_moments(self.quant_conv(self.encoder(jnp.asarray(images, self.dtype))))

    def decode(self, latents: jax.Array, image: jax.Array | None = None, mask: jax.Array | None = None) -> jax.Array:
        """Latents -> images ``[B,H,W,3]``, about [-1, 1], in ``dtype``.

        Args:
          latents: ``[B,h,w,c]``, not scaled.
          image: ``[B,H,W,3]`` in [-1, 1]: the image to keep where ``mask`` is 0.
          mask: ``[B,H,W,1]``, 1 where the latents decide. Without it the image is not looked at, as in PyTorch.

        Raises:
          ValueError: wrong shapes, or a mask without an image.
        """
        c = self.config
        check_latents(latents, c)
        if mask is not None:
            size = (latents.shape[0], latents.shape[1] * c.scale, latents.shape[2] * c.scale)
            for name, given, channels in (("image", image, c.out_channels), ("mask", mask, 1)):
                if given is None or given.shape != (*size, channels):
                    shown = None if given is None else given.shape
                    raise ValueError(f"{name} must be {(*size, channels)} for these latents, got {shown}")
        cast = lambda x: None if x is None else jnp.asarray(x, self.dtype)
        return self.decoder(self.post_quant_conv(cast(latents)), cast(image), cast(mask))

    def __call__(self, images: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Reconstruction through the mode of the posterior; the decoder sees the image where ``mask`` is 0."""
        return self.decode(self.encode(images).mode(), images, mask)


class MaskedDecoder(nn.Module):
    """A decoder whose features are replaced by those of the image where the mask is 0, at every resolution."""

    config: AutoencoderKLConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, z: jax.Array, image: jax.Array | None, mask: jax.Array | None) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        decoder = Decoder(self.config, **dtypes, remat=self.remat, name=None)
        nn.share_scope(self, decoder)
        if image is None or mask is None:
            return decoder(z)
        widths = self.config.block_out_channels
        encode = ConditionEncoder(widths[0], widths[-1], **dtypes, name="condition_encoder")
        features = {x.shape: x for x in encode((1 - mask) * image)}

        def blend(x: jax.Array) -> jax.Array:
            if x.shape not in features:
                raise ValueError(
                    f"up_block_out_channels {list(widths)}: the decoder has {x.shape[-1]} channels at {x.shape[1:3]}, "
                    "where the image's features have another number; widths must double up to the last one"
                )
            keep = nearest(mask, (x.shape[1], x.shape[2]))
            return x * keep + features[x.shape] * (1 - keep)

        return decoder(z, blend)


class ConditionEncoder(nn.Module):
    """Features of an image at full resolution, twice, then at 1/2, 1/4 and 1/8; widths double up to ``widest``."""

    channels: int
    widest: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        widths = [min(self.channels * 2**i, self.widest) for i in range(4)] + [self.widest]
        features = []
        for i, width in enumerate(widths):
            size, stride = (3, 1) if i < 2 else (4, 2)
            x = Conv(width, size, stride=stride, **dtypes, name=f"layers_{i}")(x)
            features.append(x)
            x = nn.relu(x)
        return features
