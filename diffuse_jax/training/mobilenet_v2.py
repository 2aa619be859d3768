"""The convolutions of MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) in plain JAX, with torchvision's names.

Batch norms are folded into the convolutions before them, and a depthwise convolution is a sum of shifted products,
which XLA compiles to one loop on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Table 2 of the paper: expansion, channels, number of blocks, stride of the first block."""

CHANNELS = 1280
NORM_EPSILON = 1e-5

Layer = tuple[np.ndarray, np.ndarray]
"""Kernel ``[kh,kw,C,O]`` (depthwise: ``[kh,kw,1,O]``) and bias ``[O]``."""

Params = dict[str, Layer]
"""Layers by the PyTorch name of their convolution."""


def fold_norms(tensors: Mapping[str, np.ndarray]) -> Params:
    """Fold each batch norm into the convolution before it; ``tensors`` have PyTorch's names and layouts.

    The index of a norm is one higher than that of its convolution: ``features.2.conv.1.0``, ``features.2.conv.1.1``.
    """
    params = {}
    for name in [key.removesuffix(".weight") for key, array in tensors.items() if array.ndim == 4]:
        parent, place = name.rsplit(".", 1)
        norm = f"{parent}.{int(place) + 1}"
        scale, shift, mean, variance = (
            tensors[f"{norm}.{kind}"].astype(np.float64) for kind in ("weight", "bias", "running_mean", "running_var")
        )
        factor = scale / np.sqrt(variance + NORM_EPSILON)
        kernel = tensors[f"{name}.weight"].astype(np.float64).transpose(2, 3, 1, 0) * factor
        params[name] = (kernel.astype(np.float32), (shift - mean * factor).astype(np.float32))
    return params


def apply(params: Params, x: jax.Array) -> jax.Array:
    """Spatial mean of the last feature maps.

    Args:
      params: from :func:`fold_norms`.
      x: float32 ``[B,H,W,3]``, normalised by ImageNet's mean and standard deviation.

    Returns:
      float32 ``[B,1280]``, nonnegative.
    """
    return maps(params, x)[-1].mean(axis=(1, 2))


def maps(params: Params, x: jax.Array) -> list[jax.Array]:
    """The outputs ``[B,h,w,C]`` of all 19 layers for ``x [B,H,W,3]``; the last has 1280 channels."""
    found = [relu6(convolution(x, params["features.0.0"], stride=2))]
    for expansion, channels, repeats, stride in BLOCKS:
        for repeat in range(repeats):
            block = [layer for name, layer in params.items() if name.startswith(f"features.{len(found)}.")]
            out = inverted_residual(found[-1], block, stride if repeat == 0 else 1)
            assert out.shape[-1] == channels and len(block) == (2 if expansion == 1 else 3)
            found.append(out + found[-1] if repeat else out)
    return [*found, relu6(pointwise(found[-1], params[f"features.{len(found)}.0"]))]


def inverted_residual(x: jax.Array, layers: list[Layer], stride: int) -> jax.Array:
    """Expand (the first block has no such layer), filter each channel, project linearly."""
    *expand, middle, project = layers
    for layer in expand:
        x = relu6(pointwise(x, layer))
    return pointwise(relu6(depthwise(x, middle, stride)), project)


def relu6(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0, 6)


def convolution(x: jax.Array, layer: Layer, stride: int) -> jax.Array:
    kernel, bias = layer
    pads = ((1, 1), (1, 1))  # on both sides, as in PyTorch; "SAME" would pad an even size on one side only
    return jax.lax.conv_general_dilated(
        x, jnp.asarray(kernel), (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    ) + bias.reshape(1, 1, 1, -1)


def pointwise(x: jax.Array, layer: Layer) -> jax.Array:
    kernel, bias = layer
    return x @ kernel[0, 0] + bias.reshape(1, 1, 1, -1)


def depthwise(x: jax.Array, layer: Layer, stride: int) -> jax.Array:
    kernel, bias = layer
    _, height, width, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [(i, j) for i in range(3) for j in range(3)]
    shifted = lambda i, j: x[:, i : i + height : stride, j : j + width : stride]
    taken = [shifted(i, j) * kernel[i, j].reshape(1, 1, 1, -1) for i, j in taps]
    return jnp.asarray(sum(taken)) + bias.reshape(1, 1, 1, -1)
