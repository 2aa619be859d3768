"""The laws of consistency distillation: exact answers where the network is exact."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.schedulers import DDPMScheduler, LCMScheduler
from diffuse_jax.training.consistency import consistency_from, consistent, draw, predicted, solved
from diffuse_jax.training.objective import target
from diffuse_jax.training.settings import ConsistencySettings
from tests.train.latent_models import save_sd

KINDS = ("epsilon", "v_prediction", "sample")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(save_sd(tmp_path_factory.mktemp("sd")))


@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_network_is_a_consistency_function(kind: str, rng: np.random.Generator) -> None:
    """Of data that are one point: the solver stays on the trajectory, and every point of it leads to the clean one."""
    sampler = LCMScheduler.from_config(DDPMScheduler(prediction_type=kind))
    x0, noise = (jnp.asarray(rng.standard_normal((3, 4, 4, 2), np.float32)) for _ in range(2))
    start, end = jnp.array([999, 499, 19]), jnp.array([979, 479, 0])
    x = sampler.add_noise(x0, noise, start)
    output = target(sampler, x0, noise, start)
    found = predicted(sampler, x, output, start)
    np.testing.assert_allclose(found.x0, x0, atol=2e-4)
    np.testing.assert_allclose(found.eps, noise, atol=2e-4)
    np.testing.assert_allclose(solved(sampler, found, end), sampler.add_noise(x0, noise, end), atol=2e-4)
    np.testing.assert_allclose(consistent(sampler, x, output, start), x0, atol=2e-3)
    np.testing.assert_array_equal(consistent(sampler, x, output, jnp.zeros(3, jnp.int32)), x)  # the boundary


def test_steps_begin_at_the_timesteps_of_the_sampler(pipe: DiffusionPipeline) -> None:
    """Those that it samples at, with as many steps as the solver has."""
    distillation = consistency_from(ConsistencySettings(num_ddim_timesteps=20, timestep_scaling_factor=5.0), pipe)
    assert distillation.sampler.timestep_scaling == 5
    np.testing.assert_array_equal(distillation.timesteps[::-1], distillation.sampler.table(20).timesteps)
    drawn = draw(distillation, jax.random.key(0), jnp.zeros((4096, 1)))
    assert {int(i) for i in drawn.position} == set(range(20))
    assert float(drawn.w.min()) == pytest.approx(5, abs=0.02)
    assert float(drawn.w.max()) == pytest.approx(15, abs=0.02)


def test_the_sampler_neither_clips_nor_thresholds(pipe: DiffusionPipeline) -> None:
    """The schedule of training may, by its class's default."""
    pipe = pipe.replace(scheduler=DDPMScheduler(clip_sample=True, thresholding=True))
    sampler = consistency_from(ConsistencySettings(), pipe).sampler
    assert (sampler.clip_sample, sampler.thresholding) == (False, False)


def test_what_cannot_be_distilled_is_refused(pipe: DiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="--num_ddim_timesteps must be at most 1000, .*, got 1001"):
        consistency_from(ConsistencySettings(num_ddim_timesteps=1001), pipe)
    noise = pipe.replace(scheduler=DDPMScheduler(rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match="pure noise .* use prediction_type 'v_prediction' or 'sample'"):
        consistency_from(ConsistencySettings(), noise)
    unet = pipe.components["unet"]
    distilled = unet.clone(config=unet.config.replace(time_cond_proj_dim=8))
    again = pipe.replace(unet=(distilled, pipe.params["unet"]))
    with pytest.raises(ValueError, match=r"\(time_cond_proj_dim=8\), so it has been distilled before; give"):
        consistency_from(ConsistencySettings(), again)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"w_min": 9.0, "w_max": 3.0}, "--w_min 9 is above --w_max 3"),
        ({"loss_type": "l1"}, "loss_type must be one of l2, huber, got 'l1'"),
        ({"unet_time_cond_proj_dim": 7}, "must be even and at least 4, got 7"),
        ({"huber_c": 0.0}, "huber_c must be a finite number above 0, got 0"),
    ],
)
def test_settings_refuse_impossible_values(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConsistencySettings(**values)  # type: ignore[arg-type]
