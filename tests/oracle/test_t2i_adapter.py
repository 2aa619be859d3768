"""T2I-Adapters against PyTorch diffusers, and the UNets that add what they return inside their downward path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.models import T2IAdapter, combined_features
from diffuse_jax.pipelines import catalogue
from diffuse_jax.weights import Component
from tests.oracle import twins
from tests.oracle.comparisons import (
    TOLERANCE,
    channel_first,
    channel_last,
    compare_t2i_adapter,
    control_images,
    difference,
    run_unet,
    to_torch,
    unet_inputs,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("name", twins.T2I_ADAPTERS)
def test_features_equal_pytorch(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    twin = twins.t2i_adapter_twin(name, tmp_path)
    assert twin[1].config.total_downscale_factor == twin[0].total_downscale_factor
    assert max(compare_t2i_adapter(twin, control_images(twin[1].config, rng)).values()) <= TOLERANCE


@pytest.mark.parametrize("name", ["full, one channel", "light, three stages"])
def test_sizes_that_a_stage_cannot_halve_are_rounded_up_as_by_pytorch(
    name: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    twin = twins.t2i_adapter_twin(name, tmp_path)
    c = twin[1].config
    images = rng.uniform(0, 1, (2, 5 * c.downscale_factor, 7 * c.downscale_factor, c.in_channels)).astype(np.float32)
    assert max(compare_t2i_adapter(twin, images).values()) <= TOLERANCE


@pytest.mark.parametrize("name", ["full", "XL", "light"])
def test_pytorch_opens_what_is_saved_here(name: str, tmp_path: Path) -> None:
    module, model, params = twins.t2i_adapter_twin(name, tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours", params)
    again = diffusers.T2IAdapter.from_pretrained(tmp_path / "ours")
    assert settings(again.config) == settings(module.config)
    for key, tensor in module.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[key].numpy(), tensor.numpy())


def settings(config: Any) -> dict[str, Any]:
    """A config as JSON, without what begins with an underscore."""
    return {key: json.dumps(value) for key, value in config.items() if not key.startswith("_")}


def run_torch(module: Any, inputs: dict[str, Any], **residuals: Any) -> np.ndarray:
    given = {name: value for name, value in to_torch(inputs).items() if name not in ("sample", "timesteps")}
    with torch.no_grad():
        output = module(channel_first(inputs["sample"]), torch.tensor(inputs["timesteps"]), **given, **residuals)
    return channel_last(output.sample)


INSIDE = {
    "SD 1.x": [(8, 8, 16), (4, 4, 32), (4, 4, 32)],
    "SDXL base": [(4, 4, 16), (4, 4, 32), (4, 4, 32)],
    "odd sizes, 9 x 13": [(9, 13, 16), (3, 4, 16), (3, 4, 32)],
    "other embeddings": [(8, 8, 16)],
}
"""What an adapter may add to a UNet: for each level from before its downsampling if it has attention, from after it if
not, then for the middle block; a list may end early."""


@pytest.mark.parametrize("name", INSIDE)
def test_a_unet_adds_them_where_pytorch_does(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    module, model, params = twins.unet_twin(name, tmp_path)
    inputs = unet_inputs(model, rng)
    inside = [rng.standard_normal((2, *shape)).astype(np.float32) for shape in INSIDE[name]]
    ours = run_unet(model, params, inputs | {"down_intrablock_additional_residuals": inside})
    expected = run_torch(module, inputs, down_intrablock_additional_residuals=list(map(channel_first, inside)))
    assert difference(ours, expected) <= TOLERANCE
    for i in range(len(inside)):
        without = [array * (k != i) for k, array in enumerate(inside)]
        assert (
            difference(run_unet(model, params, inputs | {"down_intrablock_additional_residuals": without}), ours) > 0.01
        )


@pytest.mark.parametrize(("unet", "adapter"), [("SD 1.x", "full"), ("SDXL refiner", "XL")])
def test_two_adapters_steer_a_unet_as_those_of_pytorch(
    unet: str, adapter: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    module, model, params = twins.unet_twin(unet, tmp_path / "unet")
    pairs = [
        twins.twin(diffusers.T2IAdapter(**twins.T2I_ADAPTERS[adapter]), T2IAdapter, tmp_path / f"{seed}", seed)
        for seed in (1, 2)
    ]
    c, inputs = pairs[0][1].config, unet_inputs(model, rng)
    size = inputs["sample"].shape[1] * 8 // c.total_downscale_factor
    images = [control_images(c, rng, (size, size)) for _ in pairs]
    features = [net.apply({"params": own}, x) for (_, net, own), x in zip(pairs, images)]
    both = combined_features(features, jnp.array([0.7, 0.4]))
    ours = run_unet(model, params, inputs | {"down_intrablock_additional_residuals": both})

    together = diffusers.MultiAdapter([pair[0] for pair in pairs])
    with torch.no_grad():
        theirs = together(list(map(channel_first, images)), [0.7, 0.4])
    expected = run_torch(module, inputs, down_intrablock_additional_residuals=theirs)
    assert difference(ours, expected) <= TOLERANCE
    assert difference(ours, run_unet(model, params, inputs)) > 0.01


def test_weights_are_equal_if_none_are_given_and_may_differ_by_image(rng: np.random.Generator) -> None:
    features = [(jnp.asarray(rng.standard_normal((2, 3, 4, 5)), jnp.float32),) for _ in range(3)]
    a, b, c = (x for (x,) in features)
    np.testing.assert_allclose(combined_features(features)[0], (a + b + c) / 3, atol=1e-6)
    by_image = combined_features(features, [[1, 0, 0], [0, 0.5, 2]])[0]
    np.testing.assert_allclose(by_image, [a[0], 0.5 * b[1] + 2 * c[1]], atol=1e-6)
    with pytest.raises(ValueError, match=r"\[n\] or \[B,n\] for n=3 adapters, got \(2,\)"):
        combined_features(features, [1, 2])
    with pytest.raises(ValueError, match="features of the same shapes"):
        combined_features([features[0], (a[:, :2],)])


def test_several_adapters_are_the_folders_that_pytorch_writes(tmp_path: Path) -> None:
    """Its third is adapter_1_2, which it does not find again."""
    modules = [twins.randomise(diffusers.T2IAdapter(**twins.T2I_ADAPTERS["light"]), seed) for seed in range(3)]
    diffusers.MultiAdapter(modules).save_pretrained(str(tmp_path / "adapter"))
    found = list(catalogue.folders("adapter", Component("diffusers", "MultiAdapter", tmp_path / "adapter")))
    assert len(found) == 3
    for module, entry in zip(modules, found):
        assert catalogue.network(entry) is T2IAdapter
        _, params = T2IAdapter.from_pretrained(entry.folder)
        bias = module.state_dict()["adapter.body.0.in_conv.bias"].numpy()
        np.testing.assert_array_equal(params["adapter"]["body_0"]["in_conv"]["bias"], bias)
