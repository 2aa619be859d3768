"""EDM and flow matching against PyTorch: one update with the same weights, noise and times; and a trained folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.torch_backend.training_report import verdict
from diffuse_jax.training.objective import draw
from diffuse_jax.training.pixel_objectives import KINDS, pixel_objective
from diffuse_jax.training.settings import EdmSettings, FlowSettings, ObjectiveSettings
from tests.oracle.agreement import require_same

twins = pytest.importorskip("tests.oracle.twins", reason="needs PyTorch diffusers and transformers")
torch, diffusers = twins.torch, twins.diffusers

from diffuse_jax.torch_backend.networks import channels_first  # noqa: E402
from tests.oracle.pixel_cases import continuous, convolution, images_for, pixel_unet  # noqa: E402

MODEL = "DDPM, first release"
CASES: list[Any] = [
    pytest.param(pixel_unet, "edm", {}, {}, marks=pytest.mark.slow),
    (convolution, "edm", {}, {"sigma_data": 0.4}),
    (convolution, "edm", {}, {"prediction_type": "v_prediction"}),
    pytest.param(pixel_unet, "flow_matching", {"weighting_scheme": "logit_normal"}, {}, marks=pytest.mark.slow),
    (convolution, "flow_matching", {"weighting_scheme": "mode"}, {"shift": 3.0}),
    (convolution, "flow_matching", {"weighting_scheme": "sigma_sqrt"}, {}),
    (convolution, "flow_matching", {"weighting_scheme": "cosmap"}, {}),
]


@pytest.mark.parametrize(("make", "kind", "flow", "fields"), CASES)
def test_one_update(make: Any, kind: str, flow: Any, fields: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    pair = make(tmp_path, rng)
    steps = continuous(pair, kind, images_for(rng, 3 if make is pixel_unet else 4), flow, fields)
    compared = steps.compared()
    assert compared.ok, verdict(compared)
    assert len(compared.changes) == len(steps.parameters)


def test_times_are_distributed_as_in_the_papers() -> None:
    """Against what diffusers' function draws, as its script for Stable Diffusion 3 reads it, and EDM's logarithms."""
    key, count = jax.random.key(1), 20_000
    x0 = jnp.zeros((count, 1, 1, 1))
    schedule = KINDS["edm"].scheduler
    t = np.asarray(draw(pixel_objective(schedule, ObjectiveSettings(), EdmSettings(), FlowSettings()), key, x0).t)
    assert np.mean(4 * t) == pytest.approx(-1.2, abs=0.03)
    assert np.std(4 * t) == pytest.approx(1.2, abs=0.03)
    flow, places = KINDS["flow_matching"].scheduler.replace(shift=3.0), np.linspace(0.05, 0.95, 10)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    for scheme in ("none", "logit_normal", "mode"):
        numbers = {"logit_mean": 0.5, "logit_std": 0.7, "mode_scale": 1.29}
        objective = pixel_objective(
            flow, ObjectiveSettings(), EdmSettings(), FlowSettings(weighting_scheme=scheme, **numbers)
        )
        u = diffusers.training_utils.compute_density_for_timestep_sampling(
            scheme, count, **numbers, generator=torch.Generator().manual_seed(0)
        )
        wanted = np.quantile(theirs.timesteps[(u * 1000).long()].numpy(), places)
        np.testing.assert_allclose(np.quantile(np.asarray(draw(objective, key, x0).t), places), wanted, atol=16)


@pytest.mark.parametrize("kind", ["edm", "flow_matching"])
def test_pytorch_samples_a_trained_folder(
    kind: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: Any
) -> None:
    """The class of the folder and its scheduler give the same images there."""
    _, model, params = twins.pixel_unet_twin(MODEL, tmp_path / "unet")
    own = KINDS[kind]
    own.pipeline({"unet": model, "scheduler": own.scheduler}, {"unet": params}).save_pretrained(tmp_path / "pipe")
    ours = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    theirs.set_progress_bar_config(disable=True)
    noise = rng.standard_normal((2, *(model.config.sample_size,) * 2, 3)).astype(np.float32)
    monkeypatch.setattr(f"{type(theirs).__module__}.randn_tensor", lambda *a, **k: channels_first(torch.tensor(noise)))
    wanted = theirs(batch_size=2, num_inference_steps=12, output_type="np").images
    require_same(ours, ours(2, num_inference_steps=12, latents=noise, output_type="np").images, wanted)
