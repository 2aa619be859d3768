"""Depth to image and the x2 latent upscaler, against PyTorch diffusers with its own noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from diffuse_jax.pipelines import DiffusionPipeline, StableDiffusionPipeline
from diffuse_jax.schedulers import DDIMScheduler
from tests.oracle.agreement import require_same

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
from tests.oracle import twins  # noqa: E402
from tests.oracle.test_editing_pipelines import EDGE, NEGATIVE, SHORT, compare, unet_changed  # noqa: E402

torch, diffusers, transformers = folders.torch, folders.diffusers, folders.transformers


def parts_of(folder: Path) -> dict[str, Any]:
    """What the pipelines of this page share, opened by PyTorch."""
    plain = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    return {name: plain.components[name] for name in ("vae", "unet", "text_encoder", "tokenizer")}


@pytest.fixture
def depth_folder(tmp_path: Path) -> Path:
    """A folder like Stable Diffusion 2's depth model."""
    plain = unet_changed(folders.stable_diffusion(tmp_path / "plain"), folders.UNET, in_channels=5)
    torch.manual_seed(0)
    estimator = twins.randomise(transformers.DPTForDepthEstimation(transformers.DPTConfig(**twins.DEPTH)))
    made = diffusers.StableDiffusionDepth2ImgPipeline(
        **parts_of(plain),
        scheduler=diffusers.DDIMScheduler(**folders.SD_SCHEDULER),
        depth_estimator=estimator,
        feature_extractor=transformers.DPTImageProcessor(size={"height": 32, "width": 32}),
    )
    made.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_depth_to_image(depth_folder: Path, tmp_path: Path) -> None:
    name = "StableDiffusionDepth2ImgPipeline"
    cls = diffusers.StableDiffusionDepth2ImgPipeline
    twin = cls.from_pretrained(depth_folder)
    twin.set_progress_bar_config(disable=True)
    pipe = DiffusionPipeline.from_pretrained(depth_folder)
    assert type(pipe).__name__ == name
    images: list[Image.Image] = [image.resize((40, 32)) for image in folders.images(2, EDGE)]
    request = SHORT | NEGATIVE | {"image": images, "strength": 0.7, "num_inference_steps": 6}
    compare(pipe, twin, **request)
    assert pipe.save_pretrained(tmp_path / "again")
    again = cls.from_pretrained(tmp_path / "again")
    assert type(again.depth_estimator).__name__ == "DPTForDepthEstimation"

    # A depth map may have any range and resolution; without an estimator there has to be one.
    maps = np.random.default_rng(0).uniform(-3, 90, (2, 11, 24)).astype(np.float32)
    pipe = pipe.replace(depth_estimator=None, feature_extractor=None)
    compare(pipe, twin, {"depth_map": torch.tensor(maps)}, **request, depth_map=maps)
    compiled = pipe.programs.compilations
    compare(pipe, twin, {"depth_map": torch.tensor(maps[:1])}, **request, depth_map=maps[0])
    assert pipe.programs.compilations == compiled, "depth is data"
    compare(pipe, twin, {"depth_map": torch.tensor(maps)}, **request | {"guidance_scale": 1.0}, depth_map=[*maps])
    flat = pipe(**request, depth_map=np.ones((4, 4)), seed=0, output_type="np").images
    assert np.isfinite(flat).all(), "a depth without differences is not divided by zero"

    latents = np.zeros((2, 16, 20, 4), np.float32)
    for changes, message in [
        ({}, "give depth_map: StableDiffusionDepth2ImgPipeline has no depth_estimator and no feature_extractor"),
        ({"image": None}, "give image: a PIL image"),
        ({"depth_map": images[0]}, r"a PIL image of one channel, got an array uint8 \(32, 40, 3\)"),
        ({"depth_map": "near"}, r"depth_map must be an array \[H,W\] or \[B,H,W\], .* got str"),
        ({"depth_map": [maps[0], maps[0, 1:]]}, r"maps of one size, got \[\(10, 24\), \(11, 24\)\]"),
        ({"depth_map": maps * np.nan}, "depth_map must be finite"),
        ({"depth_map": np.ones((3, 4, 4))}, "depth_map has 3 images for 2 prompts"),
        ({"strength": 1.5}, "strength"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe.request(**request | changes)
    assert pipe.request(**request | {"image": latents, "depth_map": maps}).rows["image_latents"].shape == latents.shape
    with pytest.raises(ValueError, match="cannot be estimated"):
        DiffusionPipeline.from_pretrained(depth_folder).request(**request | {"image": latents})
    with pytest.raises(ValueError, match="4 input channels; StableDiffusionDepth2ImgPipeline needs 5"):
        type(pipe).from_pretrained(folders.stable_diffusion(tmp_path / "sd")).request(**request, depth_map=maps)


K_UNET = twins.UNETS["x2 upscaler"] | {
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
    "up_block_types": ("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
    "cross_attention_dim": 32,
    "time_cond_proj_dim": 2 * 64 + 32,
    "sample_size": 16,
}


def test_latent_upscaler(tmp_path: Path) -> None:
    plain = folders.stable_diffusion(tmp_path / "plain")
    parts = parts_of(plain) | {"unet": twins.randomise(diffusers.UNet2DConditionModel(**K_UNET))}
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="sample"
    )
    made = diffusers.StableDiffusionLatentUpscalePipeline(**parts, scheduler=scheduler)
    made.save_pretrained(tmp_path / "model")
    twin = type(made).from_pretrained(tmp_path / "model")
    twin.set_progress_bar_config(disable=True)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model")
    images: list[Image.Image] = [image.resize((25, 16)) for image in folders.images(2, EDGE)]  # one pixel too wide
    request = SHORT | NEGATIVE | {"image": images}
    compare(pipe, twin, **request)
    compiled = pipe.programs.compilations
    compare(pipe, twin, **request | {"num_inference_steps": 6, "guidance_scale": 2.0})
    assert pipe.programs.compilations == compiled

    # From text to the large image on the device; with a scale of 0 the prompt is not used.
    base = StableDiffusionPipeline.from_pretrained(plain)
    latents = base("a cat", height=16, width=24, num_inference_steps=2, seed=0, output_type="latent").images
    small = {"image": latents, "prompt": "a cat", "num_inference_steps": 4, "guidance_scale": 0}
    given = {"image": torch.tensor(np.moveaxis(np.asarray(latents), -1, 1))}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        wanted = twin(generator=generator, output_type="np", **small | given).images
    ours = pipe(seed=[3], noise="torch", output_type="np", **small).images
    require_same(pipe, ours, wanted)
    assert isinstance(pipe.request(**small).rows["image_latents"], jax.Array)
    assert pipe(**small, num_images_per_prompt=2, seed=0).images[1].size == (48, 32)

    embeds = {"prompt": None, "prompt_embeds": np.zeros((1, 16, 32), np.float32)}
    for changes, message in [
        ({"image": None}, "give image: a PIL image"),
        (embeds, "pooled_prompt_embeds is missing"),
        ({"image": np.asarray(latents)[..., :3] + 9.0}, r"in \[0, 1\]; got float32"),
        ({"guidance_scale": [1.0, 2.0]}, "guidance_scale has 2 entries for 1 images"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe.request(**small | changes)
    with pytest.raises(ValueError, match="needs a scheduler with prediction_type='sample', got 'epsilon'"):
        pipe.replace(scheduler=DDIMScheduler()).request(**small)
    # Any sampler for networks that predict the clean sample will do: at its smallest steps the result is the same.
    ddim = pipe.replace(scheduler=DDIMScheduler(prediction_type="sample", clip_sample=False, **BETAS))
    euler = pipe(seed=[3], output_type="np", **small | {"num_inference_steps": 150}).images
    other = ddim(seed=[3], output_type="np", **small | {"num_inference_steps": 150}).images
    assert np.abs(euler - other).mean() < 0.02


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
