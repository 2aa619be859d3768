"""The UNet of guided diffusion (ADM; Dhariwal & Nichol 2021), which consistency models and their descendants use too.

Parameters carry the names of the original checkpoints: ``input_blocks.3.0.in_layers.2.weight`` is
``input_blocks_3/0/in_layers_2/kernel``. A list index is joined to the word before it; an index that follows another
index (blocks are lists of layers) is a name by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.allowed import Layers, Length, Positive, Range, Repeats
from diffuse_jax.config import Config
from diffuse_jax.kernels import attention
from diffuse_jax.messages import brief
from diffuse_jax.models.base import Model
from diffuse_jax.models.embeddings import Embedding, sinusoidal_embedding
from diffuse_jax.models.layers import Conv, Dense, GroupNorm, parameter
from diffuse_jax.models.resnet import Downsample, ResnetBlock, ResnetNames, Upsample, change_size

GROUPS = 32
"""The number of groups of every norm."""
NAMES = ResnetNames("in_layers_0", "in_layers_2", "emb_layers_1", "out_layers_0", "out_layers_3", "skip_connection")


class Layer(NamedTuple):
    """One layer of a block; ``kind`` is "conv", "res", "res_down", "res_up", "attention", "down" or "up"."""

    kind: str
    channels: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ADMUNetConfig(Config):
    """The arguments of the original network, under their names.

    Attributes:
      image_size: height and width of the images that it was trained on, which pipelines make; it has no influence on
        the network.
      in_channels, out_channels: image channels; a network with learned variance has twice as many output channels.
      model_channels: base width; each level is its entry of ``channel_mult`` times as wide.
      num_res_blocks: residual blocks per level, one number or one per level.
      attention_resolutions: downsampling *factors* of the levels with attention (the original release's command line
        takes resolutions in pixels instead: 32 for a 64-pixel network is the factor 2).
      conv_resample: resample with a convolution; if False, with average pooling and nearest neighbours alone.
      resblock_updown: change the resolution inside a residual block instead.
      num_classes: number of classes; labels are integers that index a table of embeddings.
      label_channels: width of real-valued label vectors, embedded by two dense layers instead of a table.
      num_heads, num_head_channels: number of attention heads, or (if not -1) the width of each.
      use_scale_shift_norm: the embedding scales and shifts the second norm instead of being added before it.
      use_new_attention_order: the joint projection orders its channels by query, key and value, not head by head.
      attention_dims: spatial dimensions of attention's pointwise convolutions: 1 in the original, 2 in consistency
        models.
    """

    class_name: ClassVar[str] = "ADMUNet"

    fixed: ClassVar[Mapping[str, Any]] = {
        "dims": 2,
        "num_heads_upsample": -1,
        "use_spatial_transformer": False,
    }

    image_size: int | None = None
    in_channels: int = 3
    model_channels: int = 128
    out_channels: int = 3
    num_res_blocks: Layers | tuple[Layers, ...] = 2
    attention_resolutions: tuple[int, ...] = (2, 4, 8)
    channel_mult: Annotated[tuple[Positive, ...], Length(16), Repeats()] = (1, 2, 4, 8)
    conv_resample: bool = True
    resblock_updown: bool = False
    num_classes: int | None = None
    label_channels: int | None = None
    num_heads: int = 1
    num_head_channels: Annotated[int, Range(-1, 65_536)] = -1
    use_scale_shift_norm: bool = False
    use_new_attention_order: bool = False
    attention_dims: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_classes is not None and self.label_channels is not None:
            raise ValueError("ADMUNet: num_classes and label_channels exclude each other; set only one of them")
        if self.attention_dims not in (1, 2):
            raise ValueError(f"ADMUNet: attention_dims={self.attention_dims}; expected 1 or 2")
        n = len(self.channel_mult)
        if n == 0:
            raise ValueError("ADMUNet: channel_mult must have at least one entry")
        if wrong := [width for width in map(self._channels, range(n)) if width < GROUPS or width % GROUPS]:
            raise ValueError(
                f"ADMUNet: model_channels={self.model_channels} times channel_mult must be multiples of {GROUPS}, "
                f"got {brief(wrong)}"
            )
        if self.num_head_channels == 0:
            raise ValueError("ADMUNet: num_head_channels must be -1 or a whole number from 1 to 65,536, got 0")
        if isinstance(self.num_res_blocks, tuple) and len(self.num_res_blocks) != n:
            raise ValueError(f"ADMUNet: num_res_blocks has {len(self.num_res_blocks)} entries for {n} levels")

    @property
    def sample_size(self) -> int | None:
        """``image_size``, as other networks call it."""
        return self.image_size

    @property
    def has_classes(self) -> bool:
        """Whether the network takes ``class_labels``."""
        return self.num_classes is not None or self.label_channels is not None

    @property
    def class_count(self) -> int | None:
        """The number of classes that labels are indices of; None where labels are vectors, or none are taken."""
        return self.num_classes

    @property
    def label_shape(self) -> tuple[int, ...]:
        """The shape of a label."""
        return () if self.label_channels is None else (self.label_channels,)

    def input_blocks(self) -> list[tuple[Layer, ...]]:
        """The layers of each block of the downward path; every block's output is a skip connection."""
        blocks: list[tuple[Layer, ...]] = [(Layer("conv", self._channels(0)),)]
        last = len(self.channel_mult) - 1
        for level in range(last + 1):
            blocks += [self._residual(level)] * self._count(level)
            if level < last:
                blocks.append((Layer("res_down" if self.resblock_updown else "down", self._channels(level)),))
        return blocks

    def middle_block(self) -> tuple[Layer, ...]:
        """The layers at the coarsest level: residual, attention, residual."""
        kinds = ("res", "attention", "res")
        return tuple(Layer(kind, self._channels(-1)) for kind in kinds)

    def output_blocks(self) -> list[tuple[Layer, ...]]:
        """The layers of each block of the upward path; every block first takes the last remaining skip connection."""
        blocks: list[tuple[Layer, ...]] = []
        for level in reversed(range(len(self.channel_mult))):
            blocks += [self._residual(level)] * (self._count(level) + 1)
            if level:
                blocks[-1] += (Layer("res_up" if self.resblock_updown else "up", self._channels(level)),)
        return blocks

    def heads(self, channels: int) -> int:
        """Number of attention heads in a layer of ``channels`` channels.

        Raises:
          ValueError: the channels do not split evenly into heads.
        """
        width = self.num_head_channels
        heads = self.num_heads if width == -1 else channels // width
        if heads == 0 or channels % heads or width not in (-1, channels // heads):
            how = f"num_heads={self.num_heads}, num_head_channels={width}"
            raise ValueError(f"ADMUNet: {channels} channels cannot be split into heads ({how})")
        return heads

    def _residual(self, level: int) -> tuple[Layer, ...]:
        res = Layer("res", self._channels(level))
        return (res, Layer("attention", res.channels)) if 2**level in self.attention_resolutions else (res,)

    def _channels(self, level: int) -> int:
        return int(self.channel_mult[level] * self.model_channels)

    def _count(self, level: int) -> int:
        return self.num_res_blocks if isinstance(self.num_res_blocks, int) else self.num_res_blocks[level]


class ADMUNet(Model):
    """Predicts noise (and, with twice as many output channels, its variance) from a noisy image and a timestep.

    Covers guided diffusion, improved diffusion and consistency models, with and without labels.
    """

    config: ADMUNetConfig = ADMUNetConfig()
    config_class: ClassVar[type[Config]] = ADMUNetConfig

    @nn.compact
    def __call__(self, sample: jax.Array, timesteps: jax.Array, class_labels: jax.Array | None = None) -> jax.Array:
        """Run the network.

        Args:
          sample: ``[B,H,W,in_channels]``; ``H`` and ``W`` must halve evenly at every level.
          timesteps: ``[B]`` or a scalar, from 0 to 1000; need not be integers.
          class_labels: ``[B]`` integers (with ``num_classes``) or ``[B,label_channels]`` (with ``label_channels``).

        Returns: ``[B,H,W,out_channels]`` in ``dtype``.

        Raises:
          ValueError: a size does not halve evenly, or labels are missing, unexpected or misshapen.
        """
        c = self.config
        self._check(sample, class_labels)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        emb = self.embed(sample.shape[0], timesteps, class_labels)

        x, skips = sample, []
        for i, layers in enumerate(c.input_blocks()):
            x = Block(c, layers, **dtypes, name=f"input_blocks_{i}")(x, emb)
            skips.append(x)
        for i, layer in enumerate(c.middle_block()):
            x = run(c, layer, x, emb, **dtypes, name=f"middle_block_{i}")
        for i, layers in enumerate(c.output_blocks()):
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = Block(c, layers, **dtypes, name=f"output_blocks_{i}")(x, emb)
        x = nn.silu(GroupNorm(**dtypes, name="out_0")(x))
        return Conv(c.out_channels, **dtypes, name="out_2")(x)

    def example_inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        c, size = self.config, 2 ** (len(self.config.channel_mult) - 1)
        inputs = {
            "sample": jax.ShapeDtypeStruct((1, size, size, c.in_channels), jnp.float32),
            "timesteps": jax.ShapeDtypeStruct((1,), jnp.float32),
        }
        if c.num_classes is not None:
            inputs["class_labels"] = jax.ShapeDtypeStruct((1,), jnp.int32)
        if c.label_channels is not None:
            inputs["class_labels"] = jax.ShapeDtypeStruct((1, c.label_channels), jnp.float32)
        return inputs

    def embed(self, batch: int, timesteps: jax.Array, labels: jax.Array | None) -> jax.Array:
        """Embedding of timestep and label, ``[B, 4 model_channels]``."""
        c, width = self.config, 4 * self.config.model_channels
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def two_layers(x: jax.Array, name: str) -> jax.Array:
            return Dense(width, **dtypes, name=f"{name}_2")(nn.silu(Dense(width, **dtypes, name=f"{name}_0")(x)))

        sinusoids = sinusoidal_embedding(jnp.broadcast_to(timesteps, (batch,)), c.model_channels)
        emb = two_layers(sinusoids.astype(self.dtype), "time_embed")
        if c.num_classes is not None:
            emb = emb + Embedding(c.num_classes, width, **dtypes, name="label_emb")(labels)
        if c.label_channels is not None:
            emb = emb + two_layers(jnp.asarray(labels, self.dtype), "label_emb")
        return emb

    def _check(self, sample: jax.Array, labels: jax.Array | None) -> None:
        c, multiple = self.config, 2 ** (len(self.config.channel_mult) - 1)
        _, height, width, channels = sample.shape
        if height % multiple or width % multiple:
            raise ValueError(f"ADMUNet: height and width must be multiples of {multiple}, got {height} and {width}")
        if channels != c.in_channels:
            raise ValueError(f"ADMUNet: sample has {channels} channels, this network takes {c.in_channels}")
        shape = (sample.shape[0], *c.label_shape)
        given = None if labels is None else labels.shape
        if given != (shape if c.has_classes else None):
            wanted = f"of shape {shape}" if c.has_classes else "None"
            raise ValueError(f"ADMUNet: class_labels must be {wanted}, got {given}")


class Block(nn.Module):
    """A list of layers, named by their index."""

    config: ADMUNetConfig
    layers: tuple[Layer, ...]
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array) -> jax.Array:
        for i, layer in enumerate(self.layers):
            x = run(self.config, layer, x, emb, dtype=self.dtype, param_dtype=self.param_dtype, name=str(i))
        return x


def run(c: ADMUNetConfig, layer: Layer, x: jax.Array, emb: jax.Array, **module: Any) -> jax.Array:
    """Apply one layer to ``x [B,H,W,C]`` as a submodule of the caller; ``module`` holds its name and dtypes."""
    match layer.kind:
        case "conv":
            return Conv(layer.channels, **module)(x)
        case "attention":
            heads = c.heads(layer.channels)
            return AttentionBlock(heads, not c.use_new_attention_order, c.attention_dims, **module)(x)
        case "down" | "up" if not c.conv_resample:
            return change_size(x, layer.kind)
        case "down":
            return Downsample(layer.channels, conv_name="op", **module)(x)
        case "up":
            return Upsample(layer.channels, **module)(x)
    shift = "scale_shift" if c.use_scale_shift_norm else "default"
    resample = {"res": None, "res_down": "down", "res_up": "up"}[layer.kind]
    block = ResnetBlock(layer.channels, time_scale_shift=shift, resample=resample, names=NAMES, **module)
    return block(x, emb)


class AttentionBlock(nn.Module):
    """Group norm and self-attention over pixels, with a residual; one projection makes queries, keys and values.

    ``by_head``: the projection's channels are ordered ``[heads, 3, width]``, not ``[3, heads, width]``.
    ``dims``: spatial dimensions of the pointwise convolutions that the checkpoint stores as projections.
    """

    heads: int
    by_head: bool
    dims: int = 1
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[B,H,W,C]`` -> ``[B,H,W,C]``."""
        B, H, W, C = x.shape
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        normed = GroupNorm(**dtypes, name="norm")(x).reshape(B, H * W, C)
        qkv = Pointwise(3 * C, self.dims, **dtypes, name="qkv")(normed)
        order, axis = ((self.heads, 3), 3) if self.by_head else ((3, self.heads), 2)
        split = jnp.moveaxis(qkv.reshape(B, H * W, *order, C // self.heads), axis, 0)
        h = attention(split[0], split[1], split[2]).reshape(B, H * W, C)
        return x + Pointwise(C, self.dims, **dtypes, name="proj_out")(h).reshape(B, H, W, C)


class Pointwise(nn.Module):
    """A dense layer stored as a pointwise convolution: kernel ``[1] * dims + [in, features]``."""

    features: int
    dims: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[B,L,in]`` -> ``[B,L,features]``."""
        shape = (1,) * self.dims + (x.shape[-1], self.features)
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), shape)
        bias = parameter(self, "bias", nn.initializers.zeros_init(), (self.features,))
        y = jnp.asarray(x, self.dtype) @ jnp.asarray(kernel, self.dtype).reshape(shape[-2:])
        return y + jnp.asarray(bias, self.dtype).reshape(1, 1, -1)
