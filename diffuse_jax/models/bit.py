"""Big Transfer's residual network, the backbone of the hybrid depth estimator (Kolesnikov et al. 2020, 1912.11370)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.allowed import Repeats
from diffuse_jax.config import NO_DROPOUT, Config
from diffuse_jax.models.clip_layers import HARMLESS
from diffuse_jax.models.layers import ACTIVATIONS, Conv, GroupNorm

EPS = 1e-8
"""Added to the variance of a kernel."""

STRIDE = 16
"""Pixels per position of the last of three stages."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitConfig(Config):
    """The ``backbone_config`` of a hybrid depth estimator: three stages of bottlenecks with TensorFlow's padding."""

    fixed: ClassVar[Mapping[str, Any]] = {"output_stride": 32, "out_features": ["stage1", "stage2", "stage3"]}
    harmless: ClassVar[Mapping[str, str]] = {
        **HARMLESS,
        "drop_path_rate": NO_DROPOUT,
        **dict.fromkeys(("out_indices", "stage_names"), "repeats out_features"),
    }

    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: Annotated[tuple[int, ...], Repeats()] = (3, 4, 6, 3)
    layer_type: str = "preactivation"
    hidden_act: str = "relu"
    global_padding: str | None = None
    num_groups: int = 32
    embedding_dynamic_padding: bool = False
    width_factor: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.global_padding is not None:
            object.__setattr__(self, "global_padding", self.global_padding.upper())
        found = (self.layer_type, self.global_padding, bool(self.embedding_dynamic_padding), len(self.depths))
        wanted = ("bottleneck", "SAME", True, 3)
        names = ("layer_type", "global_padding", "embedding_dynamic_padding", "the number of depths")
        for name, value, expected in zip(names, found, wanted, strict=True):
            if value != expected:
                raise ValueError(f"BiT: {name} is {value!r}, only {expected!r} is supported (DPT-hybrid)")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"BiT: hidden_act={self.hidden_act!r}; expected one of {sorted(ACTIVATIONS)}")
        if len(self.hidden_sizes) < len(self.depths):
            raise ValueError(f"BiT: {len(self.hidden_sizes)} hidden_sizes for {len(self.depths)} depths")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        if data.get("model_type", "bit") != "bit":
            raise ValueError(f"backbone_config: model_type={data['model_type']!r} is not supported, only 'bit'")
        return super().from_json(data)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(rounded(size * self.width_factor) for size, _ in zip(self.hidden_sizes, self.depths))


def rounded(channels: float) -> int:
    """The multiple of 8 nearest to ``channels``, at least 8 and at least nine tenths of it."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near + 8 if near < 0.9 * channels else near


class BitPart(nn.Module):
    """Base of the network's parts: a config and two dtypes."""

    config: BitConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def dtypes(self) -> Mapping[str, DTypeLike]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def norm(self, name: str) -> GroupNorm:
        return GroupNorm(self.config.num_groups, 1e-5, **self.dtypes, name=name)

    def act(self, x: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.config.hidden_act](x)


class BitBackbone(BitPart):
    """Images ``[B,H,W,C]`` -> the features of three stages, at 1/4, 1/8 and 1/16 of the resolution."""

    @nn.compact
    def __call__(self, images: jax.Array) -> list[jax.Array]:
        bit = BitModel(self.config, **self.dtypes, name="bit")
        return bit(images)


class BitModel(BitPart):
    """The stem, then the stages."""

    @nn.compact
    def __call__(self, images: jax.Array) -> list[jax.Array]:
        x = Stem(self.config, **self.dtypes, name="embedder")(images)
        return Stages(self.config, **self.dtypes, name="encoder")(x)


class Stem(BitPart):
    """A wide convolution and a maximum, each of which halves the resolution."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = StandardConv(self.config.embedding_size, 7, 2, **self.dtypes, name="convolution")(x)
        x = self.act(self.norm("norm")(x))
        x = jnp.pad(x, ((0, 0), *(same(edge, 3, 2) for edge in x.shape[1:3]), (0, 0)))
        return nn.max_pool(x, (3, 3), strides=(2, 2))


class Stages(BitPart):
    """All stages; the features of each."""

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        features = []
        for i, (width, depth) in enumerate(zip(self.config.widths, self.config.depths)):
            x = Stage(self.config, **self.dtypes, width=width, depth=depth, stride=2 if i else 1, name=f"stages_{i}")(x)
            features.append(x)
        return features


class Stage(BitPart):
    """``depth`` bottlenecks, the first of which changes width and resolution."""

    width: int = 0
    depth: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.depth):
            stride = 1 if i else self.stride
            layer = Bottleneck(self.config, **self.dtypes, width=self.width, stride=stride, name=f"layers_{i}")
            x = layer(x, first=i == 0)
        return x


class Bottleneck(BitPart):
    """Three convolutions, the middle one at a quarter of the width, and a residual."""

    width: int = 0
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, first: bool) -> jax.Array:
        conv = lambda channels, size, stride, name: StandardConv(channels, size, stride, **self.dtypes, name=name)
        narrow = rounded(self.width / 4)
        h = self.act(self.norm("norm1")(conv(narrow, 1, 1, "conv1")(x)))
        h = self.act(self.norm("norm2")(conv(narrow, 3, self.stride, "conv2")(h)))
        h = self.norm("norm3")(conv(self.width, 1, 1, "conv3")(h))
        if first:
            x = Shortcut(self.config, **self.dtypes, width=self.width, stride=self.stride, name="downsample")(x)
        return self.act(h + x)


class Shortcut(BitPart):
    """A pointwise convolution and a norm."""

    width: int = 0
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm("norm")(StandardConv(self.width, 1, self.stride, **self.dtypes, name="conv")(x))


class StandardConv(Conv):
    """A convolution whose kernel has mean zero and variance one for each output (Qiao et al. 2019, 1903.10520)."""

    padding: int | str | tuple[tuple[int, int], tuple[int, int]] = "SAME"
    use_bias: bool = False

    def used(self, kernel: jax.Array) -> jax.Array:
        kernel = jnp.asarray(kernel, jnp.float32)
        centred = kernel - kernel.mean((0, 1, 2), keepdims=True)
        inverse = jax.lax.rsqrt(jnp.square(centred).mean((0, 1, 2), keepdims=True) + EPS)
        return (centred * inverse).astype(self.dtype)


def same(edge: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an edge, so that ``ceil(edge / stride)`` positions come out; the odd one comes after."""
    total = max((-(-edge // stride) - 1) * stride + kernel - edge, 0)
    return total // 2, total - total // 2
