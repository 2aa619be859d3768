"""The four layers that every network is made of, in channel-last layout.

``dtype`` is the dtype of computations, ``param_dtype`` that of newly initialised parameters. Norms compute their
statistics in float32 whatever ``dtype`` is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeParamShapeError
from jax.typing import DTypeLike

from diffuse_jax.kernels import conv2d, group_mean
from diffuse_jax.sharding import gathered, shard_rows

Activation = Callable[[jax.Array], jax.Array]

ACTIVATIONS: dict[str, Activation] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
    "relu": nn.relu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}

SHAPES_ONLY: ContextVar[bool] = ContextVar("SHAPES_ONLY", default=False)
"""True while only the shapes of a network's parameters are wanted, which need no random values. Tracing their
initialisers is half the time of finding them."""


def parameter(module: nn.Module, name: str, init: Callable[..., jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """The parameter ``name`` of a module, initialised by ``init(key, shape, dtype)`` where there is none yet.

    As ``module.param``, which traces ``init`` anew at every ``apply`` to learn the shape; that is half the time of
    tracing a network.

    Raises:
      flax.errors.ScopeParamShapeError: the given parameter has another shape.
    """
    if not module.has_variable("params", name):
        if SHAPES_ONLY.get():
            return module.variable("params", name, jnp.zeros, shape, module.param_dtype).value
        return module.param(name, init, shape, module.param_dtype)
    value = nn.meta.unbox(module.get_variable("params", name))
    if value.shape != shape:
        raise ScopeParamShapeError(name, "/".join(module.path), value.shape, shape)
    return value


class Dense(nn.Module):
    """``x @ kernel + bias`` over the last axis; kernel ``[in, features]``."""

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        kernel = gathered((*self.path, "kernel"), jnp.asarray(kernel, self.dtype))
        y = jnp.asarray(x, self.dtype) @ kernel
        if not self.use_bias:
            return y
        bias = parameter(self, "bias", nn.initializers.zeros_init(), (self.features,))
        return y + jnp.asarray(bias, self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


class Conv(nn.Module):
    """Two-dimensional convolution ``[B,H,W,C] -> [B,H',W',features]``; kernel ``[k,k,C,features]``.

    ``padding`` is the number of zeros on each side, ``((top, bottom), (left, right))``, or "SAME" (TensorFlow's).
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: int | str | tuple[tuple[int, int], tuple[int, int]] = 1
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), shape)
        kernel = gathered((*self.path, "kernel"), jnp.asarray(kernel, self.dtype))
        makes_patches = self.stride >= self.kernel_size > 1  # its windows are disjoint, and become tokens
        x = jnp.asarray(x, self.dtype)
        y = conv2d(
            x if makes_patches else shard_rows(x, self.stride),
            self.used(kernel),
            stride=self.stride,
            padding=self.padding,
        )
        y = y if makes_patches else shard_rows(y)
        if not self.use_bias:
            return y
        bias = parameter(self, "bias", nn.initializers.zeros_init(), (self.features,))
        return y + jnp.asarray(bias, self.dtype).reshape(1, 1, 1, -1)

    def used(self, kernel: jax.Array) -> jax.Array:
        """The kernel to convolve with, from that of the checkpoint."""
        return kernel


def normalised(x: jax.Array, groups: int, eps: float) -> tuple[jax.Array, jax.Array]:
    """``x [B,...,C]`` less the mean of its group, ``[B,N,groups,C/groups]`` in float32, and what to multiply it with,
    ``[B,1,groups,1]``, for unit variance.

    Raises:
      ValueError: the channels cannot be split into so many groups.
    """
    *lead, channels = x.shape
    if channels % groups:
        raise ValueError(f"{channels} channels cannot be split into {groups} groups of equal size (norm_num_groups)")
    grouped = x.reshape(lead[0], -1, groups, channels // groups)
    centred = jnp.asarray(grouped, jnp.float32) - group_mean(grouped, x.dtype)
    return centred, jax.lax.rsqrt(group_mean(jnp.square(centred), x.dtype) + eps)


class GroupNorm(nn.Module):
    """Group normalisation over the last axis (Wu & He 2018), ``[B,...,C]``; statistics and affine in float32."""

    groups: int = 32
    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        centred, inverse = normalised(x, self.groups, self.eps)
        scale = parameter(self, "scale", nn.initializers.ones_init(), (channels,))
        bias = parameter(self, "bias", nn.initializers.zeros_init(), (channels,))
        affine = (1, 1, self.groups, channels // self.groups)
        slope = inverse * jnp.asarray(scale, jnp.float32).reshape(affine)
        y = centred * slope + jnp.asarray(bias, jnp.float32).reshape(affine)
        return y.reshape(x.shape).astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis (Ba et al. 2016); statistics and affine in float32."""

    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (1,) * (x.ndim - 1) + (x.shape[-1],)
        scale = parameter(self, "scale", nn.initializers.ones_init(), shape[-1:])
        bias = parameter(self, "bias", nn.initializers.zeros_init(), shape[-1:])
        x32 = jnp.asarray(x, jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        y = centred * inverse * jnp.asarray(scale, jnp.float32).reshape(shape)
        return (y + jnp.asarray(bias, jnp.float32).reshape(shape)).astype(self.dtype)
