"""Perturbed-attention and self-attention guidance, panoramas and inpainting with a decoder that sees the image, under
the class names of PyTorch diffusers and against them, with its own noise.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffuse_jax import AutoPipelineForText2Image, pipelines
from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.pipelines.options import argument_names
from diffuse_jax.pipelines.programs import Programs
from tests.oracle.agreement import require_same

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
torch, diffusers = folders.torch, folders.diffusers

SEEDS, EDGE = [3, 4], 32
SHORT = {"prompt": ["a cat", "two dogs!"], "num_inference_steps": 4, "guidance_scale": 5.0}
NEGATIVE = {"negative_prompt": ["bad", ""]}
PERTURBED = [name for name in pipelines.__all__ if "PAG" in name]


@pytest.fixture(scope="module")
def images() -> list[Any]:
    return folders.images(4, EDGE)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.stable_diffusion(tmp_path_factory.mktemp("sd1") / "model")


def opened(name: str, folder: Path, saved: Path, **options: Any) -> tuple[DiffusionPipeline, Any]:
    """A class of PyTorch's that is saved, and what opens its folder here."""
    twin = getattr(diffusers, name).from_pretrained(folder, safety_checker=None, **options)
    twin.set_progress_bar_config(disable=True)
    twin.save_pretrained(saved)
    given = {k: v for k, v in options.items() if k == "pag_applied_layers"}
    pipe = DiffusionPipeline.from_pretrained(saved, **given).replace(programs=Programs())
    assert type(pipe) is getattr(pipelines, name)
    return pipe, twin


def compare(pipe: Any, twin: Any, **request: Any) -> np.ndarray:
    """Both sides of a request agree, with PyTorch's noise; the images are returned."""
    seeds = SEEDS[: len(request["prompt"])]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with torch.no_grad():
        wanted = twin(generator=generators, output_type="np", **request).images
    ours = pipe(seed=seeds, noise="torch", output_type="np", **request).images
    require_same(pipe, ours, wanted)
    return ours


def test_text_to_image_with_perturbed_attention(sd1: Path, tmp_path: Path) -> None:
    pipe, twin = opened("StableDiffusionPAGPipeline", sd1, tmp_path / "pag")
    request = SHORT | NEGATIVE
    default = compare(pipe, twin, **request)
    scaled = compare(pipe, twin, **request, pag_scale=1.5, pag_adaptive_scale=0.001)
    assert np.abs(default - scaled).mean() > 1e-3
    compare(pipe, twin, **request, pag_scale=0.0)
    assert pipe.programs.compilations == 1, "scales are data"
    layers = ["down_blocks.0", "up_blocks.1.attentions.(0|1)"]
    pipe, twin = opened("StableDiffusionPAGPipeline", sd1, tmp_path / "layers", pag_applied_layers=layers)
    other = compare(pipe, twin, **request)
    assert np.abs(default - other).mean() > 1e-3
    assert list(pipe.save_pretrained(tmp_path / "again").glob("model_index.json"))
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["pag_applied_layers"] == layers
    again = diffusers.StableDiffusionPAGPipeline.from_pretrained(tmp_path / "again", safety_checker=None)
    assert again.pag_applied_layers == layers
    assert pipe.replace(pag_applied_layers="mid").options["pag_applied_layers"] == "mid"
    with pytest.raises(ValueError, match=r"no self-attention in 'up_blocks.0'; it has down_blocks.0"):
        pipe.replace(pag_applied_layers="up_blocks.0")(**request)
    with pytest.raises(ValueError, match=r"'\(' is neither the name of a layer nor a regular expression"):
        pipe.replace(pag_applied_layers="(")(**request)


@pytest.mark.slow
def test_perturbed_attention_with_controlnets_and_inpainting(tmp_path: Path, images: list[Any]) -> None:
    """The ControlNet acts on the perturbed branch as on the others."""
    folder = folders.controlled(tmp_path / "model", 1)
    pipe, twin = opened("StableDiffusionControlNetPAGInpaintPipeline", folder, tmp_path / "saved")
    request = SHORT | NEGATIVE | {"image": images[:2], "control_image": images[2:], "mask_image": folders.masks(EDGE)}
    compare(pipe, twin, **request, height=EDGE, width=EDGE, pag_scale=2.0)


def test_perturbed_attention_with_sdxl_from_images(tmp_path: Path, images: list[Any]) -> None:
    folder = folders.stable_diffusion_xl(tmp_path / "model")
    pipe, twin = opened("StableDiffusionXLPAGImg2ImgPipeline", folder, tmp_path / "saved")
    compare(pipe, twin, **SHORT | NEGATIVE, image=images[:2], strength=0.8, pag_scale=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", PERTURBED)
def test_every_class_with_perturbed_attention(name: str, tmp_path: Path, images: list[Any]) -> None:
    xl, control = "XL" in name, "ControlNet" in name
    folder = (folders.stable_diffusion_xl if xl else folders.stable_diffusion)(tmp_path / "model")
    given: dict[str, Any] = {}
    if control:
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        given["controlnet"] = folders.control_net(0, unet) if xl else folders.control_net(0)
    pipe, twin = opened(name, folder, tmp_path / "saved", **given)
    request: dict[str, Any] = SHORT | NEGATIVE | {"pag_scale": 2.0}
    if "Img2Img" in name or "Inpaint" in name:
        request |= {"image": images[:2], "strength": 0.8}
    if "Inpaint" in name:
        request |= {"mask_image": folders.masks(EDGE), "height": EDGE, "width": EDGE}
    if control:
        request["control_image" if "image" in request else "image"] = images[2:]
    compare(pipe, twin, **request)


@pytest.mark.parametrize("name", PERTURBED)
def test_every_class_has_the_arguments_of_pytorch(name: str) -> None:
    ours, theirs = getattr(pipelines, name), inspect.signature(getattr(diffusers, name).__call__).parameters
    defaults = {k: p.default for k, p in inspect.signature(ours.__call__).parameters.items()} | ours.own_defaults
    for argument in {"strength", "guidance_scale"} & {*theirs} & {*defaults}:
        assert defaults[argument] == theirs[argument].default
    assert {"pag_scale", "pag_adaptive_scale", "prompt", "seed", "num_inference_steps"} <= argument_names(ours)
    assert ours.settings["pag_applied_layers"] == "honoured"


def test_auto_pipelines_with_perturbed_attention(sd1: Path) -> None:
    pipe = AutoPipelineForText2Image.from_pretrained(sd1, enable_pag=True, pag_applied_layers=["mid"])
    assert type(pipe) is pipelines.StableDiffusionPAGPipeline
    assert pipe.options["pag_applied_layers"] == ["mid"]
    images = pipelines.AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(images) is pipelines.StableDiffusionPAGImg2ImgPipeline
    assert images.options["pag_applied_layers"] == ["mid"]
    plain = pipelines.AutoPipelineForInpainting.from_pipe(images, enable_pag=False)
    assert type(plain) is pipelines.StableDiffusionInpaintPipeline
    assert plain.params["unet"] is pipe.params["unet"]


def test_self_attention_guidance(sd1: Path, tmp_path: Path) -> None:
    down = diffusers.DDIMScheduler(**folders.SD_SCHEDULER)
    pipe, twin = opened("StableDiffusionSAGPipeline", sd1, tmp_path / "sag", scheduler=down)
    default = compare(pipe, twin, **SHORT | NEGATIVE)
    strong = compare(pipe, twin, **SHORT | NEGATIVE, sag_scale=2.0)
    assert np.abs(default - strong).mean() > 1e-3
    assert pipe.programs.compilations == 1, "the scale is data"


@pytest.mark.parametrize(
    "circular", [pytest.param(False, id="flat"), pytest.param(True, id="circular", marks=pytest.mark.slow)]
)
def test_panorama(circular: bool, sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch takes eight pixels for a latent; the tiny autoencoder has two. It mixes up the embeddings of several
    prompts."""
    down = diffusers.DDIMScheduler(**folders.SD_SCHEDULER)
    pipe, twin = opened("StableDiffusionPanoramaPipeline", sd1, tmp_path / "panorama", scheduler=down)
    views = type(twin).get_views
    monkeypatch.setattr(type(twin), "get_views", lambda self, h, w, **kw: views(self, h * 4, w * 4, **kw))
    request = {"height": 32, "width": 160, "num_inference_steps": 2, "guidance_scale": 4.0, "prompt": ["a cat"]}
    compare(pipe, twin, **request, circular_padding=circular, view_batch_size=1 if circular else 2)
    defaults = inspect.signature(type(pipe).__call__).parameters
    assert (defaults["height"].default, defaults["width"].default) == (512, 2048)


# Inpainting with an autoencoder whose decoder sees the image outside of the mask


def test_inpainting_with_an_asymmetric_decoder(sd1: Path, tmp_path: Path, images: list[Any]) -> None:
    torch.manual_seed(0)
    config = {"down_block_out_channels": (8, 16), "up_block_out_channels": (16, 32), "norm_num_groups": 8}
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = folders.lively(diffusers.AsymmetricAutoencoderKL(**config, **types, sample_size=EDGE))
    pipe, twin = opened("StableDiffusionInpaintPipeline", sd1, tmp_path / "model", vae=vae)
    request = SHORT | NEGATIVE | {"image": images[:2], "mask_image": folders.masks(EDGE), "height": EDGE, "width": EDGE}
    found = compare(pipe, twin, **request)
    inside = pipe.request(seed=SEEDS, noise="torch", output_type="np", **request)
    latents = pipe(seed=SEEDS, noise="torch", output_type="latent", **request).images
    blind = pipelines.method.finish(  # the same latents, decoded without the image
        inside.method, pipe.params, inside.rows | {"keys": np.zeros(2), "mask": np.ones_like(inside.rows["mask"])},
        pipelines.method.State(latents, ()),
    )["images"]  # fmt: skip
    assert np.abs(found - blind).mean() > 1e-3
    sliced = pipe.replace(vae_slicing=True)(seed=SEEDS, noise="torch", output_type="np", **request).images
    np.testing.assert_allclose(found, sliced, atol=1e-4)
    with pytest.raises(ValueError, match=r"sees the known part of an image as a whole; inpaint with pipe.replace"):
        pipe.replace(vae_tiling=8)(**request)
    with pytest.raises(ValueError, match="give it as pixels, not as latents"):
        pipe(**request | {"image": latents})
