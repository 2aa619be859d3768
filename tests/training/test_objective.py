"""Laws of the training targets and of the Min-SNR weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.schedulers import DDPMScheduler, EDMEulerScheduler
from diffuse_jax.schedulers.noise_schedule import predict_x0
from diffuse_jax.training.objective import (
    Draw,
    Objective,
    draw,
    errors,
    min_snr_weight,
    noised,
    per_sample_error,
    snr_table,
    target,
    timestep_probabilities,
)
from diffuse_jax.training.times import LogNormalLevels, ModeTimes, UniformTimes, mode

KINDS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_prediction_means_the_clean_sample(kind: str, rng: np.random.Generator) -> None:
    scheduler = DDPMScheduler(prediction_type=kind, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x0, noise = jnp.asarray(rng.standard_normal((2, 5, 4, 4, 3)), jnp.float32)
    t = jnp.array([0, 10, 300, 700, 999])
    alpha = np.sqrt(scheduler.alpha_bar)[np.asarray(t)].reshape(-1, 1, 1, 1)
    noisy = scheduler.add_noise(x0, noise, t)
    back = predict_x0(kind, noisy, target(scheduler, x0, noise, t), alpha, np.sqrt(1 - alpha**2))
    np.testing.assert_allclose(back, x0, atol=2e-4)


def test_unknown_target_is_an_error() -> None:
    scheduler = DDPMScheduler()
    object.__setattr__(scheduler, "prediction_type", "score")
    with pytest.raises(ValueError, match="score"):
        target(scheduler, jnp.zeros((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1)), jnp.zeros(1, int))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_at_most_one_and_vanish_as_gamma_grows(kind: str) -> None:
    snr = jnp.asarray(snr_table(DDPMScheduler()))
    weights = min_snr_weight(snr, 5.0, kind)
    assert float(weights.max()) <= 1.0
    assert float(weights.min()) > 0.0
    np.testing.assert_array_equal(min_snr_weight(snr, float("inf"), kind), jnp.ones_like(snr))


def test_noise_weights_are_those_of_the_clean_sample_times_the_ratio() -> None:
    """The paper: weights min(snr, gamma) on the error of x0; an error d of x0 is an error sqrt(snr) d of the noise."""
    snr = jnp.array([0.01, 1.0, 4.9, 5.1, 400.0])
    np.testing.assert_allclose(min_snr_weight(snr, 5.0, "epsilon") * snr, jnp.minimum(snr, 5.0), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_pure_noise_has_weight_one(kind: str) -> None:
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    snr = jnp.asarray(snr_table(scheduler))
    assert float(snr[-1]) == 0.0
    weights = jax.jit(min_snr_weight, static_argnums=2)(snr, 5.0, kind)
    assert bool(jnp.isfinite(weights).all())
    assert float(weights[-1]) == 1.0


def test_errors_are_means_per_sample_in_float32() -> None:
    prediction, wanted = jnp.array([[1.0, 3.0], [2.0, 2.0]]), jnp.zeros((2, 2))
    np.testing.assert_allclose(per_sample_error(prediction, wanted), [5.0, 4.0])
    assert per_sample_error(prediction.astype(jnp.bfloat16), wanted.astype(jnp.bfloat16)).dtype == jnp.float32


def test_masked_errors_are_weighted_means(rng: np.random.Generator) -> None:
    prediction, wanted = clean(rng, (3, 4, 4, 2)), clean(rng, (3, 4, 4, 2))
    mask = rng.uniform(0, 1, (3, 4, 4)).astype(np.float32)
    mask[1], mask[2] = 0, 0.3
    squares = np.square(np.asarray(prediction) - np.asarray(wanted)).mean(-1)
    error = jax.jit(per_sample_error)(prediction, wanted, jnp.asarray(mask))
    np.testing.assert_allclose(error[0], np.average(squares[0], weights=mask[0]), rtol=1e-6)
    assert float(error[1]) == 0, "a sample without any weight"
    np.testing.assert_allclose(error[2], per_sample_error(prediction, wanted)[2], rtol=1e-6)
    slope = jax.grad(lambda x: per_sample_error(x, wanted, jnp.asarray(mask)).sum())(prediction)
    assert bool(jnp.isfinite(slope).all())
    assert not slope[1].any()


def clean(rng: np.random.Generator, shape: tuple[int, ...] = (6, 4, 4, 3)) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def test_the_right_answer_has_no_error(rng: np.random.Generator) -> None:
    objective = Objective(scheduler=DDPMScheduler(), snr_gamma=5.0, noise_offset=0.1)
    x0 = clean(rng)
    drawn = draw(objective, jax.random.key(0), x0)
    loss, metrics = errors(objective, drawn.noise, x0, drawn)
    assert float(loss) == float(metrics["mse"]) == 0.0


def test_offset_noise_is_shared_by_the_pixels_of_a_channel(rng: np.random.Generator) -> None:
    plain, offset = (Objective(scheduler=DDPMScheduler(), noise_offset=o) for o in (0.0, 0.5))
    x0 = clean(rng)
    shift = draw(offset, jax.random.key(1), x0).noise - draw(plain, jax.random.key(1), x0).noise
    np.testing.assert_allclose(shift, jnp.broadcast_to(shift[:, :1, :1], shift.shape), atol=1e-6)
    assert float(jnp.abs(shift).mean()) > 0.1


def test_perturbation_is_in_the_input_and_not_in_the_target(rng: np.random.Generator) -> None:
    plain, perturbed = (Objective(scheduler=DDPMScheduler(), input_perturbation=p) for p in (0.0, 0.3))
    x0 = clean(rng)
    a, b = draw(plain, jax.random.key(2), x0), draw(perturbed, jax.random.key(2), x0)
    np.testing.assert_array_equal(a.noise, b.noise)
    assert float(jnp.abs(noised(plain, x0, a) - noised(perturbed, x0, b)).max()) > 0.01
    assert float(errors(perturbed, b.noise, x0, b)[0]) == 0.0


def test_prior_preservation_adds_the_mean_error_of_the_class(rng: np.random.Generator) -> None:
    x0, prediction = clean(rng), clean(rng)
    make = lambda weight: Objective(scheduler=DDPMScheduler(), snr_gamma=5.0, prior_loss_weight=weight)
    drawn = draw(make(0.0), jax.random.key(3), x0)
    prior = jnp.arange(len(x0)) % 3 == 1
    none, half = (errors(make(w), prediction, x0, drawn, prior) for w in (0.0, 0.5))
    only = lambda rows: errors(make(1.0), prediction[rows], x0[rows], Draw(drawn.noise[rows], None, drawn.t[rows]))[0]
    instance, others = only(np.flatnonzero(~prior)), only(np.flatnonzero(prior))
    assert float(none[0]) == pytest.approx(float(instance))
    assert float(half[0]) == pytest.approx(float(instance) + 0.5 * float(others), rel=1e-6)
    assert float(half[1]["prior_loss"]) == pytest.approx(float(others))
    alone, _ = errors(make(1.0), prediction, x0, drawn, jnp.zeros(len(x0), bool))
    assert float(alone) == pytest.approx(float(errors(make(1.0), prediction, x0, drawn)[0]), rel=1e-6)


def test_cubic_timesteps_are_those_of_uniform_numbers() -> None:
    """t = T (1 - u^3), rounded down (Mou et al. 2023, section 3.4)."""
    p = np.array(timestep_probabilities("cubic", 10))
    t = np.floor(10 * (1 - np.linspace(0, 1, 1_000_000, endpoint=False) ** 3)).clip(max=9).astype(int)
    np.testing.assert_allclose(p, np.bincount(t, minlength=10) / len(t), atol=1e-5)


@pytest.mark.parametrize(
    ("strategy", "chosen", "more"),
    [
        ("earlier", slice(0, 20), {"portion": 0.2}),
        ("later", slice(80, 100), {"portion": 0.2}),
        ("range", slice(30, 50), {"begin": 30, "end": 50}),
    ],
)
def test_biased_timesteps_are_sampled_more_often_by_the_multiplier(strategy: str, chosen: slice, more: dict) -> None:
    p = np.array(timestep_probabilities(strategy, 100, multiplier=4.0, **more))
    assert p.sum() == pytest.approx(1.0)
    assert p[chosen] == pytest.approx(4.0 * p.min())
    objective = Objective(scheduler=DDPMScheduler(num_train_timesteps=100), timestep_bias=tuple(p))
    t = np.asarray(draw(objective, jax.random.key(4), jnp.zeros((20000, 1, 1, 1))).t)
    inside = np.isin(t, np.arange(100)[chosen]).mean()
    assert inside == pytest.approx(p[chosen].sum(), abs=0.02)
    assert timestep_probabilities("none", 100) is None


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"strategy": "middle"}, "middle"),
        ({"strategy": "later", "multiplier": 0.0}, "timestep_bias_multiplier"),
        ({"strategy": "later", "portion": 0.001}, "timestep_bias_portion"),
        ({"strategy": "range", "begin": 5, "end": 101}, "100"),
        ({"strategy": "range", "begin": -1}, "-1"),
    ],
)
def test_impossible_biases(request_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timestep_probabilities(steps=100, **request_)


def test_weighted_by_the_ratio_a_clean_sample_counts_as_its_noise(rng: np.random.Generator) -> None:
    """The same image, predicted as clean sample or as noise, has the same error."""
    x0, guess = clean(rng), clean(rng)
    scheduler = DDPMScheduler()
    said = {"sample": guess}
    objective = Objective(scheduler=scheduler.replace(prediction_type="sample"), snr_weighting=True)
    drawn = draw(objective, jax.random.key(0), x0)
    alpha = jnp.sqrt(jnp.asarray(scheduler.alpha_bar, jnp.float32))[drawn.t].reshape(-1, 1, 1, 1)
    said["epsilon"] = (noised(objective, x0, drawn) - alpha * guess) / jnp.sqrt(1 - alpha**2)
    as_noise, _ = errors(Objective(scheduler=scheduler), said["epsilon"], x0, drawn)
    as_sample, _ = errors(objective, said["sample"], x0, drawn)
    assert float(as_sample) == pytest.approx(float(as_noise), rel=1e-3)


def test_levels_of_edm_and_flow_matching_need_such_a_scheduler() -> None:
    for options in ({"times": LogNormalLevels()}, {"times": UniformTimes()}, {"flow_weighting": "cosmap"}):
        with pytest.raises(ValueError, match="needs a (EDM|FlowMatch)Scheduler, got a DDPMScheduler"):
            Objective(scheduler=DDPMScheduler(), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale must be a number from -1 to .*, got 2"):
        ModeTimes(scale=2.0)


def test_mode_maps_the_unit_interval_onto_itself() -> None:
    """Esser et al. 2024, eq. 20: monotonic for every allowed scale; that of diffusers' script favours the middle."""
    u = jnp.linspace(0, 1, 1001)
    for scale in (-1.0, 0.0, 1.29, 1.75):
        levels = mode(u, scale)
        np.testing.assert_allclose(levels[jnp.array([0, 500, 1000])], [1, 0.5, 0], atol=1e-6)
        assert bool((jnp.diff(levels) <= 1e-6).all())
    assert float(jnp.abs(mode(u, 1.29) - 0.5).mean()) < 0.2 < float(jnp.abs(mode(u, -1.0) - 0.5).mean())


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler(sigma_data=0.3), EDMEulerScheduler(prediction_type="sample")])
def test_an_edm_target_means_the_clean_sample(scheduler: EDMEulerScheduler, rng: np.random.Generator) -> None:
    """As the table of the sampler reads what the network returns, at levels from 0.002 to 80."""
    x0, noise, sigma = clean(rng), clean(rng), np.geomspace(0.002, 80, 6)
    t = jnp.asarray(scheduler.timestep(sigma), jnp.float32)
    wanted = target(scheduler, x0, noise, t)
    noisy = scheduler.add_noise(x0, noise, t)
    seen = scheduler.network_input(noisy, t)
    for i, level in enumerate(sigma):
        evaluation = scheduler.evaluation(float(t[i]), (1.0, level))
        np.testing.assert_allclose(seen[i], evaluation.input_scale * noisy[i], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(evaluation.x0_of(noisy[i], wanted[i]), x0[i], atol=2e-4)
