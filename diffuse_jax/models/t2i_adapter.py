"""T2I-Adapters: small networks that read an image once and steer a UNet in every step (Mou et al. 2023, 2302.08453)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.allowed import Layers, Range
from diffuse_jax.config import NOT_QUANTIZED, Config
from diffuse_jax.models.base import Model
from diffuse_jax.models.layers import Conv
from diffuse_jax.models.one_file import OneFile
from diffuse_jax.models.remat import check_policy, remat_block
from diffuse_jax.models.resnet import halve


class Stage(NamedTuple):
    """One resolution of an adapter; its features have ``channels``, the blocks inside have ``width``."""

    channels: int
    width: int
    halved: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class T2IAdapterConfig(Config):
    """``config.json`` of a ``T2IAdapter``.

    ``adapter_type``: "full_adapter" for Stable Diffusion 1.x has one stage for each of the ``channels``, each at half
    the resolution of the one before; "full_adapter_xl" for SDXL halves only at the third; "light_adapter" has narrow
    blocks and one more stage with the last number of channels. ``downscale_factor`` is how many pixels along an edge
    are one position of the first features.
    """

    class_name: ClassVar[str] = "T2IAdapter"
    fixed: ClassVar[Mapping[str, Any]] = NOT_QUANTIZED
    types: ClassVar[tuple[str, ...]] = ("full_adapter", "full_adapter_xl", "light_adapter")

    in_channels: int = 3
    channels: tuple[Annotated[int, Range(1, 65_536)], ...] = (320, 640, 1280, 1280)
    num_res_blocks: Layers = 2
    downscale_factor: Annotated[int, Range(1, 64)] = 8
    adapter_type: str = "full_adapter"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter_type not in self.types:
            raise ValueError(f"T2IAdapter: adapter_type={self.adapter_type!r}; expected one of {self.types}")
        if not self.channels:
            raise ValueError("T2IAdapter: channels must have at least one entry")
        if self.adapter_type == "full_adapter_xl" and len({*self.channels[2:]}) > 1:
            raise ValueError(
                "T2IAdapter: channels of adapter_type='full_adapter_xl' must be equal from the third on, got "
                f"{self.channels}"
            )
        if self.adapter_type == "light_adapter" and min(self.channels) < 4:
            raise ValueError(f"T2IAdapter: channels of adapter_type='light_adapter' must be 4 or more: {self.channels}")

    @property
    def light(self) -> bool:
        """Whether the blocks are narrower than the features."""
        return self.adapter_type == "light_adapter"

    def stages(self) -> list[Stage]:
        """The stages, finest first."""
        if self.light:
            return [Stage(c, c // 4, i > 0) for i, c in enumerate((*self.channels, self.channels[-1]))]
        halves = (lambda i: i == 2) if self.adapter_type == "full_adapter_xl" else (lambda i: i > 0)
        return [Stage(c, c, halves(i)) for i, c in enumerate(self.channels)]

    @property
    def total_downscale_factor(self) -> int:
        """What height and width of an image should be multiples of, so that no stage rounds up a size."""
        if self.adapter_type == "full_adapter_xl":
            return 2 * self.downscale_factor
        return self.downscale_factor * 2 ** (len(self.stages()) - 1)


class AdapterBlock(nn.Module):
    """``x [B,H,W,C]`` plus two convolutions of it with a ReLU between; the second is pointwise unless ``light``."""

    light: bool
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = nn.relu(Conv(x.shape[-1], **dtypes, name="block1")(x))
        size = 3 if self.light else 1
        return x + Conv(x.shape[-1], size, padding=size // 2, **dtypes, name="block2")(h)


class AdapterStage(nn.Module):
    """One stage: ``[B,H,W,C]`` -> ``[B,H,W,channels]``, at half the resolution (rounded up) if it is ``halved``."""

    stage: Stage
    blocks: int
    light: bool
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.stage.halved:
            # Where a size is odd, the last mean is of the pixels that there are.
            x = halve(jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)), mode="edge"))
        if self.light or x.shape[-1] != self.stage.width:
            x = Conv(self.stage.width, 1, padding=0, **dtypes, name="in_conv")(x)
        for i in range(self.blocks):
            x = AdapterBlock(self.light, **dtypes, name=f"resnets_{i}")(x)
        return Conv(self.stage.channels, 1, padding=0, **dtypes, name="out_conv")(x) if self.light else x


class AdapterBody(nn.Module):
    """All stages, one level below :class:`T2IAdapter` in the names of checkpoints."""

    config: T2IAdapterConfig
    remat: str
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        c = self.config
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = space_to_depth(images, c.downscale_factor)
        if not c.light:
            x = Conv(c.channels[0], **dtypes, name="conv_in")(x)
        features = []
        for i, stage in enumerate(c.stages()):
            x = remat_block(AdapterStage, self.remat)(stage, c.num_res_blocks, c.light, **dtypes, name=f"body_{i}")(x)
            features.append(x)
        return tuple(features)


class T2IAdapter(OneFile, Model):
    """Computes what a UNet adds in its downward path (``down_intrablock_additional_residuals``) to follow an image.

    The features do not depend on the step: a sampler computes them once.
    """

    config: T2IAdapterConfig = T2IAdapterConfig()
    config_class: ClassVar[type[Config]] = T2IAdapterConfig
    remat: str = "none"  # "blocks" and "full" store only what goes into each stage; see models/remat.py

    def example_inputs(self) -> dict[str, Any]:
        size = self.config.total_downscale_factor
        return {"images": jax.ShapeDtypeStruct((1, size, size, self.config.in_channels), jnp.float32)}

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        """The features of control images.

        Args:
          images: ``[B,H,W,in_channels]`` in [0, 1]; ``H`` and ``W`` multiples of ``downscale_factor``.

        Returns: one array ``[B,h,w,C]`` for each stage, finest first, in ``dtype``.

        Raises:
          ValueError: rank, channels or size of the images do not match the configuration.
        """
        c = self.config
        check_policy(self.remat)
        if images.ndim != 4 or images.shape[-1] != c.in_channels:
            raise ValueError(f"control images must be [B,H,W,{c.in_channels}] (channel-last), got {images.shape}")
        if images.shape[1] % c.downscale_factor or images.shape[2] % c.downscale_factor:
            raise ValueError(
                f"height and width of this adapter's images must be multiples of {c.downscale_factor}, got "
                f"{images.shape[1]} x {images.shape[2]}"
            )
        body = AdapterBody(c, self.remat, dtype=self.dtype, param_dtype=self.param_dtype, name="adapter")
        return body(jnp.asarray(images, self.dtype))


def space_to_depth(x: jax.Array, factor: int) -> jax.Array:
    """Each square of pixels as channels, ``[B,H,W,C]`` -> ``[B,H/factor,W/factor,C*factor^2]``, channels outermost."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // factor, factor, W // factor, factor, C)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(B, H // factor, W // factor, C * factor**2)


def combined_features(
    features: Sequence[Sequence[jax.Array]], weights: jax.Array | Sequence[float] | None = None
) -> tuple[jax.Array, ...]:
    """Several adapters at once, PyTorch's ``MultiAdapter``: the weighted sum of their features, stage by stage.

    Args:
      features: for each adapter what its :class:`T2IAdapter` returns.
      weights: one number for each adapter, ``[n]``, or one for each image and adapter, ``[B,n]``; None weights all
        alike, with a sum of 1.

    Raises:
      ValueError: numbers of adapters and weights differ, or the adapters' features have different shapes.
    """
    count = len(features)
    w = jnp.full(count, 1 / max(count, 1), jnp.float32) if weights is None else jnp.asarray(weights, jnp.float32)
    if not count or w.ndim not in (1, 2) or w.shape[-1] != count:
        raise ValueError(f"weights must be [n] or [B,n] for n={count} adapters, got {w.shape}")
    shapes = [[array.shape for array in each] for each in features]
    if any(other != shapes[0] for other in shapes):
        raise ValueError(f"adapters that act together must give features of the same shapes, got {shapes}")
    scaled = lambda x, k: x * w[..., k].reshape(-1, 1, 1, 1).astype(x.dtype)
    return tuple(sum(scaled(x, k) for k, x in enumerate(stage)) for stage in zip(*features))
