"""The autoencoder of Paella and Würstchen: a VQGAN of ConvNeXt-like blocks (Rampas et al. 2022, arXiv 2211.07292)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffuse_jax.allowed import Depth, Layers, Signed
from diffuse_jax.config import NOT_QUANTIZED, Config
from diffuse_jax.models.base import Model
from diffuse_jax.models.codebook import Codebook
from diffuse_jax.models.layers import ACTIVATIONS, Conv, Dense, parameter
from diffuse_jax.models.wuerstchen_layers import Depthwise, Layer, Transposed, centred, shuffled, unshuffled


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaellaVQConfig(Config):
    """``config.json`` of a ``PaellaVQModel``: ``embed_dim`` channels at the coarsest level, half as many at each finer
    one; latents times ``scale_factor`` are what it decodes."""

    class_name: ClassVar[str] = "PaellaVQModel"
    fixed: ClassVar[Mapping[str, Any]] = NOT_QUANTIZED

    in_channels: int = 3
    out_channels: int = 3
    up_down_scale_factor: int = 2
    levels: Layers = 2
    bottleneck_blocks: Depth = 12
    embed_dim: int = 384
    latent_channels: int = 4
    num_vq_embeddings: int = 8192
    scale_factor: Signed = 0.3764

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embed_dim >> (self.levels - 1) < 1:
            raise ValueError(f"PaellaVQModel: embed_dim={self.embed_dim} cannot be halved for {self.levels} levels")

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels of each level, the finest first."""
        return tuple(self.embed_dim >> i for i in reversed(range(self.levels)))

    @property
    def scale(self) -> int:
        """Pixels along the edge of a latent."""
        return self.up_down_scale_factor << (self.levels - 1)


class PaellaVQModel(Model):
    """An autoencoder between images in [0, 1] and latents, which may be quantised."""

    config: PaellaVQConfig = PaellaVQConfig()
    config_class: ClassVar[type[Config]] = PaellaVQConfig

    @classmethod
    def library(cls) -> str:
        """The module of PyTorch diffusers that published folders name for this class."""
        return "wuerstchen"

    def example_inputs(self) -> dict[str, Any]:
        size = self.config.scale
        return {"images": jax.ShapeDtypeStruct((1, size, size, self.config.in_channels), jnp.float32)}

    def setup(self) -> None:
        c, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        finest, coarsest = c.widths[0], c.widths[-1]
        pointwise = lambda width: Conv(width, kernel_size=1, padding=0, **dtypes)
        self.in_block_1 = pointwise(finest)
        down: list[Any] = []
        up: list[Any] = [Entry(features=coarsest, **dtypes)]
        for i, width in enumerate(c.widths):
            down += [Conv(width, kernel_size=4, stride=2, **dtypes)] if i else []
            down += [MixingBlock(**dtypes)]
        for i, width in enumerate(reversed(c.widths)):
            up += [MixingBlock(**dtypes) for _ in range(1 if i else c.bottleneck_blocks)]
            finer = width // 2
            up += [Transposed(features=finer, kernel_size=4, padding=1, **dtypes)] if i + 1 < c.levels else []
        self.down_blocks = [*down, Exit(features=c.latent_channels, **dtypes)]
        self.up_blocks = up
        self.vquantizer = Codebook(c.num_vq_embeddings, c.latent_channels, **dtypes)
        self.out_block_0 = pointwise(c.out_channels * c.up_down_scale_factor**2)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Encode, quantise and decode ``images [B,H,W,in_channels]``."""
        return self.decode(self.encode(images), quantize=True)

    def encode(self, images: jax.Array) -> jax.Array:
        """Images ``[B,H,W,in_channels]`` in [0, 1] to latents ``[B,h,w,latent_channels]`` in float32, not quantised.

        Raises:
          ValueError: a side is not a multiple of ``config.scale``.
        """
        if any(side % self.config.scale for side in images.shape[1:3]):
            raise ValueError(f"images must have sides that are multiples of {self.config.scale}, got {images.shape}")
        x = self.in_block_1(unshuffled(images, self.config.up_down_scale_factor))
        for block in self.down_blocks:
            x = block(x)
        return x.astype(jnp.float32)

    def decode(self, latents: jax.Array, quantize: bool = False) -> jax.Array:
        """Latents to images ``[B,H,W,out_channels]`` in [0, 1], not clipped.

        Args:
          latents: ``[B,h,w,latent_channels]``; those of a diffusion network times ``config.scale_factor``.
          quantize: replace each latent by the nearest vector of the codebook.
        """
        x = self.vquantizer(latents) if quantize else latents
        for block in self.up_blocks:
            x = block(x)
        return shuffled(self.out_block_0(x), self.config.up_down_scale_factor)


class MixingBlock(Layer):
    """A depthwise convolution and two dense layers, each after a norm and with a residual; six learned numbers scale
    and shift them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gammas = parameter(self, "gammas", nn.initializers.zeros_init(), (6,)).astype(x.dtype)
        C = x.shape[-1]
        h = centred(x) * (1 + gammas[0]) + gammas[1]
        h = jnp.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        x = x + Depthwise(padding=0, **self.dtypes, name="depthwise_1")(h) * gammas[2]
        h = centred(x) * (1 + gammas[3]) + gammas[4]
        h = ACTIVATIONS["gelu"](Dense(4 * C, **self.dtypes, name="channelwise_0")(h))
        return x + Dense(C, **self.dtypes, name="channelwise_2")(h) * gammas[5]


class Entry(Layer):
    """The decoder's first layer, ``[B,h,w,c] -> [B,h,w,features]``."""

    features: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Conv(self.features, kernel_size=1, padding=0, **self.dtypes, name="0")(x)


class Exit(Layer):
    """The encoder's last layers: a projection, and the mean and variance of the training data taken out."""

    features: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Conv(self.features, kernel_size=1, padding=0, use_bias=False, **self.dtypes, name="0")(x)
        return BatchStatistics(**self.dtypes, name="1")(x)


class BatchStatistics(Layer):
    """Batch normalisation with fixed statistics (Ioffe and Szegedy 2015); in float32."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        zeros, ones = nn.initializers.zeros_init(), nn.initializers.ones_init()
        shape = (x.shape[-1],)
        named = {"running_mean": zeros, "running_var": ones, "scale": ones, "bias": zeros}
        mean, variance, scale, bias = (
            jnp.asarray(parameter(self, name, init, shape), jnp.float32).reshape(1, 1, 1, -1)
            for name, init in named.items()
        )
        parameter(self, "num_batches_tracked", zeros, ())  # PyTorch counts them, and misses the number in a file
        return (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(variance + self.eps) * scale + bias
