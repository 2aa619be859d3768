"""Two-dimensional convolution, channel-last."""

from __future__ import annotations

from jax import Array, lax


def conv2d(
    x: Array,
    kernel: Array,
    stride: int | tuple[int, int] = 1,
    padding: int | str | tuple[tuple[int, int], tuple[int, int]] = "SAME",
) -> Array:
    """Convolve x [B,H,W,C] with kernel [kh,kw,C,O]; padding is "SAME", "VALID", one number for all sides or (low, high) pairs."""
    strides = (stride, stride) if isinstance(stride, int) else stride
    pads = ((padding, padding),) * 2 if isinstance(padding, int) else padding
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))
