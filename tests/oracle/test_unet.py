"""UNets against PyTorch diffusers, one small network with random weights per family of configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.oracle import twins
from tests.oracle.comparisons import TOLERANCE, compare_unet, difference, run_torch_unet, run_unet, unet_inputs

# They differ from others in the channels of their input alone, as InstructPix2Pix does.
OTHER_CHANNELS = ("inpainting, 9 channels", "depth, 5 channels")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in OTHER_CHANNELS)) for name in twins.UNETS]
)
def test_output_equals_pytorch(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    twin = twins.unet_twin(name, tmp_path)
    inputs = unet_inputs(twin[1], rng)
    assert max(compare_unet(twin, inputs).values()) <= TOLERANCE
    assert_every_input_matters(twin[0], inputs)


@pytest.mark.parametrize("name", twins.PIXEL_UNETS)
def test_output_over_pixels_equals_pytorch(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    twin = twins.pixel_unet_twin(name, tmp_path)
    inputs = unet_inputs(twin[1], rng)
    assert max(compare_unet(twin, inputs).values()) <= TOLERANCE
    assert_every_input_matters(twin[0], inputs)


def assert_every_input_matters(module: Any, inputs: dict[str, Any]) -> None:
    """Agreement says little about an input that the random weights hardly look at."""
    output = run_torch_unet(module, inputs)
    leaves, tree = jax.tree.flatten(inputs)
    for i, leaf in enumerate(leaves):
        changed = [*leaves[:i], leaf[::-1].copy(), *leaves[i + 1 :]]
        other = run_torch_unet(module, jax.tree.unflatten(tree, changed))
        assert difference(other, output) > 100 * TOLERANCE, f"input {i} of {tree} has no weight"


def test_one_timestep_serves_the_batch(tmp_path: Path, rng: np.random.Generator) -> None:
    _, model, params = twins.unet_twin("SD 1.x", tmp_path)
    inputs = unet_inputs(model, rng)
    both = run_unet(model, params, inputs | {"timesteps": np.full(2, 500, np.int32)})
    one = run_unet(model, params, inputs | {"timesteps": np.int32(500)})
    np.testing.assert_allclose(one, both, atol=1e-5)
