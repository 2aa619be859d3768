"""DeepFloyd IF's three stages in one chain on eight devices: the images of one device, and T5 there only to encode."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from diffuse_jax.pipelines import placement
from diffuse_jax.pipelines.programs import Programs
from tests.pipelines import tiny, tiny_if

MESHES = [
    "data=4,fsdp=2",
    pytest.param("data=8", marks=pytest.mark.slow),
    pytest.param("data=2,fsdp=2,tensor=2", marks=pytest.mark.slow),
]
PROMPTS = ["a cat", "a dog"]
CALL = {"num_inference_steps": 2, "num_images_per_prompt": 4, "seed": 0}

STAGES = tiny_if.cascade(tiny.pipeline())
T5 = STAGES.first.params["text_encoder"]


def t5_on_devices() -> int:
    """How many copies of T5's token embedding, which no other array is as large as, are on devices."""
    return sum(array.shape == T5["shared"]["embedding"].shape for array in jax.live_arrays())


def opened(mesh: str | None) -> tiny_if.Cascade:
    """The stages on a mesh, with T5 in host memory and only in the first one."""
    first, second, third = (stage.replace(mesh=mesh, programs=Programs()) for stage in STAGES)
    return tiny_if.Cascade(first.offload("text_encoder"), second.replace(text_encoder=None, tokenizer=None), third)


def images(stages: tiny_if.Cascade) -> list[np.ndarray]:
    """What each stage makes; the first two hand on arrays of the devices."""
    embeds = stages.first.encode_prompt(PROMPTS, negative_prompt="bad")._asdict()
    small = stages.first(**embeds, **CALL, output_type="jax").images
    medium = stages.second(**embeds, image=small, **CALL, output_type="jax").images
    large = stages.third(PROMPTS, image=medium, noise_level=100, **CALL, output_type="np").images
    return [np.asarray(found) for found in (small, medium, large)]


@pytest.fixture(scope="module")
def alone() -> list[np.ndarray]:
    return images(opened(None))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_images_are_those_without_a_mesh(mesh: str, alone: list[np.ndarray]) -> None:
    found = images(opened(mesh))
    assert [array.shape for array in found] == [(8, 16, 16, 3), (8, 32, 32, 3), (8, 64, 64, 3)]
    for ours, wanted in zip(found, alone, strict=True):
        assert np.ptp(wanted) > 0.1
        np.testing.assert_allclose(ours, wanted, atol=2e-4)


def test_t5_is_on_the_devices_only_while_it_encodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both branches of guidance are encoded in one visit."""
    mesh, moved, put = "data=4,fsdp=2", [], placement.put_params
    monkeypatch.setattr(placement, "put_params", lambda *args: moved.append(t5_on_devices()) or put(*args))
    first, before = opened(mesh).first, t5_on_devices()
    moved.clear()
    embeds = first.encode_prompt(PROMPTS, negative_prompt="bad")
    assert len(moved) == 1
    assert t5_on_devices() == before
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(first.params["text_encoder"]))
    assert {*embeds.prompt_embeds.devices()} == {*jax.devices()}
    stays = STAGES.first.replace(mesh=mesh)
    assert t5_on_devices() == before + 1, "of a pipeline that is not offloaded"
    del stays
