"""Autoencoders against PyTorch diffusers, with random weights."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.models.tiling import tiled_decode
from tests.oracle import twins
from tests.oracle.comparisons import TOLERANCE, channel_first, channel_last, compare_vae, difference


@pytest.mark.parametrize("name", twins.VAES)
def test_posterior_and_images_equal_pytorch(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    differences = compare_vae(twins.vae_twin(name, tmp_path), rng)
    assert max(differences.values()) <= TOLERANCE, differences


def test_a_tile_is_pytorch_on_the_same_tile(tmp_path: Path, rng: np.random.Generator) -> None:
    """Where an image consists of two tiles without overlap, each of them is what PyTorch makes of its latents."""
    module, model, params = twins.vae_twin("SDXL", tmp_path)
    latents = rng.standard_normal((1, 8, 16, 4)).astype(np.float32)
    decode = lambda z: model.apply({"params": params}, z, method="decode")
    tiled = jax.jit(lambda z: tiled_decode(decode, z, tile=8, overlap=0, scale=model.config.scale))
    with twins.torch.no_grad():
        halves = [module.decode(channel_first(half)).sample for half in np.split(latents, 2, axis=2)]
    assert difference(tiled(jnp.asarray(latents)), channel_last(twins.torch.cat(halves, dim=3))) <= TOLERANCE
