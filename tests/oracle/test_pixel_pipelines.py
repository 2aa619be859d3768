"""Pixel-space and unconditional latent pipelines: the same folder opened by PyTorch diffusers and here.

Where a sampler draws noise in its steps, both sides get the same array in every step.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffuse_jax import pipelines, schedulers
from diffuse_jax.models import UNet2DModel
from diffuse_jax.pipelines import DiffusionPipeline, KarrasEDMPipeline
from diffuse_jax.pipelines.programs import Programs
from tests.oracle.agreement import require_same

twins = pytest.importorskip("tests.oracle.twins", reason="needs PyTorch diffusers and transformers")
torch, diffusers = twins.torch, twins.diffusers

SHAPE = (8, 8, 3)
CLASSES = {"num_class_embeds": 10}
MODULES = {
    "ConsistencyModelPipeline": "consistency_models.pipeline_consistency_models",
    "PNDMPipeline": "deprecated.pndm.pipeline_pndm",
    "ScoreSdeVePipeline": "deprecated.score_sde_ve.pipeline_score_sde_ve",
    "KarrasVePipeline": "deprecated.stochastic_karras_ve.pipeline_stochastic_karras_ve",
    "RePaintPipeline": "deprecated.repaint.pipeline_repaint",
    "LDMPipeline": "deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond",
    "LDMSuperResolutionPipeline": "latent_diffusion.pipeline_latent_diffusion_superresolution",
}
"""Class -> where diffusers draws the noise that a run starts from."""

SAMPLERS: dict[str, Any] = {
    "ConsistencyModelPipeline": lambda: diffusers.CMStochasticIterativeScheduler(),
    "PNDMPipeline": lambda: diffusers.PNDMScheduler(),
    "ScoreSdeVePipeline": lambda: diffusers.ScoreSdeVeScheduler(sigma_max=1.5, correct_steps=2),
    "KarrasVePipeline": lambda: diffusers.KarrasVeScheduler(sigma_max=1.5, s_churn=0),
    "RePaintPipeline": lambda: diffusers.RePaintScheduler(),
    "LDMPipeline": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "LDMSuperResolutionPipeline": lambda: diffusers.DDIMScheduler(clip_sample=False),
}


def save(name: str, folder: Path, **config: Any) -> Any:
    """A folder that PyTorch diffusers wrote, and its pipeline."""
    parts = {"vqvae": twins.randomise(diffusers.VQModel(**twins.VQ))} if name.startswith("LDM") else {}
    unet = twins.randomise(diffusers.UNet2DModel(**twins.PIXELS | config))
    pipe = getattr(diffusers, name)(unet=unet, scheduler=SAMPLERS[name](), **parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


def opened(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder).replace(programs=Programs())


def same_noise(patch: Any, name: str, start: np.ndarray, step: np.ndarray) -> None:
    """Both sides start from one array, and get another wherever a step draws noise."""
    given = lambda array: lambda *a, **k: torch.tensor(np.moveaxis(array, -1, 1))
    patch.setattr(f"diffusers.pipelines.{MODULES[name]}.randn_tensor", given(start))
    for module in ("consistency_models", "ddim", "repaint", "sde_ve"):
        patch.setattr(f"diffusers.schedulers.scheduling_{module}.randn_tensor", given(step))
    ours = lambda *a, **k: jnp.asarray(step)
    patch.setattr("diffuse_jax.schedulers.plan.Plan.draw", ours)
    patch.setattr("diffuse_jax.schedulers.plan.draw_each", ours)
    patch.setattr("diffuse_jax.pipelines.parts.step.draw_each", ours)


def require_one_program_and_opened_by_pytorch(pipe: Any, twin: Any, folder: Path) -> None:
    """Every call so far shared one program, and PyTorch opens what is saved here, with the same contents."""
    assert pipe.programs.compilations == 1
    pipe.save_pretrained(folder)
    again = type(twin).from_pretrained(folder)
    plain = lambda config: {k: json.dumps(v) for k, v in config.items() if not k.startswith("_")}
    assert type(again.scheduler) is type(twin.scheduler)
    assert plain(again.scheduler.config) == plain(twin.scheduler.config)
    for part in {*twin.components} - {"scheduler"}:
        before, after = getattr(twin, part).state_dict(), getattr(again, part).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


REQUESTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "consistency model": (
        "ConsistencyModelPipeline",
        {"class_labels": [3, 7]},
        {"class_labels": [3, 7], "num_inference_steps": None, "timesteps": [30, 17, 0]},
    ),
    "PNDM": ("PNDMPipeline", {"num_inference_steps": 8}, {"num_inference_steps": 5}),
    "predictor and corrector": ("ScoreSdeVePipeline", {"num_inference_steps": 4}, {"num_inference_steps": 2}),
    "Heun": ("KarrasVePipeline", {"num_inference_steps": 4}, {"num_inference_steps": 2}),
    "latent": ("LDMPipeline", {"num_inference_steps": 4}, {"num_inference_steps": 3, "eta": 0.5}),
}
"""Class -> the requests to compare; they differ in numbers of steps, so one program runs both."""


@pytest.mark.parametrize("case", REQUESTS)
def test_images_are_those_of_pytorch(case: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: Any) -> None:
    name, *requests = REQUESTS[case]
    twin = save(name, tmp_path / "theirs", **(CLASSES if name == "ConsistencyModelPipeline" else {}))
    count = 1 if name == "ScoreSdeVePipeline" else 2  # PyTorch's corrector takes the mean of the norms of a batch
    start, step = (rng.standard_normal((count, *SHAPE)).astype(np.float32) for _ in range(2))
    same_noise(monkeypatch, name, start, step)
    pipe = opened(tmp_path / "theirs")
    assert type(pipe).__name__ == name
    for seed, options in enumerate(requests):
        theirs = twin(batch_size=count, output_type="np", **options).images
        ours = pipe(count, latents=start, seed=seed, output_type="np", **options).images
        require_same(pipe, ours, theirs)
    require_one_program_and_opened_by_pytorch(pipe, twin, tmp_path / "ours")


def test_ncsnpp_runs_the_score_sde(tmp_path: Path, rng: np.random.Generator, monkeypatch: Any) -> None:
    """The kind of network that the pipeline's checkpoints have, also in files that name its frequencies twice."""
    twin = save("ScoreSdeVePipeline", tmp_path / "theirs", **twins.NCSNPP)
    start, step = (rng.standard_normal((1, *SHAPE)).astype(np.float32) for _ in range(2))
    same_noise(monkeypatch, "ScoreSdeVePipeline", start, step)
    pipe = opened(tmp_path / "theirs")
    wanted = twin(batch_size=1, output_type="np", num_inference_steps=4).images
    require_same(pipe, pipe(latents=start, num_inference_steps=4, seed=0, output_type="np").images, wanted)
    require_one_program_and_opened_by_pytorch(pipe, twin, tmp_path / "ours")

    file = tmp_path / "theirs" / "unet" / "diffusion_pytorch_model.bin"
    tensors = twin.unet.state_dict()
    for names in (("W",), ("W", "weight")):
        old = {key: value for key, value in tensors.items() if key != "time_proj.weight"}
        torch.save(old | {f"time_proj.{name}": tensors["time_proj.weight"] for name in names}, file)
        file.with_suffix(".safetensors").unlink(missing_ok=True)
        _, params = UNet2DModel.from_pretrained(file.parent)
        np.testing.assert_array_equal(params["time_proj"]["weight"], tensors["time_proj.weight"])


@pytest.mark.parametrize("sampler", ["DDIMScheduler", "LMSDiscreteScheduler"])
def test_super_resolution(sampler: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: Any) -> None:
    """A sampler that scales the sample also scales the image beside it."""
    name = "LDMSuperResolutionPipeline"
    monkeypatch.setitem(SAMPLERS, name, getattr(diffusers, sampler))
    twin = save(name, tmp_path / "theirs", in_channels=6, out_channels=3)
    start, step = (rng.standard_normal((1, 32, 32, 3)).astype(np.float32) for _ in range(2))
    same_noise(monkeypatch, name, start, step)
    image = Image.fromarray(rng.integers(0, 256, (36, 40, 3), np.uint8))
    pipe = opened(tmp_path / "theirs")
    assert type(pipe).__name__ == name
    for seed, options in enumerate(({"num_inference_steps": 4}, {"num_inference_steps": 3, "eta": 0.5})):
        options = options if sampler == "DDIMScheduler" else {"num_inference_steps": options["num_inference_steps"]}
        theirs = twin(image, output_type="np", **options).images
        ours = pipe(image, latents=start, seed=seed, output_type="np", **options).images
        assert theirs.shape == (1, 64, 64, 3)
        require_same(pipe, ours, theirs)
    require_one_program_and_opened_by_pytorch(pipe, twin, tmp_path / "ours")


def test_super_resolution_of_several_images(tmp_path: Path, rng: np.random.Generator) -> None:
    save("LDMSuperResolutionPipeline", tmp_path / "right", in_channels=6, out_channels=3)
    pipe = opened(tmp_path / "right")
    small = rng.random((2, 8, 8, 3), np.float32)
    rows = lambda *args, **options: pipe.request(*args, seed=0, **options).rows["small_image"]
    np.testing.assert_allclose(rows(small), small * 2 - 1, atol=1e-6)
    np.testing.assert_array_equal(rows(small[0], batch_size=2), np.stack([small[0] * 2 - 1] * 2))
    with pytest.raises(ValueError, match="give image"):
        pipe()
    with pytest.raises(ValueError, match="image has 2 images for 3 prompts"):
        pipe(small, batch_size=3)
    save("LDMSuperResolutionPipeline", tmp_path / "wrong")
    with pytest.raises(ValueError, match="needs a UNet with 6 input channels, 3 of latents and 3 of the image, got 3"):
        opened(tmp_path / "wrong")(small)


@pytest.mark.parametrize(("jumps", "eta"), [(1, 0.6), (2, 0.0)])
def test_repaint(jumps: int, eta: float, tmp_path: Path, rng: np.random.Generator, monkeypatch: Any) -> None:
    """Over a jump the sampler here draws once where PyTorch draws in turn, so with jumps all noise is zero.

    Few steps, because a random network multiplies differences of rounding with every evaluation.
    """
    twin = save("RePaintPipeline", tmp_path / "theirs", sample_size=32)
    start = rng.standard_normal((2, 32, 32, 3)).astype(np.float32)
    step = np.zeros_like(start) if jumps > 1 else rng.standard_normal(start.shape).astype(np.float32)
    same_noise(monkeypatch, "RePaintPipeline", start, step)
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(2)]
    mask = Image.fromarray(np.uint8(255) * (np.arange(32 * 32).reshape(32, 32) % 32 > 12))
    options = {"num_inference_steps": 6, "jump_length": 2, "jump_n_sample": jumps, "eta": eta, "output_type": "np"}
    theirs = twin(image=images, mask_image=mask, **options).images

    pipe = opened(tmp_path / "theirs")
    ours = pipe(images, mask, latents=start, **options).images
    require_same(pipe, ours, theirs)
    pipe(images, mask, latents=start, seed=1, **options | {"num_inference_steps": 3, "jump_n_sample": 3})
    require_one_program_and_opened_by_pytorch(pipe, twin, tmp_path / "ours")
    kept = np.asarray(mask) > 127
    np.testing.assert_allclose(ours[0][kept], np.asarray(images[0])[kept] / 255, atol=1e-5)
    with pytest.raises(ValueError, match="eta must be from 0 to 1, got 2"):
        pipe(images, mask, eta=2)
    with pytest.raises(ValueError, match="KeepKnownAnew, which draws noise of its own"):
        pipe(images, mask, noise="torch", seed=0)


def test_edm_is_heuns_method(tmp_path: Path, rng: np.random.Generator) -> None:
    """No release of diffusers has this pipeline: the paper's algorithm 2 in NumPy, around PyTorch's network."""
    module = twins.randomise(diffusers.UNet2DModel(**twins.PIXELS | CLASSES))
    module.save_pretrained(tmp_path)
    unet, params = UNet2DModel.from_pretrained(tmp_path)
    pipe = KarrasEDMPipeline({"unet": unet, "scheduler": schedulers.KarrasEDMScheduler()}, {"unet": params})
    noise, labels, n = rng.standard_normal((2, *SHAPE)).astype(np.float32), [1, 4], 5

    def denoised(x: np.ndarray, sigma: float) -> np.ndarray:
        norm = np.sqrt(sigma**2 + 0.25)
        scaled = torch.tensor(np.moveaxis(x / norm, -1, 1), dtype=torch.float32)
        with torch.no_grad():
            output = module(scaled, torch.tensor(np.log(sigma) / 4).float(), torch.tensor(labels)).sample
        return 0.25 / norm**2 * x + sigma * 0.5 / norm * np.moveaxis(output.numpy(), 1, -1)

    ramp = np.linspace(0, 1, n)
    sigmas = np.append((80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, 0)
    x = noise * 80.0
    for here, there in itertools.pairwise(sigmas):
        slope = (x - denoised(x, here)) / here
        euler = x + slope * (there - here)
        x = euler if there == 0 else x + (slope + (euler - denoised(euler, there)) / there) / 2 * (there - here)
    ours = pipe(2, class_labels=labels, num_inference_steps=n, latents=noise, output_type="np").images
    require_same(pipe, ours, np.clip(x / 2 + 0.5, 0, 1))
    pipe.save_pretrained(tmp_path / "saved")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "saved")) is KarrasEDMPipeline


def test_missing_classes_are_random_and_repeat(tmp_path: Path) -> None:
    save("ConsistencyModelPipeline", tmp_path, **CLASSES)
    pipe = opened(tmp_path)
    labels = lambda *args, **options: pipe.request(*args, **options).rows["class_labels"].tolist()
    assert len(set(labels(20, seed=0))) > 4
    assert labels(20, seed=0) == labels(20, seed=0) != labels(20, seed=1)
    assert labels(2, seed=[5, 6]) == [*labels(seed=5), *labels(seed=6)]
    assert labels(2, seed=0, class_labels=3) == [3, 3]


def test_a_sampler_that_the_network_was_not_trained_for_is_named(tmp_path: Path) -> None:
    save("ScoreSdeVePipeline", tmp_path)
    pipe = pipelines.KarrasVePipeline.from_pipe(DiffusionPipeline.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="KarrasVePipeline needs a KarrasVeScheduler, got a ScoreSdeVeScheduler"):
        pipe(seed=0)
    repaint = pipelines.RePaintPipeline.from_pretrained(tmp_path, scheduler=schedulers.DDPMScheduler())
    assert isinstance(repaint.scheduler, schedulers.RePaintScheduler)
