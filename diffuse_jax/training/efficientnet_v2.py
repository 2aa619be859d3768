"""The image encoder of Würstchen's training, in plain JAX with torchvision's names: EfficientNetV2-S (Tan and Le 2021,
arXiv 2104.00298, table 4), and a projection to the channels of semantic maps.

Batch norms are folded into the convolutions before them: the encoder is never trained.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.errors import WeightsError
from diffuse_jax.kernels import conv2d
from diffuse_jax.models import Params
from diffuse_jax.training.mobilenet_v2 import Layer, depthwise, pointwise
from diffuse_jax.training.perceptual import DEVIATION, MEAN
from diffuse_jax.weights import read_checkpoint
from diffuse_jax.weights.torch_file import read_torch_object

STAGES = ((True, 1), (True, 2), (True, 2), (False, 2), (False, 1), (False, 2))
"""Whether a stage has fused blocks, without depthwise convolutions, and the stride of its first block."""

LAST = f"{len(STAGES) + 1}.0"
MAPPER = "mapper.0"
SCALE = 32
"""Pixels of an image along the edge of one of a map."""

BACKBONE_EPSILON, MAPPER_EPSILON = 1e-3, 1e-5
"""Of their batch norms."""

STATE = "effnet_state_dict"
"""Where published files have it, beside Würstchen's second stage."""


@dataclasses.dataclass(frozen=True)
class EfficientNetEncoder:
    """The encoder as a network of a training step; ``dtype`` is what it computes in."""

    dtype: Any = jnp.float32
    config: str = "EfficientNetV2-S"

    def apply(self, variables: Mapping[str, Any], pixels: jax.Array) -> jax.Array:
        """Features ``[B,H/32,W/32,c]`` float32 of uint8 pixels ``[B,H,W,3]``, whose sides are multiples of 32."""
        unit = pixels.astype(jnp.float32) / 255
        x = (unit - jnp.asarray(MEAN).reshape(1, 1, 1, -1)) / jnp.asarray(DEVIATION).reshape(1, 1, 1, -1)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype), variables["params"])
        return features(params, x.astype(self.dtype)).astype(jnp.float32)


def features(params: Params, x: jax.Array) -> jax.Array:
    """The projected output of the last layer for normalised pixels; ``params`` from :func:`read_encoder`."""
    layer = lambda name: (params[name]["kernel"], params[name]["bias"])
    x = jax.nn.silu(convolution(x, layer("0.0"), 2))
    for stage, (fused, first) in enumerate(STAGES, 1):
        repeat = 0
        while f"{stage}.{repeat}.block.0.0" in params:
            names = [f"{stage}.{repeat}.block.{name}" for name in ("0.0", "1.0", "2.fc1", "2.fc2", "3.0")]
            layers = [layer(name) for name in names if name in params]
            out = (fused_block if fused else block)(x, layers, first if repeat == 0 else 1)
            x = out + x if out.shape == x.shape else out
            repeat += 1
    return pointwise(jax.nn.silu(pointwise(x, layer(LAST))), layer(MAPPER))


def fused_block(x: jax.Array, layers: list[Layer], stride: int) -> jax.Array:
    """Expand and filter at once, and project linearly; blocks that do not expand have no projection."""
    first, *project = layers
    x = jax.nn.silu(convolution(x, first, stride))
    return pointwise(x, project[0]) if project else x


def block(x: jax.Array, layers: list[Layer], stride: int) -> jax.Array:
    """Expand, filter each channel, weight the channels by their means (Hu et al. 2018), and project linearly."""
    expand, middle, squeeze, excite, project = layers
    x = jax.nn.silu(depthwise(jax.nn.silu(pointwise(x, expand)), middle, stride))
    mean = x.mean((1, 2), keepdims=True)
    return pointwise(x * jax.nn.sigmoid(pointwise(jax.nn.silu(pointwise(mean, squeeze)), excite)), project)


def convolution(x: jax.Array, layer: Layer, stride: int) -> jax.Array:
    kernel, bias = layer
    return conv2d(x, jnp.asarray(kernel), stride, 1) + bias.reshape(1, 1, 1, -1)


def read_encoder(path: str | Path) -> tuple[EfficientNetEncoder, Params]:
    """The encoder from a file: Würstchen's ``model_v2_stage_b.pt``, or its state dict alone.

    Raises:
      WeightsError: the file cannot be read, or has no such encoder.
    """
    file = Path(path)
    tree = read_torch_object(file) if file.suffix in (".pt", ".pth", ".bin", ".ckpt") else {}
    tensors = tree[STATE] if isinstance(tree, dict) and STATE in tree else dict(read_checkpoint([file]).tensors)
    named = {re.sub(r"^backbone\.", "", name): np.asarray(array) for name, array in tensors.items()}
    params = folded(named)
    wanted = ("0.0", *(f"{stage}.0.block.0.0" for stage in range(1, len(STAGES) + 1)), LAST, MAPPER)
    if missing := [name for name in wanted if name not in params]:
        raise WeightsError(f"{file}: holds no EfficientNetV2-S with a mapper, as {STATE} of Würstchen's files is one; "
                           f"{missing[0]} is missing")  # fmt: skip
    return EfficientNetEncoder(), params


def folded(tensors: Mapping[str, np.ndarray]) -> Params:
    """``{name: {"kernel" [kh,kw,C,O], "bias" [O]}}`` of every convolution, with the batch norm behind it folded in."""
    params: Params = {}
    for name in [key.removesuffix(".weight") for key, array in tensors.items() if array.ndim == 4]:
        kernel = tensors[f"{name}.weight"].astype(np.float64).transpose(2, 3, 1, 0)
        parent, _, place = name.rpartition(".")
        norm = f"{parent}.{int(place) + 1}" if place.isdigit() else ""
        if f"{norm}.running_var" in tensors:
            epsilon = MAPPER_EPSILON if name == MAPPER else BACKBONE_EPSILON
            mean, variance = (tensors[f"{norm}.running_{kind}"].astype(np.float64) for kind in ("mean", "var"))
            factor = tensors.get(f"{norm}.weight", np.ones(())) / np.sqrt(variance + epsilon)
            kernel, bias = kernel * factor, tensors.get(f"{norm}.bias", np.zeros(())) - mean * factor
        else:
            bias = tensors.get(f"{name}.bias", np.zeros(kernel.shape[-1]))
        params[name] = {"kernel": kernel.astype(np.float32), "bias": np.asarray(bias, np.float32)}
    return params
