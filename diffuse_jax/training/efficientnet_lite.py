"""The convolutions of EfficientNet-Lite0 in plain JAX, with the names of the PyTorch port.

The network of EfficientNet (Tan and Le 2019, arXiv:1905.11946, table 1) for phones: ReLU6 and no
squeeze-and-excitation, so its blocks are those of MobileNetV2, with kernels of three and five. Convolutions are padded
as in TensorFlow, where it was trained: an even size by one row less above than below if the stride is two.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from diffuse_jax.training.mobilenet_v2 import (
    Layer,
    Pads,
    Params,
    convolution,
    fold_norms,
    inverted_residual,
    pointwise,
    relu6,
)

BLOCKS = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))
"""Number of blocks and stride of the first one, for each stage."""

NORM_EPSILON = 1e-3

NORMS = {"_conv_stem": "_bn0", "_conv_head": "_bn1"}
BLOCK_NORMS = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
"""Names of convolutions -> their batch norms, outside of blocks and inside."""


def fold(tensors: Mapping[str, np.ndarray]) -> Params:
    """The layers from PyTorch's tensors, with batch norms folded into the convolutions.

    Raises:
      KeyError: a tensor is missing.
    """
    return fold_norms(tensors, _norm_of, NORM_EPSILON)


def _norm_of(name: str) -> str:
    block, dot, last = name.rpartition(".")
    return f"{block}.{BLOCK_NORMS[last]}" if dot else NORMS[last]


def maps(params: Params, x: jax.Array) -> list[jax.Array]:
    """The outputs ``[B,h,w,C]`` of the stem, the 16 blocks and the head of 1280 channels, for ``x [B,H,W,3]``."""
    found = [relu6(convolution(x, params["_conv_stem"], 2, same(x, 3, 2)))]
    for repeats, first in BLOCKS:
        for repeat in range(repeats):
            x, layers, stride = found[-1], _block(params, len(found) - 1), 1 if repeat else first
            out = inverted_residual(x, layers, stride, same(x, len(layers[-2][0]), stride))
            found.append(out + x if repeat else out)
    return [*found, relu6(pointwise(found[-1], params["_conv_head"]))]


def _block(params: Params, place: int) -> list[Layer]:
    return [params[name] for last in BLOCK_NORMS if (name := f"_blocks.{place}.{last}") in params]


def same(x: jax.Array, taps: int, stride: int) -> Pads:
    """TensorFlow's padding, with which an axis of ``x [B,H,W,C]`` becomes its size over ``stride``, rounded up."""
    totals = (max((-(-size // stride) - 1) * stride + taps - size, 0) for size in x.shape[1:3])
    height, width = ((total // 2, total - total // 2) for total in totals)
    return height, width
