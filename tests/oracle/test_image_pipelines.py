"""Image to image, inpainting, ControlNets and their combinations against PyTorch diffusers: the same folder, images,
prompts and noise give the same images, with one program for every strength, scale, window, prompt and number of steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffuse_jax import pipelines
from diffuse_jax.pipelines import DiffusionPipeline, draw
from diffuse_jax.pipelines.programs import Programs
from tests.oracle.agreement import require_same

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
torch, diffusers = folders.torch, folders.diffusers

PROMPTS = ["a cat", "two dogs!"]
SEEDS = [3, 4]
EDGE, LATENTS = 32, (16, 16, 4)
SHORT = {"num_inference_steps": 4, "guidance_scale": 5.0, "negative_prompt": ["bad", ""]}


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return folders.images(4, EDGE)


@pytest.fixture(scope="module")
def masks() -> list[Image.Image]:
    return folders.masks(EDGE)


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Name and folder of a checkpoint with four input channels."""
    make = {"sd1": folders.stable_diffusion, "sdxl": folders.stable_diffusion_xl}[request.param]
    return request.param, make(tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.stable_diffusion(tmp_path_factory.mktemp("sd1") / "model")


def class_of(family: str, task: str) -> str:
    return f"StableDiffusion{'XL' if family == 'sdxl' else ''}{task}Pipeline"


def both(name: str, folder: Path, **torch_parts: Any) -> tuple[DiffusionPipeline, Any]:
    """A pipeline's class opened here and in PyTorch."""
    twin = getattr(diffusers, name).from_pretrained(folder, safety_checker=None, **torch_parts)
    twin.set_progress_bar_config(disable=True)
    return getattr(pipelines, name).from_pretrained(folder).replace(programs=Programs()), twin


def noise(purpose: str, seeds: list[int] = SEEDS, shape: tuple[int, ...] = LATENTS) -> np.ndarray:
    """What our parts draw for one purpose, ``[B,h,w,c]``."""
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 0))(jnp.array(seeds, jnp.uint32))
    return np.asarray(draw(keys, purpose, shape))


class FixedNoise:
    """In place of PyTorch's noise: returns the given arrays in order, whatever is requested."""

    def __init__(self, *arrays: np.ndarray) -> None:
        self.left: Iterator[np.ndarray] = iter(arrays)

    def __call__(self, shape: Any, *args: Any, **kwargs: Any) -> Any:
        array = torch.tensor(next(self.left).transpose(0, 3, 1, 2))
        assert array.shape == tuple(shape)
        return array


def theirs(twin: Any, monkeypatch: pytest.MonkeyPatch, first: np.ndarray, encoded: list[str], **request: Any) -> Any:
    """PyTorch's images with our noise: ``first`` for the run, and for each encoded image what we draw for it."""
    monkeypatch.setattr(
        "diffusers.models.autoencoders.vae.randn_tensor", FixedNoise(*(noise(name) for name in encoded))
    )
    for kind in type(twin).__mro__:
        module = __import__("sys").modules[kind.__module__]
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", FixedNoise(first))
    with torch.no_grad():
        return twin(output_type="np", **request).images


Compare = Callable[..., None]


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> Compare:
    """Both sides of a request agree; keywords with ``_`` in front of them are for this function."""

    def check(
        pipe: Any, twin: Any, _encoded: list[str], _renamed: dict[str, str] | None = None, **request: Any
    ) -> None:
        first = rng.standard_normal((2, *LATENTS)).astype(np.float32)
        wanted = theirs(twin, monkeypatch, first, _encoded, **request)
        ours = pipe(seed=SEEDS, latents=first, output_type="np", **request).images
        require_same(pipe, ours, wanted)

    return check


def test_image_to_image(family, images, compare: Compare):
    name, folder = family
    pipe, twin = both(class_of(name, "Img2Img"), folder)
    request = SHORT | {"prompt": PROMPTS, "image": images[:2]}
    for change in (
        {"strength": 0.5},
        {"strength": 1.0, "num_inference_steps": 6},
        {"strength": 0.8, "prompt": ["x", "y"], "guidance_scale": 2.0},
    ):
        compare(pipe, twin, ["image"], **request | change)
    assert pipe.programs.compilations == 1, "strength, prompts, scale and steps are data"


SIZES = {"original_size": (20, 40), "crops_coords_top_left": (3, 5), "target_size": (64, 32)}
NEGATIVE_SIZES = [
    {"negative_original_size": (9, 8)},
    {"negative_target_size": (7, 6), "negative_crops_coords_top_left": (2, 1)},
    {"negative_original_size": (9, 8), "negative_target_size": (7, 6)},
]


@pytest.mark.parametrize("scored", [False, True], ids=["sizes", "aesthetic score"])
def test_negative_sizes_from_an_image(scored: bool, tmp_path: Path, images, compare: Compare):
    """Each has its own meaning, unlike in text to image; the score takes the place of the target's size."""
    folder = folders.stable_diffusion_xl(tmp_path / "model")
    if scored:
        config = folders.UNET_XL
        inputs = config["projection_class_embeddings_input_dim"] - config["addition_time_embed_dim"]
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(**config | {"projection_class_embeddings_input_dim": inputs})
        folders.lively(unet).save_pretrained(folder / "unet")
        index = folder / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"requires_aesthetics_score": True}))
    pipe, twin = both("StableDiffusionXLImg2ImgPipeline", folder)
    request = SHORT | {"prompt": PROMPTS, "image": images[:2], "strength": 0.5} | SIZES
    for change in ({}, *NEGATIVE_SIZES, {"aesthetic_score": 7.0, "negative_aesthetic_score": 1.0}):
        compare(pipe, twin, ["image"], **request | change)


def test_inpainting_with_any_checkpoint(family, images, masks, compare: Compare):
    name, folder = family
    pipe, twin = both(class_of(name, "Inpaint"), folder)
    request = SHORT | {"prompt": PROMPTS, "image": images[:2], "mask_image": masks, "height": EDGE, "width": EDGE}
    for change in ({"strength": 1.0}, {"strength": 0.6, "num_inference_steps": 5}, {"strength": 0.9999}):
        compare(pipe, twin, ["image", "masked image"], **request | change)
    assert pipe.programs.compilations == 1


@pytest.mark.parametrize("name", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_inpainting_with_nine_channels(name: str, tmp_path: Path, images, masks, compare: Compare):
    folder = {"sd1": folders.stable_diffusion, "sdxl": folders.stable_diffusion_xl}[name](tmp_path / "model")
    config = {"sd1": folders.UNET, "sdxl": folders.UNET_XL}[name]
    torch.manual_seed(0)
    folders.lively(diffusers.UNet2DConditionModel(**config | {"in_channels": 9})).save_pretrained(folder / "unet")
    pipe, twin = both(class_of(name, "Inpaint"), folder)
    request = SHORT | {"prompt": PROMPTS, "image": images[:2], "mask_image": masks, "height": EDGE, "width": EDGE}
    compare(pipe, twin, ["masked image"], **request | {"strength": 1.0})
    compare(pipe, twin, ["image", "masked image"], **request | {"strength": 0.7, "num_inference_steps": 6})
    assert pipe.programs.compilations == 1


@pytest.fixture(scope="module")
def programs() -> Programs:
    """For tests that run the same programs with other data."""
    return Programs()


@pytest.mark.parametrize("sampler", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_tasks_with_other_samplers(sd1: Path, sampler: str, programs: Programs, images, masks, compare: Compare):
    from diffuse_jax import schedulers

    for task, encoded in (("Img2Img", ["image"]), ("Inpaint", ["image", "masked image"])):
        pipe, twin = both(class_of("sd1", task), sd1)
        scheduler = getattr(schedulers, sampler).from_config(pipe.scheduler)
        pipe = pipe.replace(scheduler=scheduler, programs=programs)
        twin.scheduler = getattr(diffusers, sampler).from_config(twin.scheduler.config)
        request = SHORT | {"prompt": PROMPTS, "image": images[:2], "strength": 0.75, "num_inference_steps": 8}
        request |= {"mask_image": masks, "height": EDGE, "width": EDGE} if task == "Inpaint" else {}
        compare(pipe, twin, encoded, **request)


def test_latents_as_images(sd1: Path, rng, compare: Compare):
    """Another pipeline's latents continue without being decoded."""
    pipe, twin = both("StableDiffusionImg2ImgPipeline", sd1)
    latents = rng.standard_normal((2, *LATENTS)).astype(np.float32)
    first = rng.standard_normal((2, *LATENTS)).astype(np.float32)
    request = SHORT | {"prompt": PROMPTS, "strength": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        tensor = torch.tensor(latents.transpose(0, 3, 1, 2))
        wanted = theirs(twin, patch, first, [], image=tensor, **request)
    ours = pipe(image=latents, latents=first, output_type="np", **request).images
    require_same(pipe, ours, wanted)


# ControlNets


@pytest.fixture(
    scope="module", params=[pytest.param(1, id="one net", marks=pytest.mark.slow), pytest.param(2, id="two nets")]
)
def controlled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """A folder with one ControlNet or two, as PyTorch diffusers writes it."""
    return request.param, folders.controlled(tmp_path_factory.mktemp("control") / "model", request.param)


def control_of(nets: int, images: list[Any]) -> Any:
    """One image for each net, or one for each prompt; PyTorch diffusers does not take both but from noise."""
    return images[2:] if nets > 1 else images[1:3]


def of_nets(nets: int, *values: Any) -> Any:
    """One value for each net, or the value of the only one."""
    return list(values[:nets]) if nets > 1 else values[0]


def test_controlnet(controlled, images, compare: Compare):
    nets, folder = controlled
    pipe, twin = both("StableDiffusionControlNetPipeline", folder)
    request = SHORT | {"prompt": PROMPTS, "image": of_nets(nets, images[2:], images[:2])}
    if nets == 1:
        request["image"] = images[1:3]
    for change in (
        {},
        {"controlnet_conditioning_scale": of_nets(nets, 0.4, 1.5), "num_inference_steps": 6},
        {"control_guidance_start": of_nets(nets, 0.3, 0.0), "control_guidance_end": of_nets(nets, 0.7, 0.5)},
    ):
        compare(pipe, twin, [], **request | change)
    assert pipe.programs.compilations == 1, "scales and windows are data"
    off = pipe(seed=SEEDS, output_type="np", **request | {"controlnet_conditioning_scale": 0.0}).images
    on = pipe(seed=SEEDS, output_type="np", **request).images
    assert 255 * np.abs(on - off).mean() > 3, "a ControlNet that changes nothing proves nothing"


# Several nets are one for each; the ordinary suite has the tasks with two.
ONE_OR_TWO = [pytest.param(1, id="one net", marks=pytest.mark.slow), pytest.param(2, id="two nets")]
tasks_with_nets = pytest.mark.parametrize("controlled", ONE_OR_TWO, indirect=True)


@tasks_with_nets
def test_controlnet_with_image_to_image(controlled, images, compare: Compare):
    nets, folder = controlled
    pipe, twin = both("StableDiffusionControlNetImg2ImgPipeline", folder)
    request = SHORT | {"prompt": PROMPTS, "image": images[:2], "control_image": control_of(nets, images)}
    compare(pipe, twin, ["image"], **request | {"strength": 0.5})
    compare(pipe, twin, ["image"], **request | {"strength": 1.0, "control_guidance_end": of_nets(nets, 0.5, 0.75)})
    assert pipe.programs.compilations == 1


@pytest.mark.slow
@tasks_with_nets
def test_controlnet_with_image_to_image_at_a_given_size(controlled, compare: Compare):
    nets, folder = controlled
    pipe, twin = both("StableDiffusionControlNetImg2ImgPipeline", folder)
    larger = [image.resize((48, 40)) for image in folders.images(4, EDGE)]
    request = SHORT | {"prompt": PROMPTS, "image": larger[:2], "control_image": control_of(nets, larger)}
    compare(pipe, twin, ["image"], **request | {"height": EDGE, "width": EDGE})


@tasks_with_nets
def test_controlnet_with_inpainting(controlled, images, masks, compare: Compare):
    nets, folder = controlled
    pipe, twin = both("StableDiffusionControlNetInpaintPipeline", folder)
    request = SHORT | {"prompt": PROMPTS, "image": images[:2], "control_image": control_of(nets, images)}
    request |= {"mask_image": masks, "height": EDGE, "width": EDGE}
    compare(pipe, twin, ["image", "masked image"], **request | {"strength": 0.6, "num_inference_steps": 5})
    compare(
        pipe, twin, ["image", "masked image"], **request | {"controlnet_conditioning_scale": of_nets(nets, 1.0, 0.2)}
    )
    assert pipe.programs.compilations == 1


@pytest.mark.slow
@tasks_with_nets
def test_controlnet_with_inpainting_of_nine_channels(controlled, tmp_path: Path, images, masks, compare: Compare):
    import shutil

    nets, folder = controlled
    folder = Path(shutil.copytree(folder, tmp_path / "nine"))
    torch.manual_seed(0)
    folders.lively(diffusers.UNet2DConditionModel(**folders.UNET | {"in_channels": 9})).save_pretrained(folder / "unet")
    pipe, twin = both("StableDiffusionControlNetInpaintPipeline", folder)
    request = SHORT | {"prompt": PROMPTS, "image": images[:2], "control_image": control_of(nets, images)}
    request |= {"mask_image": masks, "height": EDGE, "width": EDGE}
    compare(pipe, twin, ["masked image"], **request)


def test_pytorch_opens_every_controlnet_that_we_save(controlled, tmp_path: Path):
    nets, folder = controlled
    pipelines.DiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path)
    before, after = (
        diffusers.StableDiffusionControlNetPipeline.from_pretrained(path, safety_checker=None).controlnet
        for path in (folder, tmp_path)
    )
    assert len(getattr(after, "nets", [after])) == nets
    states = before.state_dict(), after.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("fewer", [1, 2])
def test_fewer_controlnets_saved_over_more_leave_none_of_them(fewer: int, controlled, tmp_path: Path):
    nets, folder = controlled
    pipe = pipelines.DiffusionPipeline.from_pretrained(folder)
    parts = pipe.components["controlnet"], pipe.params["controlnet"]
    member = parts if nets == 1 else (parts[0][0], parts[1][0])
    pipe.replace(controlnet=[member] * 3).save_pretrained(tmp_path)
    pipe.replace(controlnet=member if fewer == 1 else [member] * fewer).save_pretrained(tmp_path)
    again = pipelines.DiffusionPipeline.from_pretrained(tmp_path).components["controlnet"]
    assert (len(again) if isinstance(again, tuple) else 1) == fewer
    assert len([*tmp_path.glob("controlnet*")]) == fewer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "give image: a PIL image"),
        ({"image": "cat.png"}, "image must be a PIL image, an array .* got str|2 ControlNets and 1 control images"),
        ({"control_guidance_start": 0.7, "control_guidance_end": 0.7}, "control_guidance_start=0.7 must be smaller"),
        ({"controlnet_conditioning_scale": [1.0, 2.0, 3.0]}, "has 3 entries for . ControlNets"),
        ({"prompt": ["a", "b", "c"]}, "has 2 images for 3 prompts"),
    ],
)
def test_impossible_control_is_refused(controlled, change: dict[str, Any], message: str, images):
    nets, folder = controlled
    pipe = pipelines.DiffusionPipeline.from_pretrained(folder).replace(programs=Programs())
    request = {"prompt": PROMPTS, "image": of_nets(nets, images[2:], images[:2])} | change
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(**request)
    assert pipe.programs.compilations == 0
