"""Two-dimensional convolution, channel-last, with the algorithm that is fastest for its shape.

Everywhere but on CPUs this is XLA's convolution. XLA's CPU convolution is much slower than its matrix products when
images are small and channels many, so there 3x3 kernels become matrix products; ``docs/performance.md`` has the
measurements (``benchmarks/conv_cpu.py`` repeats them). The choice depends on shapes and platform alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from diffuse_jax.kernels.platform import current_platform

Algorithm = Literal["direct", "matmul", "patches"]
Pads = tuple[tuple[int, int], tuple[int, int]]


_WIDE_CHANNELS, _FEW_PIXELS = 512, 512
"""Patches times matrix beats XLA's CPU convolution with at least this many channels and at most this many pixels."""


def conv2d(
    x: Array,
    kernel: Array,
    stride: int | tuple[int, int] = 1,
    padding: int | str | Pads = "SAME",
    *,
    algorithm: Algorithm | None = None,
) -> Array:
    """Convolve images with a kernel (cross-correlation, as everywhere in deep learning).

    Args:
      x: [B, H, W, C].
      kernel: [kh, kw, C, O], of the same dtype.
      stride: one number or one per axis.
      padding: "SAME", "VALID", the number of zeros on every side, or ((top, bottom), (left, right)).
      algorithm: "direct", "matmul" or "patches"; if None, chosen by :func:`choose_algorithm`.

    Returns:
      [B, H', W', O]. Derivatives of any order and direction use the same algorithm.

    Raises:
      ValueError: ranks or channels do not match, or the algorithm does not support this kernel, stride or size.
    """
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[3] != kernel.shape[2]:
        raise ValueError(f"conv2d takes x [B,H,W,C] and kernel [kh,kw,C,O], got {x.shape} and {kernel.shape}")
    rows, columns = (stride, stride) if isinstance(stride, int) else stride
    strides = (rows, columns)
    pads = _pads(padding, x.shape[1:3], kernel.shape[:2], strides)
    possible = possible_algorithms(x.shape, kernel.shape, strides, pads)
    chosen = algorithm or choose_algorithm(x.shape, kernel.shape, strides, pads)
    if chosen not in possible:
        raise ValueError(
            f"algorithm {chosen!r} does not support images {x.shape}, kernel {kernel.shape}, stride {strides}, "
            f"pads {pads}; possible: {sorted(possible)}"
        )
    return _ALGORITHMS[chosen](x, kernel, strides, pads)


def possible_algorithms(
    shape: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, int], pads: Pads
) -> set[str]:
    """The algorithms that support a convolution of this shape, on any platform."""
    possible = {"direct", "patches"}
    if kernel[:2] == (1, 1) and strides == (1, 1) and pads == ((0, 0), (0, 0)):
        possible.add("matmul")
    return possible


def choose_algorithm(
    shape: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, int], pads: Pads
) -> Algorithm:
    """The fastest algorithm for images [B,H,W,C] and a kernel [kh,kw,C,O]; anything but "direct" only on CPUs.

    XLA's convolution does not get faster with fewer pixels once the kernel outgrows the caches: at 8x8 and 16x16 pixels
    with 512 channels or more, patches times matrix is two to four times faster. With more pixels the patches, nine
    times the input, cost more than they save.
    """
    if current_platform() != "cpu":
        return "direct"
    if "matmul" in possible_algorithms(shape, kernel, strides, pads):
        return "matmul"
    height, width = _output_size(shape[1:3], kernel[:2], strides, pads)
    wide, few = min(kernel[2:]) >= _WIDE_CHANNELS, shape[0] * height * width <= _FEW_PIXELS
    return "patches" if kernel[:2] != (1, 1) and wide and few else "direct"


def _direct(x: Array, kernel: Array, strides: tuple[int, int], pads: Pads) -> Array:
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _matmul(x: Array, kernel: Array, strides: tuple[int, int], pads: Pads) -> Array:
    return x @ kernel[0, 0]


@partial(jax.checkpoint, static_argnums=(2, 3))  # or the backward pass would store the windows, nine times the input
def _patches(x: Array, kernel: Array, strides: tuple[int, int], pads: Pads) -> Array:
    """All windows [B, H', W', kh kw C], times the kernel as a matrix. Rows stay rows, so that they can be sharded."""
    kh, kw, channels, features = kernel.shape
    height, width = _output_size(x.shape[1:3], (kh, kw), strides, pads)
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    window = lambda i, j: padded[:, i : i + height * strides[0] : strides[0], j : j + width * strides[1] : strides[1]]
    columns = [window(i, j)[:, :height, :width] for i in range(kh) for j in range(kw)]
    return jnp.concatenate(columns, -1) @ kernel.reshape(kh * kw * channels, features)


_ALGORITHMS: dict[str, Callable[[Array, Array, tuple[int, int], Pads], Array]] = {
    "direct": _direct,
    "matmul": _matmul,
    "patches": _patches,
}


def _pads(padding: int | str | Pads, size: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, int]) -> Pads:
    if isinstance(padding, int):
        return ((padding, padding), (padding, padding))
    pairs = lax.padtype_to_pads(size, kernel, strides, padding) if isinstance(padding, str) else padding
    (top, bottom), (left, right) = pairs
    return ((int(top), int(bottom)), (int(left), int(right)))


def _output_size(
    size: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, int], pads: Pads
) -> tuple[int, int]:
    height, width = ((n + sum(p) - k) // s + 1 for n, k, s, p in zip(size, kernel, strides, pads, strict=True))
    return height, width
