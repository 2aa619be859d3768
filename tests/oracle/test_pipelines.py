"""Whole pipelines against PyTorch diffusers: same folder, same first latents, twenty steps, same images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffuse_jax import pipelines, schedulers
from diffuse_jax.pipelines import AutoPipelineForText2Image, DiffusionPipeline
from tests.oracle.agreement import require_same

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
torch, diffusers = folders.torch, folders.diffusers

PROMPTS = ["a cat", "two dogs!"]
FAMILIES = {
    "sd1": (lambda folder: folders.stable_diffusion(folder), diffusers.StableDiffusionPipeline),
    "sd2": (lambda folder: folders.stable_diffusion(folder, v_prediction=True), diffusers.StableDiffusionPipeline),
    "sdxl": (folders.stable_diffusion_xl, diffusers.StableDiffusionXLPipeline),
}


SLOWLY = {"sd2": pytest.param("sd2", marks=pytest.mark.slow)}


@pytest.fixture(scope="module", params=[SLOWLY.get(name, name) for name in FAMILIES])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """Name, folder and PyTorch pipeline of one family."""
    make, kind = FAMILIES[request.param]
    folder = make(tmp_path_factory.mktemp(request.param) / "model")
    twin = kind.from_pretrained(folder)
    twin.set_progress_bar_config(disable=True)
    return request.param, folder, twin


def torch_images(twin: Any, latents: np.ndarray, **request: Any) -> np.ndarray:
    """What PyTorch makes, ``[B,H,W,3]`` in [0, 1], from channel-last latents."""
    tensor = torch.tensor(latents.transpose(0, 3, 1, 2))
    with torch.no_grad():
        return twin(latents=tensor, output_type="np", **request).images


def test_twenty_steps_give_the_same_images(family, rng, monkeypatch):
    name, folder, twin = family
    pipe = AutoPipelineForText2Image.from_pretrained(folder)
    latents = rng.standard_normal((2, 16, 16, 4)).astype(np.float32)
    short = {"num_inference_steps": 4}
    request = {"prompt": PROMPTS, "negative_prompt": ["bad", ""], "num_inference_steps": 20, "guidance_scale": 5.0}
    changes: list[dict[str, Any]] = [{}, short | {"negative_prompt": None}, short | {"guidance_rescale": 0.7}]
    if name == "sdxl":
        sizes = {"original_size": (20, 40), "crops_coords_top_left": (3, 5), "target_size": (64, 32)}
        # One image, because diffusers repeats the halves' sizes in another order than the halves themselves.
        other = {
            "negative_original_size": (9, 8),
            "negative_target_size": (7, 6),
            "prompt": "a",
            "negative_prompt": "b",
        }
        changes += [
            short | sizes,
            short | sizes | other,
            short | {"prompt_2": ["x", "y"], "negative_prompt_2": ["z", "w"]},
            short | {"denoising_end": 0.6},
        ]
    compiled = pipe.programs.compilations
    for change in changes:
        rows = 1 if isinstance((request | change)["prompt"], str) else 2
        theirs = torch_images(twin, latents[:rows], **request | change)
        ours = pipe(latents=latents[:rows], output_type="np", **request | change).images
        require_same(pipe, ours, theirs)
    sizes_of_batches = 2 if name == "sdxl" else 1
    assert pipe.programs.compilations <= compiled + sizes_of_batches

    if not hasattr(twin.text_encoder, "text_model"):  # transformers 5 has flattened it, diffusers still asks for it
        monkeypatch.setattr(type(twin.text_encoder), "text_model", property(lambda self: self), raising=False)
    for change in (short | {"clip_skip": 1}, short | {"guidance_scale": 1.0}):
        theirs = torch_images(twin, latents, **request | change)
        ours = pipe(latents=latents, output_type="np", **request | change).images
        require_same(pipe, ours, theirs)


@pytest.mark.parametrize(
    "sampler", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"]
)
def test_a_swapped_sampler_gives_the_images_of_the_same_swap(family, sampler: str, rng):
    _, folder, twin = family
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe = pipe.replace(scheduler=getattr(schedulers, sampler).from_config(pipe.scheduler))
    before = twin.scheduler
    twin.scheduler = getattr(diffusers, sampler).from_config(before.config)
    latents = rng.standard_normal((2, 16, 16, 4)).astype(np.float32)
    request = {"prompt": PROMPTS, "negative_prompt": ["bad", ""], "num_inference_steps": 8, "guidance_scale": 5.0}
    try:
        theirs = torch_images(twin, latents, **request)
    finally:
        twin.scheduler = before
    require_same(pipe, pipe(latents=latents, output_type="np", **request).images, theirs)


def test_pytorch_opens_what_we_save_and_gives_the_same_images(family, rng, tmp_path):
    _, folder, twin = family
    DiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path)
    again = type(twin).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    latents = rng.standard_normal((1, 16, 16, 4)).astype(np.float32)
    request = {"prompt": "a cat", "num_inference_steps": 2}
    assert np.array_equal(torch_images(twin, latents, **request), torch_images(again, latents, **request))


def test_distilled_guidance_is_an_input_of_the_network(tmp_path, rng):
    """LCM networks take the guidance scale as an embedding and run once a step."""
    folder = folders.stable_diffusion(tmp_path / "lcm")
    torch.manual_seed(0)
    unet = folders.lively(diffusers.UNet2DConditionModel(**folders.UNET, time_cond_proj_dim=16))
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False, "unet": unet}
    lcm = diffusers.LCMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    twin = diffusers.StableDiffusionPipeline.from_pretrained(folder, scheduler=lcm, **parts)
    twin.set_progress_bar_config(disable=True)
    twin.save_pretrained(tmp_path / "distilled")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "distilled")
    latents = rng.standard_normal((1, 16, 16, 4)).astype(np.float32)
    for scale in (1.5, 8.0):  # one step, because later ones draw their own noise
        request = {"prompt": "a cat", "num_inference_steps": 1, "guidance_scale": scale}
        ours = pipe(latents=latents, output_type="np", **request).images
        require_same(pipe, ours, torch_images(twin, latents, **request))


def test_padding_is_hidden_where_the_text_encoder_says_so(tmp_path, rng):
    """``use_attention_mask`` of a text encoder: both branches, given embeddings, and what is saved."""
    twin = diffusers.StableDiffusionPipeline.from_pretrained(folders.stable_diffusion(tmp_path / "plain"))
    twin.set_progress_bar_config(disable=True)
    latents = rng.standard_normal((2, 16, 16, 4)).astype(np.float32)
    request = {"prompt": PROMPTS, "negative_prompt": ["bad", ""], "num_inference_steps": 4, "guidance_scale": 5.0}
    without = torch_images(twin, latents, **request)
    twin.text_encoder.config.use_attention_mask = True
    twin.save_pretrained(tmp_path / "masked")
    theirs = torch_images(twin, latents, **request)
    assert 255 * np.abs(without - theirs).mean() > 2, "a mask that changes nothing proves nothing"
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "masked")
    pipe.save_pretrained(tmp_path / "again")
    for opened in (pipe, DiffusionPipeline.from_pretrained(tmp_path / "again")):
        ours = opened(latents=latents, output_type="np", **request).images
        require_same(pipe, ours, theirs)
    embeds = twin.encode_prompt(PROMPTS, "cpu", 1, False)[0].detach().numpy()
    given = {"prompt": None, "prompt_embeds": embeds}
    ours = pipe(latents=latents, output_type="np", **request | given).images
    require_same(pipe, ours, theirs)


@pytest.mark.parametrize("task", ["", "Img2Img", "Inpaint", "ControlNet"])
def test_old_folders_are_corrected_as_by_diffusers(task: str, tmp_path):
    """Settings of samplers and the size of UNets from the first releases; ControlNet pipelines keep them."""
    name = f"StableDiffusion{task}Pipeline"
    folder = (
        folders.controlled(tmp_path / "old", 1) if task == "ControlNet" else folders.stable_diffusion(tmp_path / "old")
    )
    for part, changes in {
        "scheduler/scheduler_config.json": {"steps_offset": 0, "clip_sample": True, "skip_prk_steps": False},
        "unet/config.json": {"_diffusers_version": "0.8.1"},
    }.items():
        path = folder / part
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    for kind in ("PNDMScheduler", "DDIMScheduler"):
        sampler = getattr(diffusers, kind).from_pretrained(folder, subfolder="scheduler")
        twin = getattr(diffusers, name).from_pretrained(folder, scheduler=sampler, safety_checker=None)
        sampler = getattr(schedulers, kind).from_pretrained(folder, subfolder="scheduler")
        pipe = getattr(pipelines, name).from_pretrained(folder, scheduler=sampler, safety_checker=None)
        for setting in ("steps_offset", "clip_sample", "skip_prk_steps"):
            if setting in twin.scheduler.config and hasattr(pipe.scheduler, setting):
                assert getattr(pipe.scheduler, setting) == twin.scheduler.config[setting], (kind, setting)
        assert pipe.components["unet"].config.sample_size == twin.unet.config.sample_size
    assert sampler.clip_sample, "what was given stays as it is"
