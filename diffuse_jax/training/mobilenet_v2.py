"""The convolutions of MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) in plain JAX, with torchvision's names.

Batch norms are folded into the convolutions before them, and a depthwise convolution is a sum of shifted products,
which XLA compiles to one loop on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

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

Pads = tuple[tuple[int, int], tuple[int, int]]
"""Rows above and below, columns left and right."""


def norm_after(name: str) -> str:
    """The batch norm of a convolution, whose index is one higher: ``features.2.conv.1.0``, ``features.2.conv.1.1``."""
    parent, place = name.rsplit(".", 1)
    return f"{parent}.{int(place) + 1}"


def fold_norms(
    tensors: Mapping[str, np.ndarray], norm_of: Callable[[str], str] = norm_after, epsilon: float = NORM_EPSILON
) -> Params:
    """Fold each batch norm into its convolution; ``tensors`` have PyTorch's names and layouts.

    Args:
      tensors: PyTorch's tensors by name; those with four axes are the convolutions.
      norm_of: the name of a convolution to that of its norm.
      epsilon: of the norms.

    Raises:
      KeyError: a tensor is missing.
    """
    params = {}
    for name in [key.removesuffix(".weight") for key, array in tensors.items() if array.ndim == 4]:
        norm = norm_of(name)
        scale, shift, mean, variance = (
            tensors[f"{norm}.{kind}"].astype(np.float64) for kind in ("weight", "bias", "running_mean", "running_var")
        )
        factor = scale / np.sqrt(variance + epsilon)
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


def inverted_residual(x: jax.Array, layers: list[Layer], stride: int, pads: Pads | None = None) -> jax.Array:
    """Expand (the first block has no such layer), filter each channel, project linearly."""
    *expand, middle, project = layers
    for layer in expand:
        x = relu6(pointwise(x, layer))
    return pointwise(relu6(depthwise(x, middle, stride, pads)), project)


def relu6(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0, 6)


def convolution(x: jax.Array, layer: Layer, stride: int, pads: Pads | None = None) -> jax.Array:
    """A convolution with zeros on each side of both axes: ``pads``, or half a kernel, as in PyTorch."""
    kernel, bias = layer
    return jax.lax.conv_general_dilated(
        x,
        jnp.asarray(kernel),
        (stride, stride),
        pads or _half(kernel),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ) + bias.reshape(1, 1, 1, -1)


def _half(kernel: np.ndarray) -> Pads:
    """Half a kernel on both sides; "SAME" would pad an even size on one side only if the stride is two."""
    height, width = (size // 2 for size in kernel.shape[:2])
    return ((height, height), (width, width))


def pointwise(x: jax.Array, layer: Layer) -> jax.Array:
    kernel, bias = layer
    return x @ kernel[0, 0] + bias.reshape(1, 1, 1, -1)


def depthwise(x: jax.Array, layer: Layer, stride: int, pads: Pads | None = None) -> jax.Array:
    """A convolution of each channel by itself, padded like :func:`convolution`."""
    kernel, bias = layer
    x = jnp.pad(x, ((0, 0), *(pads or _half(kernel)), (0, 0)))
    height, width = (size - taps + 1 for size, taps in zip(x.shape[1:3], kernel.shape[:2], strict=True))
    taps = [(i, j) for i in range(kernel.shape[0]) for j in range(kernel.shape[1])]
    shifted = lambda i, j: x[:, i : i + height : stride, j : j + width : stride]
    taken = [shifted(i, j) * kernel[i, j].reshape(1, 1, 1, -1) for i, j in taps]
    return jnp.asarray(sum(taken)) + bias.reshape(1, 1, 1, -1)
