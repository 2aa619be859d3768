"""``noise="torch"`` against PyTorch: the same seed gives the same noise, and with it the same image."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffuse_jax import pipelines, schedulers
from diffuse_jax.noise import torch_normal
from diffuse_jax.pipelines.method import Method
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.streams import step_draws
from tests.oracle.agreement import require_same

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
torch, diffusers = folders.torch, folders.diffusers

SEEDS = [0, 1, 2**32 + 5, 2**63, 2**64 - 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_successive_draws_of_every_size(seed: int):
    """Small tensors are drawn in another way than large ones, and leave half a pair for the next small one."""
    sizes = [(n,) for n in (*range(1, 18), 0, 23, 32, 5, 4 * 64 * 64, 3, 1003, 48, 1)] + [(2, 3, 5), (), (4, 9, 9)]
    generator = torch.Generator().manual_seed(seed)
    for ours, size in zip(torch_normal(seed, *sizes), sizes, strict=True):
        theirs = torch.randn(size, generator=generator).numpy()
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


# Pipelines

PROMPTS = ["a cat", "two dogs!"]
EDGE = 32
CALL = {"prompt": PROMPTS, "num_inference_steps": 4, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny checkpoint by name; "nine" has channels for the mask."""
    root = tmp_path_factory.mktemp("noise")
    make = {"XL": folders.stable_diffusion_xl}

    def get(name: str) -> Path:
        if not (path := root / (name or "plain")).exists():
            make.get(name, folders.stable_diffusion)(path)
            if name == "nine":
                torch.manual_seed(0)
                unet = diffusers.UNet2DConditionModel(**folders.UNET | {"in_channels": 9})
                folders.lively(unet).save_pretrained(path / "unet")
        return path

    return get


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return folders.images(2, EDGE)


@pytest.fixture(scope="module")
def masks() -> list[Image.Image]:
    return folders.masks(EDGE)


def check(name: str, folder: Path, request: dict[str, Any], seed: Any = (3, 2**40), **sampler: str) -> None:
    """The same request and seeds here and in PyTorch, without replacing any noise."""
    twin = getattr(diffusers, name).from_pretrained(folder, safety_checker=None)
    twin.set_progress_bar_config(disable=True)
    pipe = getattr(pipelines, name).from_pretrained(folder)
    if sampler:
        pipe = pipe.replace(scheduler=getattr(schedulers, sampler["sampler"]).from_config(pipe.scheduler))
        twin.scheduler = getattr(diffusers, sampler["sampler"]).from_config(twin.scheduler.config)
    one = isinstance(seed, int)
    make = lambda s: torch.Generator().manual_seed(s)
    wanted = twin(generator=make(seed) if one else [make(s) for s in seed], output_type="np", **request).images
    ours = pipe(seed=seed, noise="torch", output_type="np", **request).images
    require_same(pipe, ours, wanted)


# The noise of XL is that of Stable Diffusion; what differs is the call around it.
FAMILIES = ["", pytest.param("XL", marks=pytest.mark.slow)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [(3, 2**40), 5], ids=["one generator each", "one for all"])
def test_text_to_image(family: str, seed: Any, folder):
    check(f"StableDiffusion{family}Pipeline", folder(family), CALL, seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_image_to_image(family: str, folder, images):
    check(f"StableDiffusion{family}Img2ImgPipeline", folder(family), CALL | {"image": images, "strength": 0.5})


@pytest.mark.parametrize(
    ("family", "strength"), [("", 1.0), pytest.param("XL", 0.6, marks=pytest.mark.slow), ("nine", 1.0), ("nine", 0.6)]
)
def test_inpainting(family: str, strength: float, folder, images, masks):
    request = CALL | {"image": images, "mask_image": masks, "height": EDGE, "width": EDGE, "strength": strength}
    kind = "" if family == "nine" else family
    check(f"StableDiffusion{kind}InpaintPipeline", folder(family), request)


@pytest.mark.parametrize("task", ["", "Img2Img", "Inpaint"])
def test_a_sampler_with_noise_in_every_step(task: str, folder, images, masks):
    """Its noise comes after that for the images; inpainting draws for a masked image that it does not use."""
    request = CALL | ({"image": images, "strength": 0.75} if task else {})
    request |= {"mask_image": masks, "height": EDGE, "width": EDGE} if task == "Inpaint" else {}
    check(f"StableDiffusion{task}Pipeline", folder(""), request, sampler="EulerAncestralDiscreteScheduler")


def test_eta(folder):
    check("StableDiffusionPipeline", folder(""), CALL | {"eta": 0.8}, 9, sampler="DDIMScheduler")


def test_unconditional(tmp_path: Path):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = folders.lively(diffusers.UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, **blocks))
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    twin = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    twin.set_progress_bar_config(disable=True)
    request = {"batch_size": 2, "num_inference_steps": 6}
    wanted = twin(generator=torch.Generator().manual_seed(4), output_type="np", **request).images
    pipe = pipelines.DDPMPipeline.from_pretrained(tmp_path)
    require_same(pipe, pipe(seed=4, noise="torch", output_type="np", **request).images, wanted)


# Samplers

STOCHASTIC: dict[str, dict[str, Any]] = {
    "CMStochasticIterativeScheduler": {},
    "DDIMScheduler": {"_eta": 1.0},
    "DDIMParallelScheduler": {"_eta": 1.0},
    "DDPMScheduler": {},
    "DDPMParallelScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
    "DPMSolverSinglestepScheduler": {"algorithm_type": "sde-dpmsolver++"},
    "EDMDPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
    "EulerAncestralDiscreteScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {"stochastic_sampling": True},
    "FlowMatchLCMScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "LCMScheduler": {},
    "SASolverScheduler": {},
    "TCDScheduler": {"_eta": 0.7},
    "UnCLIPScheduler": {},
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_is_drawn_where_pytorch_draws_it(name: str, monkeypatch: pytest.MonkeyPatch):
    options = {k.removeprefix("_"): v for k, v in STOCHASTIC[name].items() if k[0] == "_"}
    config = {k: v for k, v in STOCHASTIC[name].items() if k[0] != "_"}
    theirs = getattr(diffusers, name)(**config)
    theirs.set_timesteps(8)
    drawn: list[int] = []

    def spy(shape: Any, *args: Any, **kwargs: Any) -> Any:
        drawn.append(i)
        return torch.zeros(shape)

    monkeypatch.setattr(sys.modules[type(theirs).__module__], "randn_tensor", spy)
    sample = torch.zeros(1, 3, 4, 4)
    for i, t in enumerate(theirs.timesteps):  # noqa: B007 (the spy reads it)
        theirs.step(torch.zeros_like(sample), t, sample, **options)
    ours = getattr(schedulers, name)(**config)
    plan = ours.plan(8, **options)
    method = Method(denoiser=None, start=None, decode=None, latent_shape=(4, 4, 3))
    found = step_draws(Request(method, {}, plan), ours, "torch")
    assert found, "a sampler without noise proves nothing"
    assert found == drawn[: len(found)], "what is drawn after the last noise that is used does not matter"
