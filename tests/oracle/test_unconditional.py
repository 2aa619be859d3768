"""DDPM and DDIM over pixels: the same folder opened by PyTorch diffusers and here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffuse_jax.pipelines import DDIMPipeline, DDPMPipeline, DiffusionPipeline
from diffuse_jax.pipelines.programs import Programs
from tests.oracle.agreement import require_same

twins = pytest.importorskip("tests.oracle.twins", reason="needs PyTorch diffusers and transformers")
torch, diffusers = twins.torch, twins.diffusers

SAMPLER = {"beta_schedule": "linear", "clip_sample": True}


def save(folder: Path, kind: type, **config: Any) -> Any:
    """A folder that PyTorch diffusers wrote, and its pipeline."""
    unet = twins.randomise(diffusers.UNet2DModel(**twins.PIXELS | config))
    pipe = kind(unet=unet, scheduler=diffusers.DDPMScheduler(**SAMPLER))
    pipe.save_pretrained(folder)
    return pipe


def test_ddim_gives_the_images_of_pytorch(tmp_path: Path, rng: np.random.Generator, monkeypatch) -> None:
    twin = save(tmp_path, diffusers.DDIMPipeline)
    twin.set_progress_bar_config(disable=True)
    noise = rng.standard_normal((3, 8, 8, 3)).astype(np.float32)
    drawn = lambda *a, **k: torch.tensor(noise.transpose(0, 3, 1, 2))
    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", drawn)
    theirs = twin(batch_size=3, num_inference_steps=20, output_type="np").images

    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(pipe, DDIMPipeline)
    ours = pipe(3, num_inference_steps=20, latents=noise, output_type="np").images
    require_same(pipe, ours, theirs)


def test_ddpm_draws_separate_noise_for_each_image(tmp_path: Path) -> None:
    save(tmp_path, diffusers.DDPMPipeline)
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    together = pipe(2, num_inference_steps=10, seed=[4, 5], output_type="np").images
    alone = pipe(num_inference_steps=10, seed=5, output_type="np").images
    np.testing.assert_allclose(together[1], alone[0], atol=1e-4)
    assert np.abs(together[0] - together[1]).mean() > 0.01
    assert pipe(num_inference_steps=2, seed=0).images[0].size == (8, 8)


def test_compiling_ahead_takes_the_number_of_images(tmp_path: Path) -> None:
    save(tmp_path, diffusers.DDPMPipeline)
    pipe = DDPMPipeline.from_pretrained(tmp_path).replace(programs=Programs())
    pipe.compile(batch_size=2, num_inference_steps=10)(batch_size=2, num_inference_steps=3, seed=0)
    assert pipe.programs.compilations == 1


def test_classes_change_the_image_and_are_checked(tmp_path: Path) -> None:
    save(tmp_path, diffusers.DDPMPipeline, num_class_embeds=10)
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    request = {"num_inference_steps": 5, "seed": [1, 1], "output_type": "np"}
    images = pipe(2, class_labels=[2, 7], **request).images
    assert np.abs(images[0] - images[1]).mean() > 0.01
    for labels, message in [(None, "needs class_labels"), (10, "from 0 to 9"), ([1, 2, 3], "for 2 images")]:
        with pytest.raises(ValueError, match=message):
            pipe(2, class_labels=labels, **request)


def test_saved_pipeline_opens_in_pytorch(tmp_path: Path) -> None:
    save(tmp_path / "theirs", diffusers.DDPMPipeline)
    DDPMPipeline.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    theirs, back = (diffusers.DDPMPipeline.from_pretrained(tmp_path / name) for name in ("theirs", "ours"))
    before, after = theirs.unet.state_dict(), back.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(("request_", "message"), [({"batch_size": 0}, "batch_size"), ({"eta": 0.5}, "eta")])
def test_impossible_requests(tmp_path: Path, request_: dict[str, Any], message: str) -> None:
    save(tmp_path, diffusers.DDPMPipeline)
    with pytest.raises(ValueError, match=message):
        DDPMPipeline.from_pretrained(tmp_path)(**request_)
