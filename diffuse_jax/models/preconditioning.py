"""Preconditioning: how a network's input, output, skip connection and time are scaled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def consistency_denoiser(
    network: Callable[..., jax.Array], *, sigma_data: float = 0.5, sigma_min: float = 0.002
) -> Callable[..., jax.Array]:
    """A consistency function from a network: ``f(x, sigma) = c_skip x + c_out network(c_in x, 250 ln sigma)``.

    ``c_skip`` and ``c_out`` make ``f(x, sigma_min) = x`` whatever the network returns (Song et al. 2023, equation 5 and
    appendix C); ``c_in`` and the time ``1000 * ln(sigma) / 4`` are those of Karras et al. 2022, table 1, in the
    networks' units of time.

    Args:
      network: ``(x [B,...], time [B], *conditions) -> [B,...]``, for example a model's ``apply`` with its parameters.
      sigma_data: standard deviation of the data that the network was trained on.
      sigma_min: noise level at which a sample counts as clean.

    Returns:
      ``denoise(x, sigma, *conditions)``: ``x [B,...]`` at noise level ``sigma`` (``[B]`` or a scalar, in the units of
      ``x``) -> an estimate of the clean sample, ``[B,...]`` float32.
    """

    def denoise(x: jax.Array, sigma: jax.Array | float, *conditions: Any, **named: Any) -> jax.Array:
        sigmas = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), x.shape[:1])
        s = sigmas.reshape(-1, *(1,) * (x.ndim - 1))
        c_in = 1 / jnp.sqrt(s**2 + sigma_data**2)
        c_skip = sigma_data**2 / ((s - sigma_min) ** 2 + sigma_data**2)
        c_out = sigma_data * (s - sigma_min) * c_in
        return c_skip * x + c_out * network(c_in * x, 250 * jnp.log(sigmas), *conditions, **named)

    return denoise
