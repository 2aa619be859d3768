"""Our pipelines on PyTorch: the same call gives the same images."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from diffuse_jax import torch_backend
from diffuse_jax.convert import convert
from diffuse_jax.models import UNet2DConditionModel
from diffuse_jax.pipelines import PIPELINES, DiffusionPipeline
from diffuse_jax.schedulers import EulerAncestralDiscreteScheduler
from diffuse_jax.weights import WeightsError

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
diffusers, torch = folders.diffusers, folders.torch
networks = pytest.importorskip("diffuse_jax.torch_backend.networks")

TOLERANCE = 1e-4  # of images in [0, 1], in float32
PROMPTS = ["a cat", "two dogs!"]


def relative(ours: Any, theirs: Any) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.05, "an image without content proves nothing"
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def both(folder: Path, **options: Any) -> tuple[Any, Any]:
    return DiffusionPipeline.from_pretrained(folder, **options), torch_backend.from_pretrained(
        folder, device="cpu", **options
    )


def test_stable_diffusion_with_every_option(tmp_path: Path) -> None:
    """Velocity, noise in the sampler, guidance rescaled, a guidance per image, and earlier layers of the encoder."""
    ours, theirs = both(folders.stable_diffusion(tmp_path / "sd", v_prediction=True))
    sampler = EulerAncestralDiscreteScheduler.from_config(ours.scheduler)
    ours, theirs = ours.replace(scheduler=sampler), theirs.replace(scheduler=sampler)
    request = {"prompt": PROMPTS, "num_inference_steps": 4, "seed": [3, 4], "output_type": "np"}
    for change in (
        {"negative_prompt": ["bad", ""], "guidance_scale": [5.0, 2.0], "guidance_rescale": [0.7, 0.0]},
        {"guidance_scale": 1.0, "clip_skip": 1},
    ):
        assert relative(ours(**request | change).images, theirs(**request | change).images) < TOLERANCE, change


def test_stable_diffusion_xl_with_sizes_and_two_prompts(tmp_path: Path) -> None:
    ours, theirs = both(folders.stable_diffusion_xl(tmp_path / "sdxl"))
    request: dict[str, Any] = {"prompt": "a", "prompt_2": "x", "negative_prompt": "b", "num_inference_steps": 3}
    request |= {"seed": 1, "output_type": "np", "original_size": (20, 40), "crops_coords_top_left": (3, 5)}
    for change in ({}, {"negative_original_size": (9, 8), "negative_target_size": (7, 6)}, {"negative_prompt": None}):
        assert relative(ours(**request | change).images, theirs(**request | change).images) < TOLERANCE, change


def test_distilled_guidance_is_an_input_of_the_network(tmp_path: Path) -> None:
    folder = folders.stable_diffusion(tmp_path / "lcm")
    unet = folders.lively(diffusers.UNet2DConditionModel(**folders.UNET, time_cond_proj_dim=16))
    unet.save_pretrained(folder / "unet")
    ours, theirs = both(folder)
    request = {"prompt": "a cat", "num_inference_steps": 2, "seed": 0, "guidance_scale": 8.0, "output_type": "np"}
    assert relative(ours(**request).images, theirs(**request).images) < TOLERANCE


@pytest.fixture(scope="module")
def shipped() -> Any:
    return torch_backend.from_pretrained("diffuse-jax/emoji", device="cpu")


SMALL = {"num_inference_steps": 2, "height": 32, "width": 32, "seed": 0}


def test_a_callback_sees_and_changes_the_latents(shipped: Any) -> None:
    """Step by step, with JAX arrays, channel-last; three images are computed as four."""
    seen: list[jax.Array] = []

    def blank(pipe: Any, step: int, timestep: float, tensors: dict[str, jax.Array]) -> dict[str, jax.Array]:
        seen.append(tensors["latents"])
        return {"latents": 0 * tensors["latents"]}

    out = shipped(["a", "b", "c"], output_type="latent", callback_on_step_end=blank, **SMALL)
    assert [x.shape for x in seen] == [(3, 8, 8, 4)] * 2, "padding is not shown"
    assert isinstance(out.images, jax.Array)
    assert out.images.shape == (3, 8, 8, 4)
    assert not np.asarray(out.images).any()


def test_images_come_one_by_one_or_together(shipped: Any) -> None:
    together = shipped(["a red apple", "a key"], **SMALL).images
    sliced = shipped.replace(vae_slicing=True)(["a red apple", "a key"], **SMALL).images
    assert [image.size for image in together] == [(32, 32)] * 2
    assert np.abs(np.asarray(together[1], int) - np.asarray(sliced[1], int)).max() <= 1


def test_tiled_decoding_works_on_pytorch_too(shipped: Any) -> None:
    ours = DiffusionPipeline.from_pretrained("diffuse-jax/emoji")
    tiled = [pipe.replace(vae_tiling=6)("a red apple", output_type="np", **SMALL).images for pipe in (ours, shipped)]
    assert relative(*tiled) < TOLERANCE


def test_image_to_image_and_inpainting_need_no_further_code(tmp_path: Path) -> None:
    """The method is ours on both sides, so a new pipeline runs on PyTorch at once."""
    ours, theirs = both(folders.stable_diffusion(tmp_path / "sd"))
    image = np.random.default_rng(0).random((32, 32, 3), np.float32)
    request = {"prompt": "a cat", "image": image, "num_inference_steps": 4, "seed": 0, "output_type": "np"}
    for task, more in (
        ("Img2Img", {"strength": 0.6}),
        ("Inpaint", {"mask_image": image[..., 0], "height": 32, "width": 32}),
    ):
        kind = PIPELINES[f"StableDiffusion{task}Pipeline"]
        images = [kind.from_pipe(pipe)(**request | more).images for pipe in (ours, theirs)]
        assert relative(*images) < TOLERANCE, task


def test_what_the_pytorch_side_does_not_support_is_an_error(shipped: Any, tmp_path: Path) -> None:
    flax = convert("diffuse-jax/emoji", tmp_path / "flax", to="flax-msgpack")
    with pytest.raises(WeightsError, match="PyTorch cannot open it"):
        torch_backend.from_pretrained(flax, device="cpu")
    if not folders.torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no CUDA device"):
            torch_backend.from_pretrained("diffuse-jax/emoji", device="cuda")


def test_a_pickle_is_read_without_error_messages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """diffusers first reports the safetensors that are not there as an error, and then reads the ``.bin``."""
    unet = diffusers.UNet2DConditionModel(**folders.UNET)
    unet.save_pretrained(tmp_path, safe_serialization=False)
    log = logging.getLogger("diffusers")
    log.addHandler(caplog.handler)
    networks.open_network(UNet2DConditionModel, tmp_path, "float32", torch.device("cpu"))
    log.removeHandler(caplog.handler)
    assert caplog.records == []
