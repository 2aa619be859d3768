"""ControlNets with SDXL and in guess mode, InstructPix2Pix, the upscaler and latent consistency models, against PyTorch
diffusers with its own noise: the same folder, arguments and seeds give the same images.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffuse_jax import pipelines
from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.pipelines.programs import Programs
from tests.oracle.agreement import require_same

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
torch, diffusers = folders.torch, folders.diffusers

SEEDS, EDGE = [3, 4], 32
SHORT = {"prompt": ["a cat", "two dogs!"], "num_inference_steps": 4, "guidance_scale": 5.0}
NEGATIVE = {"negative_prompt": ["bad", ""]}


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return folders.images(4, EDGE)


def unet_changed(folder: Path, config: dict[str, Any], **changes: Any) -> Path:
    """The folder with another UNet."""
    torch.manual_seed(0)
    folders.lively(diffusers.UNet2DConditionModel(**config | changes)).save_pretrained(folder / "unet")
    return folder


def opened(name: str, folder: Path, **parts: Any) -> tuple[DiffusionPipeline, Any]:
    """A pipeline's class here and in PyTorch."""
    twin = getattr(diffusers, name).from_pretrained(folder, safety_checker=None, **parts)
    twin.set_progress_bar_config(disable=True)
    return getattr(pipelines, name).from_pretrained(folder).replace(programs=Programs()), twin


def compare(pipe: Any, twin: Any, theirs: dict[str, Any] | None = None, **request: Any) -> None:
    """Both sides of a request agree, with PyTorch's noise; ``theirs`` are arguments as PyTorch takes them."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    with torch.no_grad():
        wanted = twin(generator=generators, output_type="np", **request | (theirs or {})).images
    ours = pipe(seed=SEEDS, noise="torch", output_type="np", **request).images
    require_same(pipe, ours, wanted)


# ControlNets


@pytest.fixture(
    scope="module", params=[pytest.param(1, id="one net", marks=pytest.mark.slow), pytest.param(2, id="two nets")]
)
def sdxl_controlled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    plain = folders.stable_diffusion_xl(tmp_path_factory.mktemp("xl") / "plain")
    unet = diffusers.UNet2DConditionModel.from_pretrained(plain / "unet")
    nets = [folders.control_net(seed, unet) for seed in range(request.param)]
    folder = plain.with_name("model")
    pipe = diffusers.StableDiffusionXLControlNetPipeline.from_pretrained(
        plain, controlnet=nets if request.param > 1 else nets[0]
    )
    pipe.save_pretrained(folder)
    return request.param, folder


def of_nets(nets: int, *values: Any) -> Any:
    return list(values[:nets]) if nets > 1 else values[0]


def test_controlnet_with_sdxl(sdxl_controlled: tuple[int, Path], images: list[Any]) -> None:
    nets, folder = sdxl_controlled
    pipe, twin = opened("StableDiffusionXLControlNetPipeline", folder)
    request = SHORT | NEGATIVE | {"image": images[2:] if nets > 1 else images[:2], "height": EDGE, "width": EDGE}
    compare(pipe, twin, **request)
    scales = {
        "controlnet_conditioning_scale": of_nets(nets, 0.4, 1.5),
        "control_guidance_end": of_nets(nets, 0.5, 0.75),
    }
    compare(pipe, twin, **request | scales | {"num_inference_steps": 6})
    compare(pipe, twin, **request | {"guess_mode": True})
    assert pipe.programs.compilations == 1, "scales, windows and guess mode are data"


def test_controlnet_with_sdxl_from_images(sdxl_controlled: tuple[int, Path], images: list[Any]) -> None:
    nets, folder = sdxl_controlled
    request = SHORT | NEGATIVE | {"image": images[:2], "control_image": images[2:] if nets > 1 else images[1:3]}
    pipe, twin = opened("StableDiffusionXLControlNetImg2ImgPipeline", folder)
    compare(pipe, twin, **request | {"strength": 0.6, "num_inference_steps": 5})
    control = [image.resize((64, 56)) for image in request["control_image"]]
    other_sizes = {"image": [image.resize((48, 40)) for image in images[:2]], "control_image": control}
    compare(pipe, twin, **request | other_sizes | {"height": EDGE, "width": EDGE})
    assert pipe.programs.compilations == 1
    pipe, twin = opened("StableDiffusionXLControlNetInpaintPipeline", folder)
    masked = request | {"mask_image": folders.masks(EDGE), "height": EDGE, "width": EDGE}
    compare(pipe, twin, **masked | {"num_inference_steps": 5})


def test_guess_mode(tmp_path: Path, images: list[Any]) -> None:
    folder = folders.controlled(tmp_path / "model", 1)
    pipe, twin = opened("StableDiffusionControlNetPipeline", folder)
    request = SHORT | NEGATIVE | {"image": images[:2], "guess_mode": True}
    compare(pipe, twin, **request)
    compare(pipe, twin, **request | {"guidance_scale": 1.0})


# Editing


@pytest.mark.parametrize("family", [pytest.param("sd1", marks=pytest.mark.slow), "sdxl", "cosxl"])
def test_instruct_pix2pix(family: str, tmp_path: Path, images: list[Any]) -> None:
    xl = family != "sd1"
    folder = (folders.stable_diffusion_xl if xl else folders.stable_diffusion)(tmp_path / "model")
    unet_changed(folder, folders.UNET_XL if xl else folders.UNET, in_channels=8)
    name = f"StableDiffusion{'XL' if xl else ''}InstructPix2PixPipeline"
    if family == "cosxl":
        diffusers.StableDiffusionXLInstructPix2PixPipeline.from_pretrained(folder, is_cosxl_edit=True).save_pretrained(
            folder
        )
    pipe, twin = opened(name, folder)
    request = SHORT | NEGATIVE | {"image": images[:2]} | ({"height": EDGE, "width": EDGE} if xl else {})
    compare(pipe, twin, **request)
    compare(pipe, twin, **request | {"guidance_scale": 3.0, "image_guidance_scale": 2.5, "num_inference_steps": 6})
    assert pipe.programs.compilations == 1, "both scales are data"
    if not xl:
        compare(pipe, twin, **request | {"image_guidance_scale": 0.5})
        with pytest.raises(ValueError, match="give image: a PIL image"):
            pipe(**request | {"image": None})
        plain = pipelines.StableDiffusionInstructPix2PixPipeline.from_pretrained(
            folders.stable_diffusion(tmp_path / "plain")
        )
        with pytest.raises(ValueError, match="4 input channels; StableDiffusionInstructPix2PixPipeline needs 8"):
            plain(**request)


def test_upscaler(tmp_path: Path) -> None:
    """A small image of odd proportions; the sampler and the noise's schedule are two components."""
    folder = folders.stable_diffusion(tmp_path / "plain")
    changes = {"in_channels": 7, "num_class_embeds": 50, "only_cross_attention": (True, False)}
    unet_changed(folder, folders.UNET, **changes)
    parts = {
        name: kind.from_pretrained(folder / name)
        for name, kind in {
            "vae": diffusers.AutoencoderKL,
            "unet": diffusers.UNet2DConditionModel,
            "text_encoder": folders.transformers.CLIPTextModel,
            "tokenizer": folders.transformers.CLIPTokenizer,
        }.items()
    }
    low = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler = diffusers.DDIMScheduler(**folders.SD_SCHEDULER)
    made = diffusers.StableDiffusionUpscalePipeline(
        **parts, low_res_scheduler=low, scheduler=scheduler, max_noise_level=40
    )
    made.save_pretrained(tmp_path / "model")
    pipe, twin = opened("StableDiffusionUpscalePipeline", tmp_path / "model")
    small = [image.resize((20, 12)) for image in folders.images(2, EDGE)]
    request = SHORT | NEGATIVE | {"image": small}
    compare(pipe, twin, **request)
    compare(pipe, twin, **request | {"noise_level": 35, "num_inference_steps": 6})
    assert pipe.programs.compilations == 1, "the level is data"
    with pytest.raises(ValueError, match="noise_level must be an integer from 0 to 40, got 41"):
        pipe(**request | {"noise_level": 41})


def test_latent_consistency(tmp_path: Path, images: list[Any]) -> None:
    folder = folders.stable_diffusion(tmp_path / "plain")
    unet_changed(folder, folders.UNET, time_cond_proj_dim=16)
    scheduler = diffusers.LCMScheduler.from_config(diffusers.PNDMScheduler.from_pretrained(folder / "scheduler").config)
    plain = diffusers.StableDiffusionPipeline.from_pretrained(folder, scheduler=scheduler, safety_checker=None)
    diffusers.LatentConsistencyModelPipeline(**plain.components).save_pretrained(tmp_path / "model")
    pipe, twin = opened("LatentConsistencyModelPipeline", tmp_path / "model")
    request = {"prompt": SHORT["prompt"], "height": EDGE, "width": EDGE}
    compare(pipe, twin, **request)
    compare(pipe, twin, **request | {"guidance_scale": 3.0, "num_inference_steps": 2, "original_inference_steps": 20})
    with pytest.raises(TypeError, match="takes no negative_prompt: its guidance is distilled"):
        pipe(**request, negative_prompt="bad")
    shutil.copytree(tmp_path / "model", tmp_path / "again")
    pipe, twin = opened("LatentConsistencyModelImg2ImgPipeline", tmp_path / "again")
    compare(pipe, twin, prompt=SHORT["prompt"], image=images[:2], strength=0.7)


def test_inpainting_by_two_models(tmp_path: Path, images: list[Any]) -> None:
    """The first hands its latents over with the known part clean, and the second goes on from there."""
    pipe, twin = opened("StableDiffusionXLInpaintPipeline", folders.stable_diffusion_xl(tmp_path / "model"))
    request = SHORT | {"mask_image": folders.masks(EDGE), "height": EDGE, "width": EDGE}
    first = request | {"image": images[:2], "strength": 1.0, "denoising_end": 0.5, "output_type": "latent"}
    with torch.no_grad():
        latents = twin(**first, generator=[torch.Generator().manual_seed(seed) for seed in SEEDS]).images
    ours = pipe(**first, seed=SEEDS, noise="torch").images
    wanted = np.ascontiguousarray(latents.numpy().transpose(0, 2, 3, 1))
    np.testing.assert_allclose(ours, wanted, atol=1e-3)
    compare(pipe, twin, {"image": latents}, **request | {"image": wanted, "denoising_start": 0.5})
    with pytest.raises(ValueError, match="denoising_start needs image= as latents"):
        pipe(**request | {"image": images[:2], "denoising_start": 0.5})


# Inpainting a region, and putting the original back


@pytest.mark.parametrize("name", ["StableDiffusionInpaintPipeline", "StableDiffusionControlNetInpaintPipeline"])
def test_inpainting_a_region(name: str, tmp_path: Path) -> None:
    """The region around the mask is repainted at full size; the rest stays, to the bit."""
    control = "ControlNet" in name
    make = (lambda path: folders.controlled(path, 1)) if control else folders.stable_diffusion
    pipe, twin = opened(name, make(tmp_path / "model"))
    image = folders.images(1, 64)[0]
    mask = Image.new("L", image.size)
    mask.paste(255, (10, 20, 22, 30))
    request = {"prompt": "a cat", "image": image, "mask_image": mask, "padding_mask_crop": 4, "num_inference_steps": 4}
    request |= {"height": EDGE, "width": EDGE} | ({"control_image": image} if control else {})
    with torch.no_grad():
        wanted = twin(generator=[torch.Generator().manual_seed(3)], **request).images[0]
    found = pipe(seed=[3], noise="torch", **request).images[0]
    assert found.size == wanted.size == image.size
    difference = np.abs(np.asarray(found, int) - np.asarray(wanted, int))
    assert difference.mean() < 0.05
    assert difference.max() <= 2
    black = np.asarray(mask) == 0
    np.testing.assert_array_equal(np.asarray(found)[black], np.asarray(image)[black])
    if not control:
        with pytest.raises(ValueError, match="one PIL image and one PIL mask of the same size, got 64x64 and 32x32"):
            pipe(**request | {"mask_image": mask.resize((32, 32))})
        with pytest.raises(ValueError, match='it needs output_type="pil", got'):
            pipe(**request | {"output_type": "np"})
    else:
        with pytest.raises(ValueError, match="control images must be PIL images of 64x64, as image is; got 32x32"):
            pipe(**request | {"control_image": image.resize((32, 32))})


@pytest.mark.parametrize("output", ["pil", "np"])
def test_unmasked_pixels_are_those_of_the_image(output: str, tmp_path: Path, images: list[Any]) -> None:
    pipe = pipelines.StableDiffusionInpaintPipeline.from_pretrained(folders.stable_diffusion(tmp_path / "model"))
    hard, soft = folders.masks(EDGE)[0], np.linspace(0, 1, EDGE * EDGE, dtype=np.float32).reshape(EDGE, EDGE)
    request = {
        "prompt": ["a", "b"],
        "image": images[:2],
        "num_inference_steps": 2,
        "seed": [1, 2],
        "output_type": output,
    }
    request |= {"height": EDGE, "width": EDGE, "num_images_per_prompt": 1}
    for mask in (hard, soft):
        plain = pipe(mask_image=mask, **request).images
        kept = pipe(mask_image=mask, keep_unmasked=True, **request).images
        shades = np.asarray(hard) / 255 if mask is hard else soft
        for image, painted, found in zip(images, plain, kept, strict=False):
            original = np.asarray(image) if output == "pil" else np.asarray(image, np.float32) / 255
            painted, found = np.asarray(painted), np.asarray(found)
            np.testing.assert_array_equal(found[shades == 0], original[shades == 0])
            np.testing.assert_array_equal(found[shades == 1], painted[shades == 1])
            mixture = shades[..., None] * painted + (1 - shades[..., None]) * original
            np.testing.assert_allclose(found, mixture, atol=0.51 if output == "pil" else 1e-6)
    with pytest.raises(ValueError, match="keep_unmasked needs an image of pixels"):
        pipe(mask_image=hard, keep_unmasked=True, **request | {"output_type": "latent"})
