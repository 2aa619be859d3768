"""Two-dimensional convolution, channel-last, with the algorithm that is fastest for its shape.

Everywhere but on CPUs this is XLA's convolution. XLA's CPU convolution is much slower than its matrix products when
images are small and channels many, so there 3x3 kernels become matrix products; ``docs/performance.md`` has the
measurements (``benchmarks/conv_cpu.py`` repeats them). The choice depends on shapes and platform alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

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
    return (_on_cpu if current_platform() == "cpu" else _convolve)(x, kernel, strides, pads)


def _convolve(
    x: Array, kernel: Array, strides: tuple[int, int], pads: Pads, axes: tuple[str, str, str] = ("NHWC", "HWIO", "NHWC")
) -> Array:
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=axes)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _on_cpu(x: Array, kernel: Array, strides: tuple[int, int], pads: Pads) -> Array:
    """XLA's convolution with gradients that are as fast inside loops as outside.

    For CPUs XLA has a fast convolution of NHWC and HWIO, and brings others into that order, but not those in the body
    of a loop, where they take more than twenty times as long. Derivatives along ``x`` and ``kernel`` are written with
    the axes whose transposes JAX makes NHWC and HWIO.
    """
    return _convolve(x, kernel, strides, pads)


@partial(_on_cpu.defjvp, symbolic_zeros=True)
def _on_cpu_jvp(
    strides: tuple[int, int], pads: Pads, primals: tuple[Array, Array], tangents: tuple[Any, Any]
) -> tuple[Array, Any]:
    (x, kernel), (dx, dkernel) = primals, tangents
    terms = []  # frozen kernels have no tangent
    if not isinstance(dx, SymbolicZero):
        terms.append(_along_x(dx, kernel, strides, pads))
    if not isinstance(dkernel, SymbolicZero):
        terms.append(_along_kernel(x, dkernel, strides, pads))
    return _on_cpu(x, kernel, strides, pads), sum(terms[1:], terms[0])


@partial(jax.checkpoint, static_argnums=(2, 3))  # or the backward pass would store transposed copies
def _along_x(dx: Array, kernel: Array, strides: tuple[int, int], pads: Pads) -> Array:
    return _convolve(dx, kernel.transpose(0, 1, 3, 2), strides, pads, ("NHWC", "HWOI", "NHWC"))


@partial(jax.checkpoint, static_argnums=(2, 3))
def _along_kernel(x: Array, dkernel: Array, strides: tuple[int, int], pads: Pads) -> Array:
    axes = ("CHWN", "IHWO", "HWNC")
    y = _convolve(x.transpose(3, 1, 2, 0), dkernel.transpose(2, 0, 1, 3), strides, pads, axes)
    return y.transpose(2, 0, 1, 3)


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
