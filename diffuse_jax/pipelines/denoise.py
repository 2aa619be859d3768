"""The verbs that pipelines are made of: start from noise, denoise, guide, decode. Arrays in, arrays out.

A denoiser is a function ``(x [B,h,w,c], t scalar) -> output [B,h,w,c]``; guidance wraps one and gives another.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffuse_jax.models.autoencoder_kl import AutoencoderKL, unscale_latents
from diffuse_jax.models.base import Params
from diffuse_jax.models.embeddings import sinusoidal_embedding
from diffuse_jax.models.tiling import tiled_decode
from diffuse_jax.schedulers.plan import Plan, State

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]


def sample_keys(seeds: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two keys for each picture, for its first noise and for its steps; both arguments are uint32 ``[B]``."""
    keys = jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))(seeds, indices)
    return split_keys(keys)


def split_keys(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``[B]`` keys to the pair ``(k_init, k_loop)``."""
    both = jax.vmap(jax.random.split)(keys)
    return both[:, 0], both[:, 1]


def initial_noise(keys: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Standard normal latents ``[B, *shape]``, each picture from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def denoise(denoiser: Denoiser, plan: Plan, state: State, keys: jax.Array) -> State:
    """Run every evaluation of ``plan``: the one loop of the library. Its length is data, so it never recompiles."""
    return jax.lax.fori_loop(0, plan.num_evaluations, lambda i, s: denoise_step(denoiser, plan, s, i, keys), state)


def denoise_step(denoiser: Denoiser, plan: Plan, state: State, i: jax.Array, keys: jax.Array) -> State:
    """One evaluation of the network and what the sampler makes of it."""
    output = denoiser(plan.model_input(state, i), plan.timestep(i))
    return plan.step(state, i, output.astype(jnp.float32), keys)


def guided(both: Denoiser, scale: jax.Array, rescale: jax.Array) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, equation 6), rescaled (Lin et al. 2024, equations 15 and 16).

    Args:
      both: a denoiser of the doubled batch, unconditional half first.
      scale, rescale: ``[B]``; a scale of 1 gives the conditional output, a rescale of 0 leaves the guided one as it is.
    """

    def denoiser(x: jax.Array, t: jax.Array) -> jax.Array:
        output = both(jnp.concatenate([x, x]), t).astype(jnp.float32)
        negative, positive = jnp.split(output, 2)
        result = negative + per_sample(scale, x) * (positive - negative)
        std = lambda y: y.std((1, 2, 3), keepdims=True)
        phi = per_sample(rescale, x)
        return jnp.where(phi > 0, phi * result * (std(positive) / std(result)) + (1 - phi) * result, result)

    return denoiser


def per_sample(values: jax.Array, like: jax.Array) -> jax.Array:
    """``[B]`` reshaped to multiply ``like [B, ...]``."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def guidance_embedding(scale: jax.Array, dim: int) -> jax.Array:
    """A guidance scale ``[B]`` as the vector ``[B,dim]`` of distilled networks (Meng et al. 2023; Luo et al. 2023)."""
    return sinusoidal_embedding((scale - 1) * 1000, dim, flip_sin_to_cos=False, freq_shift=1)


def decode_latents(
    vae: AutoencoderKL, params: Params, latents: jax.Array, *, tile: int | None = None, slices: bool = False
) -> jax.Array:
    """Denoised latents ``[B,h,w,c]`` -> pictures ``[B,H,W,3]`` float32 in [0, 1].

    Args:
      tile: edge in latents of the tiles that large pictures are decoded in; None decodes in one piece.
      slices: one picture after another, which takes the memory of one.
    """
    one = lambda z: vae.apply({"params": params}, z, method="decode")
    decode = one if tile is None else lambda z: tiled_decode(one, z, tile, tile // 4, vae.config.scale)
    z = unscale_latents(latents.astype(jnp.float32), vae.config)
    images = jax.lax.map(lambda row: decode(row[None])[0], z) if slices else decode(z)
    return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0)


def to_uint8(images: jax.Array) -> jax.Array:
    """[0, 1] to the nearest of 0 to 255."""
    return jnp.round(images * 255).astype(jnp.uint8)
