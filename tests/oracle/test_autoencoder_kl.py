"""Autoencoders against PyTorch diffusers, with random weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.models.tiling import tiled_decode
from tests.oracle import twins


@pytest.mark.parametrize("name", twins.VAES)
def test_posterior_and_images_equal_pytorch(
    name: str, tmp_path_factory: pytest.TempPathFactory, rng: np.random.Generator
) -> None:
    module, model, params = twins.vae_twin(name, tmp_path_factory.mktemp("vae"))
    images = rng.uniform(-1, 1, (2, 24, 20, 3)).astype(np.float32)
    latents = rng.standard_normal((2, 5, 6, model.config.latent_channels)).astype(np.float32)
    posterior = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))(params, images)
    decoded = jax.jit(lambda p, z: model.apply({"params": p}, z, method="decode"))(params, latents)
    with twins.torch.no_grad():
        theirs = module.encode(twins.channel_first(images)).latent_dist
        pixels = module.decode(twins.channel_first(latents)).sample
    assert twins.difference(posterior.mean, twins.channel_last(theirs.mean)) <= twins.TOLERANCE
    assert twins.difference(posterior.logvar, twins.channel_last(theirs.logvar)) <= twins.TOLERANCE
    assert twins.difference(decoded, twins.channel_last(pixels)) <= twins.TOLERANCE
    kl = theirs.kl().numpy()
    np.testing.assert_allclose(posterior.kl(), kl, rtol=1e-4)


def test_a_tile_is_pytorch_on_the_same_tile(tmp_path: object, rng: np.random.Generator) -> None:
    """Where a picture consists of two tiles without overlap, each of them is what PyTorch makes of its latents."""
    module, model, params = twins.vae_twin("SDXL", tmp_path)
    latents = rng.standard_normal((1, 8, 16, 4)).astype(np.float32)
    decode = lambda z: model.apply({"params": params}, z, method="decode")
    tiled = jax.jit(lambda z: tiled_decode(decode, z, tile=8, overlap=0, scale=model.config.scale))(
        jnp.asarray(latents)
    )
    with twins.torch.no_grad():
        halves = [module.decode(twins.channel_first(half)).sample for half in np.split(latents, 2, axis=2)]
    theirs = twins.channel_last(twins.torch.cat(halves, dim=3))
    assert twins.difference(tiled, theirs) <= twins.TOLERANCE
