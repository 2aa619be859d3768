"""Regularisation of predicted noise: towards the standard normal distribution, by its gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffuse_jax.pipelines.method import Params, Part, Rows, Step, keys_for


@dataclasses.dataclass(frozen=True)
class Regularised(Part):
    """A denoiser whose predicted noise is made more like standard normal noise (Parmar et al. 2023, arXiv 2302.03027,
    section 3.2), for inversion: gradient steps against the auto-correlation and the divergence of each image's noise.

    Reads ``regularisation [B,4]``: the weights of the auto-correlation and of the divergence, and the numbers of
    repetitions and of random shifts in each (the same for all images); and ``to_noise [B,N,2]``, the factors of sample
    and prediction in the noise of each evaluation.
    """

    inner: Any

    @property
    def reads(self) -> tuple[str, ...]:
        return "regularisation", "to_noise"

    @property
    def adds(self) -> tuple[str, ...]:
        return ("regularisation_keys",)

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        return super().prepare(params, rows | {"regularisation_keys": keys_for(keys, "auto-correlation")}, keys)

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        output = self.inner(params, rows, x, step).astype(jnp.float32)
        repetitions, shifts = rows["regularisation"][0, 2:].astype(jnp.int32)

        def one(output: jax.Array, x: jax.Array, key: jax.Array, weights: jax.Array, factors: jax.Array) -> jax.Array:
            noise = lambda y: factors[0] * x + factors[1] * y
            key = jax.random.fold_in(key, step.i)

            def shifted(k: Any, y: jax.Array) -> jax.Array:
                key_of_shift = jax.random.fold_in(key, k)
                return y - weights[0] / shifts * jax.grad(lambda z: auto_correlation(noise(z), key_of_shift))(y)

            def repeated(k: Any, y: jax.Array) -> jax.Array:
                y = jax.lax.fori_loop(k * shifts, (k + 1) * shifts, shifted, y)
                return y - weights[1] * jax.grad(lambda z: divergence(noise(z)))(y)

            return jax.lax.fori_loop(0, repetitions, repeated, output)

        factors = rows["to_noise"][:, step.i]
        return jax.vmap(one)(output, x, rows["regularisation_keys"], rows["regularisation"], factors)


def auto_correlation(noise: jax.Array, key: jax.Array) -> jax.Array:
    """The squared correlation of ``noise [h,w,c]`` with itself, shifted at random, at every resolution above 8."""
    total = jnp.float32(0)
    while True:
        height, width, channels = noise.shape
        shifts = random_shifts(jax.random.fold_in(key, height), height, channels)
        for axis in (0, 1):
            rolled = jax.vmap(lambda x, n, axis=axis: jnp.roll(x, n, axis), (2, 0), 2)(noise, shifts)
            total += jnp.square((noise * rolled).mean((0, 1))).sum()
        if height <= 8:
            return total
        even = noise[: height // 2 * 2, : width // 2 * 2]
        noise = even.reshape(height // 2, 2, width // 2, 2, channels).mean((1, 3))


def random_shifts(key: jax.Array, height: int, channels: int) -> jax.Array:
    """A shift for each channel, below half the height, int32 ``[channels]``."""
    return jax.random.randint(key, (channels,), 0, max(height // 2, 1))


def divergence(noise: jax.Array) -> jax.Array:
    """How far mean and variance of ``noise`` are from those of the standard normal distribution."""
    variance = jnp.var(noise, ddof=1)
    return variance + jnp.square(noise.mean()) - 1 - jnp.log(variance + 1e-7)
