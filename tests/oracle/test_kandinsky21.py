"""Kandinsky 2.1 against PyTorch diffusers, with its own noise: the decoders, which read the prompt, and both stages."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffuse_jax import pipelines
from diffuse_jax.adapters.tokens import save_rows
from diffuse_jax.pipelines import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    KandinskyInpaintPipeline,
    KandinskyPipeline,
    KandinskyPriorPipeline,
    KandinskyV22PriorPipeline,
)
from diffuse_jax.pipelines.programs import Programs
from diffuse_jax.schedulers import EulerDiscreteScheduler
from tests.oracle import kandinsky
from tests.oracle.agreement import require_same
from tests.oracle.comparisons import difference
from tests.oracle.kandinsky import compare, embeddings

folders, torch, diffusers = kandinsky.folders, kandinsky.torch, kandinsky.diffusers
EDGE, SHORT = kandinsky.EDGE, kandinsky.SHORT
PROMPTS = ["a cat", "two red houses"]


opened = functools.partial(kandinsky.opened_from, folders.kandinsky21_decoder)


def test_decoder(tmp_path: Path) -> None:
    pipe, twin = opened("KandinskyPipeline", tmp_path / "model")
    compare(pipe, twin, prompt=PROMPTS, **embeddings(2), **SHORT)
    assert pipe.programs.compilations == 1
    changes = {"negative_prompt": ["rain", "a dog"], "guidance_scale": 2.0, "num_inference_steps": 4}
    compare(pipe, twin, prompt=PROMPTS, **embeddings(2), **SHORT | changes, seed=6)
    assert pipe.programs.compilations == 1, "prompts, steps, scales and seeds are data"
    for changes, message in [
        ({"prompt": None}, "prompt must be a string or a list"),
        ({"prompt": PROMPTS}, "prompt has 2 entries for 1 image_embeds; give one, or one for each"),
        ({"image_embeds": None}, r"give image_embeds \[N,32\]"),
        ({"negative_image_embeds": np.zeros((3, 32), np.float32)}, "1 image_embeds, but 3 negative_image_embeds"),
        ({"prompt_embeds": np.zeros((1, 77, 24))}, "has no argument prompt_embeds"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            pipe.request(**{"prompt": "a cat"} | embeddings() | changes)
    save_rows(tmp_path / "word.safetensors", "<cat>", np.ones((1, 24), np.float32))
    with pytest.raises(ValueError, match="the text_encoder of this KandinskyPipeline is a MultilingualCLIP"):
        pipe.load_textual_inversion(tmp_path / "word.safetensors")
    image, other = folders.images(1, EDGE)[0], KandinskyInpaintPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match=r"4 input channels .* not a UNet for KandinskyInpaintPipeline"):
        other.request("a cat", **embeddings(), image=image, mask_image=image)


def test_prior(tmp_path: Path) -> None:
    """The class of 2.2 under another name."""
    folder = folders.kandinsky_prior(tmp_path / "prior", "KandinskyPriorPipeline")
    pipe, twin = DiffusionPipeline.from_pretrained(folder), diffusers.KandinskyPriorPipeline.from_pretrained(folder)
    assert type(pipe) is KandinskyPriorPipeline
    twin.set_progress_bar_config(disable=True)
    folders.exact(twin.scheduler)
    request = {"prompt": "a cat", "negative_prompt": "rain", "num_inference_steps": 4}
    with torch.no_grad():
        wanted = twin(generator=torch.Generator().manual_seed(5), **request)
    ours = pipe(seed=5, noise="torch", **request)
    for name in ("image_embeds", "negative_image_embeds"):
        assert difference(getattr(ours, name), getattr(wanted, name).numpy()) < 1e-4
    given = (["a cat", folders.images(1, 40)[0]], [0.25, 0.5])
    options = {"num_inference_steps": 4, "seed": 1}
    mixed = pipe.interpolate(*given, **options).image_embeds
    other = KandinskyV22PriorPipeline.from_pipe(pipe).interpolate(*given, **options).image_embeds
    np.testing.assert_array_equal(mixed, other)
    again = KandinskyPriorPipeline.from_pipe(KandinskyV22PriorPipeline.from_pipe(pipe))
    assert again.params["prior"] is pipe.params["prior"]


@pytest.mark.slow
def test_image_to_image(tmp_path: Path) -> None:
    """The noise of the start follows from the strength alone, not from the sampler's noise schedule."""
    pipe, twin = opened("KandinskyImg2ImgPipeline", tmp_path / "model")
    request = embeddings() | SHORT | {"prompt": "a cat", "image": folders.images(1, 80)[0]}
    compare(pipe, twin, **request, strength=0.7)
    assert pipe.programs.compilations == 1
    compare(pipe, twin, **request | {"num_inference_steps": 5}, strength=0.57, guidance_scale=2.0)
    assert pipe.programs.compilations == 1, "the strength is data"
    compare(pipe, twin, **request, strength=1.0, negative_prompt="rain")
    with pytest.raises(ValueError, match="give image: a PIL image"):
        pipe.request(**request | {"image": None}, strength=0.7)
    with pytest.raises(ValueError, match=r"strength must lie in \(0, 1\], got 1.5"):
        pipe.request(**request, strength=1.5)
    little = pipe.request(**request | {"num_inference_steps": 900}, strength=0.0015).rows["mixture"]
    np.testing.assert_allclose(little, [[(1 - 1e-4) ** 0.5, 1e-2]], rtol=1e-6, err_msg="DDPM's first timestep")
    scaled = pipe.replace(scheduler=EulerDiscreteScheduler.from_config(pipe.scheduler))
    seen = []
    for found in (each.request(**request, strength=0.7, seed=0) for each in (pipe, scaled)):
        image = np.ones((1, 8, 8, 4), np.float32)
        rows = found.rows | {"image_latents": image, "noise": 0.5 * image}
        seen.append(found.plan.model_input(found.method.start(found.plan, rows), 0))
    np.testing.assert_allclose(*seen, atol=1e-5, err_msg="a sampler that scales its input")


def test_inpainting(tmp_path: Path) -> None:
    pipe, twin = opened("KandinskyInpaintPipeline", tmp_path / "model", in_channels=9)
    image, mask = folders.images(1, EDGE)[0], np.zeros((EDGE, EDGE), np.float32)
    mask[16:40, 24:48] = 1
    request = embeddings() | SHORT | {"prompt": "a cat", "image": image}
    inputs = lambda array: {"image": image, "mask_image": array.copy()}
    compare(pipe, twin, {"image": image, "mask_image": folders.Image.fromarray(mask > 0)}, **request, mask_image=mask)
    assert pipe.programs.compilations == 1
    corner = np.zeros_like(mask)
    corner[:8, 56:] = 1
    changes = {"num_inference_steps": 4, "guidance_scale": 2.0, "negative_prompt": "rain"}
    compare(pipe, twin, inputs(corner), **request | changes, mask_image=corner)
    assert pipe.programs.compilations == 1, "the mask is data"
    with pytest.raises(ValueError, match="give mask_image"):
        pipe.request(**request)


@pytest.mark.slow
def test_other_samplers_sizes_and_no_guidance(tmp_path: Path) -> None:
    pipe, twin = opened("KandinskyPipeline", tmp_path / "model")
    sizes = {"num_inference_steps": 3, "height": 60, "width": 65}
    compare(pipe, twin, prompt="a cat", **embeddings(), **sizes, num_images_per_prompt=2)
    compare(pipe, twin, prompt="a cat", **embeddings(), **SHORT, guidance_scale=1.0)
    several = embeddings() | SHORT | {"guidance_scale": 1.0, "output_type": "np"}
    both = pipe("a cat", **several, num_images_per_prompt=2, seed=[1, 2]).images
    np.testing.assert_allclose(both[1:], pipe("a cat", **several, seed=[2]).images, atol=1e-4)
    pipe.save_pretrained(tmp_path / "again")
    compare(pipe, type(twin).from_pretrained(tmp_path / "again"), prompt="a cat", **embeddings(), **SHORT)
    table = folders.KANDINSKY_SCHEDULER
    for scheduler in (
        diffusers.DDPMScheduler(**table, variance_type="learned_range"),
        diffusers.DDIMScheduler(**table, set_alpha_to_one=False, thresholding=True, sample_max_value=2.0),
    ):
        twin.register_modules(scheduler=scheduler)
        twin.save_pretrained(tmp_path / "other")
        compare(DiffusionPipeline.from_pretrained(tmp_path / "other"), twin, prompt="a cat", **embeddings(), **SHORT)


@pytest.mark.slow
def test_both_stages_in_one(tmp_path: Path) -> None:
    """As PyTorch's, with the noise of one generator that goes on from stage to stage; the negative prompt is the
    prior's."""
    prior = folders.kandinsky_prior(tmp_path / "prior", "KandinskyPriorPipeline")
    decoder = folders.kandinsky21_decoder(tmp_path / "decoder")
    (decoder / "README.md").write_text(f"---\nprior:\n- {prior}\n---\n")
    pipe = AutoPipelineForText2Image.from_pretrained(decoder).replace(programs=Programs())
    assert type(pipe).__name__ == "KandinskyCombinedPipeline"
    pipe.save_pretrained(tmp_path / "model")
    twin = diffusers.KandinskyCombinedPipeline.from_pretrained(tmp_path / "model")
    twin.set_progress_bar_config(disable=True)
    folders.exact(twin.prior_scheduler)
    text = {"prompt": "a cat", "negative_prompt": "rain"}
    steps = {"num_inference_steps": 2, "prior_num_inference_steps": 3, "prior_guidance_scale": 2.0}
    first = {"num_inference_steps": 3, "guidance_scale": 2.0}
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        twin.prior_pipe(**text, **first, generator=generator)
        noise = torch.randn((1, 4, 8, 8), generator=generator).numpy()
        size = {"height": EDGE, "width": EDGE, "output_type": "np"}
        wanted = twin(**text, **steps, **size, generator=torch.Generator().manual_seed(5)).images
    embeds = pipe.prior_pipe(**text, **first, seed=5, noise="torch")
    second = {"num_inference_steps": 2, "latents": np.moveaxis(noise, 1, -1)}
    require_same(pipe, pipe.decoder_pipe("a cat", **embeds, **size, **second, seed=5).images, wanted)

    request: dict[str, Any] = {"prompt": PROMPTS, "negative_prompt": "rain", "num_images_per_prompt": 2}
    compiled = pipe.programs.compilations
    ours = pipe(**request, **steps, **size, seed=4).images
    embeds = pipe.prior_pipe(**request, **first, seed=4)
    stages = pipe.decoder_pipe(PROMPTS, **embeds, **size, num_inference_steps=2, seed=4).images
    np.testing.assert_allclose(ours, stages, atol=1e-4)
    assert pipe.programs.compilations == compiled + 2
    pipe(**request, **steps | {"prior_num_inference_steps": 2, "guidance_scale": 2.0}, **size, seed=1)
    assert pipe.programs.compilations == compiled + 2, "steps, scales and seeds are data"
    with pytest.raises(TypeError, match="prompt must be a string or a list"):
        pipe.request()

    painter = AutoPipelineForImage2Image.from_pipe(pipe)
    assert (
        type(painter).__name__ == "KandinskyImg2ImgCombinedPipeline" and painter.params["unet"] is pipe.params["unet"]
    )
    image = folders.images(1, EDGE)[0]
    rows = painter.request(PROMPTS, image, **steps, height=EDGE, width=EDGE, strength=0.5, seed=1).rows
    assert rows["initial_image"].shape == (2, EDGE, EDGE, 3) and rows["mixture"].shape == (2, 2)
    assert type(AutoPipelineForInpainting.from_pipe(painter)).__name__ == "KandinskyInpaintCombinedPipeline"
    assert type(painter.decoder_pipe).__name__ == "KandinskyImg2ImgPipeline"
    assert type(KandinskyPipeline.from_pipe(painter.decoder_pipe)) is KandinskyPipeline


@pytest.mark.slow
@pytest.mark.parametrize(("task", "channels"), [("Img2Img", 4), ("Inpaint", 9)])
def test_both_stages_of_other_tasks(task: str, channels: int, tmp_path: Path) -> None:
    """The same for an image, and for an image and a mask."""
    prior = folders.kandinsky_prior(tmp_path / "prior", "KandinskyPriorPipeline")
    decoder = folders.kandinsky21_decoder(tmp_path / "decoder", f"Kandinsky{task}Pipeline", in_channels=channels)
    name = f"Kandinsky{task}CombinedPipeline"
    pipe = getattr(pipelines, name).from_pretrained(decoder, prior=prior).replace(programs=Programs())
    pipe.save_pretrained(tmp_path / "model")
    twin = getattr(diffusers, name).from_pretrained(tmp_path / "model")
    twin.set_progress_bar_config(disable=True)
    folders.exact(twin.prior_scheduler)
    inputs = {"image": folders.images(1, EDGE)[0]}
    inputs |= {"strength": 0.6} if task == "Img2Img" else {"mask_image": folders.masks(EDGE)[0]}
    text, size = {"prompt": "a cat", "negative_prompt": "rain"}, {"height": EDGE, "width": EDGE, "output_type": "np"}
    first, steps = {"num_inference_steps": 3, "guidance_scale": 2.0}, {"num_inference_steps": 4}
    generator = torch.Generator().manual_seed(5)
    both = {"prior_num_inference_steps": 3, "prior_guidance_scale": 2.0, **text, **inputs, **steps, **size}
    with torch.no_grad():
        twin.prior_pipe(**text, **first, generator=generator)
        noise = np.moveaxis(torch.randn((1, 4, 8, 8), generator=generator).numpy(), 1, -1)
        wanted = twin(**both, generator=torch.Generator().manual_seed(5)).images
    scale = {"guidance_scale": 4.0}
    embeds = pipe.prior_pipe(**text, **first, seed=5, noise="torch")
    second = {"prompt": "a cat", **inputs, **steps, **size, **scale}
    require_same(pipe, pipe.decoder_pipe(**embeds, **second, latents=noise, seed=5).images, wanted)

    embeds = pipe.prior_pipe(**text, **first, seed=4)
    stages = pipe.decoder_pipe(**embeds, **second, seed=4).images
    np.testing.assert_allclose(pipe(**both, seed=4).images, stages, atol=1e-4)
    compiled = pipe.programs.compilations
    changes = {"prior_num_inference_steps": 2, "num_inference_steps": 5, "guidance_scale": 2.0}
    pipe(**both | changes | ({"strength": 0.8} if task == "Img2Img" else {}), seed=1)
    assert pipe.programs.compilations == compiled, "steps, scales, strength and seeds are data"
