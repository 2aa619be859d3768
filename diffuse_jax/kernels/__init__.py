"""Operations whose best algorithm depends on the platform, each behind one name."""

from diffuse_jax.kernels.attention import attention
from diffuse_jax.kernels.convolution import conv2d

__all__ = ["attention", "conv2d"]
