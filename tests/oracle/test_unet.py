"""UNets against PyTorch diffusers, one small network with random weights per family of configurations."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.oracle import twins


@pytest.mark.parametrize("name", twins.UNETS)
def test_output_equals_pytorch(name: str, tmp_path_factory: pytest.TempPathFactory, rng: np.random.Generator) -> None:
    module, model, params = twins.unet_twin(name, tmp_path_factory.mktemp("unet"))
    inputs = twins.unet_inputs(model, rng)
    theirs = twins.run_torch_unet(module, inputs)
    ours = twins.run_unet(model, params, inputs)
    assert ours.dtype == np.float32
    assert twins.difference(ours, theirs) <= twins.TOLERANCE
    assert_every_input_matters(module, inputs, theirs)


def assert_every_input_matters(module: object, inputs: dict, output: np.ndarray) -> None:
    """Agreement says little about an input that the random weights hardly look at."""
    leaves, tree = jax.tree.flatten(inputs)
    for i, leaf in enumerate(leaves):
        changed = [*leaves[:i], leaf[::-1].copy(), *leaves[i + 1 :]]
        other = twins.run_torch_unet(module, jax.tree.unflatten(tree, changed))
        assert twins.difference(other, output) > 100 * twins.TOLERANCE, f"input {i} of {tree} has no weight"


def test_one_timestep_serves_the_batch(tmp_path: object, rng: np.random.Generator) -> None:
    module, model, params = twins.unet_twin("SD 2.x", tmp_path)
    inputs = twins.unet_inputs(model, rng) | {"timesteps": np.int32(500)}
    assert (
        twins.difference(twins.run_unet(model, params, inputs), twins.run_torch_unet(module, inputs)) <= twins.TOLERANCE
    )
