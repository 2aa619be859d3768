"""The consistency decoder against PyTorch diffusers, given the same noise."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from diffuse_jax.models import ConsistencyDecoderVAE
from tests.oracle import twins
from tests.oracle.comparisons import TOLERANCE, compare_consistency_decoder

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("name", twins.CONSISTENCY_DECODERS)
def test_both_ways_equal_pytorch(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    twin = twins.consistency_decoder_twin(name, tmp_path)
    assert max(compare_consistency_decoder(twin, rng).values()) <= TOLERANCE


def test_pytorch_opens_what_is_saved_here(tmp_path: Path) -> None:
    module, model, params = twins.consistency_decoder_twin("otherwise", tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours", params)
    again = diffusers.ConsistencyDecoderVAE.from_pretrained(tmp_path / "ours")
    without = lambda config: {
        key: [*value] if isinstance(value, tuple) else value for key, value in config.items() if key[0] != "_"
    }
    assert without(again.config) == without(module.config)
    for key, tensor in module.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[key].numpy(), tensor.numpy())


def test_each_image_is_drawn_by_its_own_key(tmp_path: Path, rng: np.random.Generator) -> None:
    _, model, params = twins.consistency_decoder_twin("as published", tmp_path)
    latents = rng.standard_normal((2, 4, 4, 4)).astype(np.float32)
    keys = jax.random.split(jax.random.key(3), 2)
    decode = jax.jit(lambda z, k: model.apply({"params": params}, z, k, method="decode"))
    both = decode(latents, keys)
    np.testing.assert_allclose(decode(latents[1:], keys[1:])[0], both[1], atol=1e-5)
    assert np.abs(decode(latents, keys[::-1]) - both).max() > 0.1


def test_wrong_shapes_are_refused(tmp_path: Path) -> None:
    model = ConsistencyDecoderVAE.from_config(twins.CONSISTENCY_DECODERS["as published"])
    run = lambda p, z, e: model.apply({"params": p}, z, noise=e, method="decode")
    zeros = lambda *shape: np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=r"latents must be \[B,h,w,4\], got \(1, 4, 4, 3\)"):
        jax.eval_shape(run, model.shapes(), zeros(1, 4, 4, 3), zeros(2, 1, 8, 8, 3))
    with pytest.raises(ValueError, match=r"noise must be \(2, 1, 8, 8, 3\)"):
        jax.eval_shape(run, model.shapes(), zeros(1, 4, 4, 4), zeros(1, 1, 8, 8, 3))
    with pytest.raises(ValueError, match="latent_channels must be 4, got 16"):
        model.config.replace(latent_channels=16)
