"""Operations whose best algorithm depends on the platform, each behind one name."""

from diffuse_jax.kernels.compiling import compiler_options
from diffuse_jax.kernels.convolution import conv2d
from diffuse_jax.kernels.dot_product import attention
from diffuse_jax.kernels.moments import group_mean
from diffuse_jax.kernels.platform import current_platform, target_platform

__all__ = ["attention", "compiler_options", "conv2d", "current_platform", "group_mean", "target_platform"]
