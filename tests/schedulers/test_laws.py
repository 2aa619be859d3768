"""Laws that samplers obey: exact answers for Gaussian data, orders of accuracy, identities, the structure of tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffuse_jax import schedulers
from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers.table import MEMORY, Table
from tests.schedulers.samplers import LATE, NAMES, ONE_WAY, ascends, make, prediction_types, stochastic

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STD = 0.6
"""Standard deviation of the data; the best network is then known and so is where every path ends."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in NAMES},
    "CMStochasticIterativeScheduler": ("CMStochasticIterativeScheduler", {"num_train_timesteps": 1000}),
    "KarrasEDMScheduler": ("KarrasEDMScheduler", {"num_train_timesteps": 1000}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "dpm1": ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    "dpm3": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpm-heun": ("DPMSolverMultistepScheduler", {"solver_type": "heun"}),
    "dpm-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "unipc-bh1": ("UniPCMultistepScheduler", {"solver_type": "bh1"}),
}

ODE = [name for name in VARIANTS if name != "dpm-sde" and not stochastic(VARIANTS[name][0])]


def build(name: str, **changes: Any) -> schedulers.Scheduler:
    cls, config = VARIANTS[name]
    # A network that predicts clean samples cannot start from one.
    common = {"clip_sample": False} | ({"set_alpha_to_one": False} if ascends(cls) else {})
    return make(cls, **(SD | common | config | changes))


def gaussian_network(table: Table) -> Any:
    """The best prediction for data N(0, STD^2): the posterior mean, in whatever form the sampler wants it."""
    rows = iter(zip(table.levels, table.to_x0, table.input_scale, strict=False))

    def model(x: np.ndarray, t: float) -> np.ndarray:
        (alpha, sigma), (of_sample, of_output), scale = next(rows)
        x0 = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x / scale
        return (x0 - of_sample * x / scale) / of_output

    return model


def exact_end(table: Table, x: float) -> float:
    """Where the probability-flow ODE takes ``x``: it keeps ``x / standard deviation of the noisy data``."""
    std = np.sqrt((table.levels[:, 0] * STD) ** 2 + table.levels[:, 1] ** 2)
    return float(x * std[-1] / std[0])


@pytest.mark.parametrize("name", ODE)
@pytest.mark.parametrize("k", [0, 1, 2])
def test_gaussian_end_point(name: str, k: int) -> None:
    types = prediction_types(VARIANTS[name][0])
    table = build(name, prediction_type=types[k % len(types)]).table(200)
    end = table.run(gaussian_network(table), np.array([[table.init_scale]]))[-1]
    assert end.item() == pytest.approx(exact_end(table, table.init_scale), rel=0.03)


STOCHASTIC = {
    "DDPMScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "dpm-sde": {},
    "DDIMScheduler": {"eta": 1.0},
    "EulerDiscreteScheduler": {"s_churn": 20.0},
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_gaussian_variance_of_stochastic_samplers(name: str) -> None:
    """Everything is linear, so the final variance is the sum of squared responses to the start and to each draw."""
    table = build(name).table(250, **STOCHASTIC[name])
    n = len(table)
    start = np.zeros((n + 1, 1))
    start[-1] = np.hypot(*table.levels[0] * (STD, 1.0))
    draws = np.eye(n, n + 1)[:, :, None]
    response = table.run(gaussian_network(table), start, list(draws))[-1]
    assert np.sqrt((response**2).sum()) == pytest.approx(STD, rel=0.03)


def ode_error(name: str, n: int, **changes: Any) -> float:
    sigmas = np.geomspace(8.0, 0.05, n + 1)
    exploding = VARIANTS[name][0].startswith("Euler")
    last = {} if exploding else {"lower_order_final": False, "final_sigmas_type": "sigma_min"}
    table = build(name, **(last | changes)).table(sigmas=list(sigmas))
    std = np.sqrt((table.levels[:-1, 0] * STD) ** 2 + table.levels[:-1, 1] ** 2)
    end_alpha = 1.0 if exploding else 1 / np.hypot(1, sigmas[-1])
    end_std = end_alpha * np.hypot(STD, sigmas[-1])
    end = table.run(gaussian_network(table), np.array([[std[0]]]))[-1].item()
    return abs(end / end_std - 1)


@pytest.mark.parametrize(
    ("name", "changes", "order"),
    [
        ("EulerDiscreteScheduler", {}, 1),
        ("dpm1", {}, 1),
        ("DPMSolverMultistepScheduler", {}, 2),
        ("dpm-heun", {}, 2),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, 2),
        ("UniPCMultistepScheduler", {"solver_order": 1}, 2),
        ("UniPCMultistepScheduler", {"disable_corrector": list(range(999))}, 2),
        ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh1"}, 2),
    ],
)
def test_order_of_accuracy(name: str, changes: dict[str, Any], order: int) -> None:
    coarse, fine = ode_error(name, 160, **changes), ode_error(name, 320, **changes)
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.25) or np.log2(coarse / fine) > order


def test_higher_orders_are_more_accurate() -> None:
    dpm = [ode_error(f"dpm{order}", 100) for order in (1, 3)]
    assert dpm[1] < dpm[0] / 20
    unipc = [ode_error("UniPCMultistepScheduler", 100, solver_order=order) for order in (1, 2)]
    assert unipc[1] < unipc[0]


def test_prediction_types_say_the_same(rng: np.random.Generator) -> None:
    """eps -> v -> x0 -> eps, in variance-preserving and in variance-exploding coordinates."""
    x0, eps = rng.standard_normal((2, 50))
    for alpha, sigma in [(0.8, 0.6), (0.01, np.sqrt(1 - 1e-4)), (1.0, 14.6), (1.0, 0.03)]:
        x = alpha * x0 + sigma * eps
        v = (alpha * eps - sigma * x0) / np.hypot(alpha, sigma)
        for prediction_type, output in {"epsilon": eps, "v_prediction": v, "sample": x0}.items():
            np.testing.assert_allclose(ns.predict_x0(prediction_type, x, output, alpha, sigma), x0, atol=1e-11)
            np.testing.assert_allclose(ns.predict_eps(prediction_type, x, output, alpha, sigma), eps, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_velocity_and_noising_agree_with_prediction(name: str, rng: np.random.Generator) -> None:
    scheduler = build(name)
    x0, eps = rng.standard_normal((2, 3, 4, 4, 2)).astype(np.float32)
    low, high = scheduler.timestep_range
    t = np.array([1, 500, 998]) if high > 998 else np.linspace(low, high, 3)
    x, v = scheduler.add_noise(x0, eps, t), scheduler.velocity(x0, eps, t)
    ones, zeros = np.ones_like(x0), np.zeros_like(x0)
    alpha, sigma = np.asarray(scheduler.add_noise(ones, zeros, t)), np.asarray(scheduler.add_noise(zeros, ones, t))
    kind = "flow_prediction" if scheduler.coordinates == "flow" else "v_prediction"
    back = ns.predict_x0(kind, np.asarray(x), np.asarray(v), alpha, sigma, scheduler.sigma_data)
    np.testing.assert_allclose(back, x0, atol=2e-5)


ENDING_CLEAN = [
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "dpm3",
    "unipc3",
    "dpm-sde",
]


@pytest.mark.parametrize("name", [*ENDING_CLEAN, "LCMScheduler", "DDPMScheduler"])
def test_final_sigma_zero_returns_the_prediction(name: str, rng: np.random.Generator) -> None:
    table = build(name, prediction_type="v_prediction").table(7)
    x, out = rng.standard_normal((2, 1, 5))
    last = table.run(lambda *_: out, x, list(rng.standard_normal((7, 1, 5))))
    predicted = table.to_x0[-1, 0] * last[-2] + table.to_x0[-1, 1] * out
    if VARIANTS[name][0].startswith("UniPC"):
        # The corrector first moves the last sample; the step itself still goes to the prediction.
        predicted = last[-1]
        np.testing.assert_allclose(table.rows[-1, 0, -1 - MEMORY : -1], 0, atol=1e-12)
    np.testing.assert_allclose(last[-1], predicted, rtol=1e-3 if name == "LCMScheduler" else 1e-12, atol=1e-9)


@pytest.mark.parametrize("n", [4, 11, 30])
@pytest.mark.parametrize("name", VARIANTS)
def test_structure_of_tables(name: str, n: int) -> None:
    table = build(name).table(n)
    assert all(np.isfinite(getattr(table, field)).all() for field in ("rows", "to_x0", "levels", "input_scale"))
    up = -1 if ascends(VARIANTS[name][0]) else 1 if VARIANTS[name][0] in ONE_WAY else 0
    assert np.all(up * np.diff(table.timesteps) <= 1e-9)
    assert np.all(up * np.diff(np.arctan2(table.levels[:, 1], table.levels[:, 0])) <= 1e-9)
    live = np.zeros(MEMORY, bool)
    for row in table.rows:
        reads = row[:, 3 : 3 + MEMORY] != 0
        assert not (reads[0] & ~live).any(), "the sample depends on memory that nothing was written to"
        fresh = np.delete(row, slice(3, 3 + MEMORY), axis=1).any(1)
        live = (fresh | (reads & live).any(1))[1:]


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "dpm1", "DDPMScheduler"])
def test_two_halves_make_a_whole(name: str, rng: np.random.Generator) -> None:
    """denoising_end hands over where denoising_start takes up (exactly, for samplers without memory)."""
    scheduler = build(name)
    model = lambda x, t: np.sin(x + t / 300)
    x, noise = rng.standard_normal((1, 5)), list(rng.standard_normal((20, 1, 5)))
    whole = scheduler.table(20).run(model, x, noise)
    first = scheduler.table(20, denoising_end=0.7)
    second = scheduler.table(20, denoising_start=0.7)
    assert len(first) + len(second) == 20
    middle = first.run(model, x, noise)
    np.testing.assert_array_equal(middle[-1], whole[len(first)])
    end = second.run(model, middle[-1], noise[len(first) :])
    np.testing.assert_allclose(end[-1], whole[-1], rtol=1e-12)


@pytest.mark.parametrize("name", [n for n, (cls, _) in VARIANTS.items() if cls in LATE])
def test_strength_runs_the_last_steps(name: str) -> None:
    scheduler = build(name)
    whole, part = scheduler.table(50), scheduler.table(50, strength=0.8)
    run = np.sum(~part.inner) - (np.sum(~whole.inner) - 50)
    assert run == 40 or name in ("PNDMScheduler",)
    np.testing.assert_array_equal(part.timesteps[-30:], whole.timesteps[-30:])
    assert part.init_scale == whole.init_scale


def test_beta_schedules() -> None:
    for schedule in (*ns.BETA_SCHEDULES, "sigmoid"):
        betas = ns.beta_table(schedule, 1e-4, 0.02, 1000)
        assert betas.shape == (1000,)
        assert np.all((betas > 0) & (betas < 1))
        assert np.all(np.diff(betas) >= 0)
    alpha_bar = np.cumprod(1 - ns.beta_table("scaled_linear", 0.00085, 0.012, 1000))
    rescaled = ns.rescale_zero_terminal_snr(alpha_bar)
    assert rescaled[-1] == 0
    assert rescaled[0] == pytest.approx(alpha_bar[0])


@pytest.mark.parametrize("train", [100, 1000, 2000, 5000])
@pytest.mark.parametrize("schedule", ns.BETA_SCHEDULES)
def test_zero_terminal_snr_is_the_highest_level(train: int, schedule: str) -> None:
    scheduler = make(
        "EulerDiscreteScheduler", num_train_timesteps=train, beta_schedule=schedule, rescale_betas_zero_snr=True
    )
    assert np.isfinite(scheduler.sigma_table).all()
    assert np.all(np.diff(scheduler.sigma_table) > 0)
    assert scheduler.sigma_table[-1] >= 4095.99


def test_lcm_timesteps() -> None:
    """The evenly spread rule and the strided rule of the first releases, 1000 training and 50 distillation steps."""
    scheduler = build("LCMScheduler")
    strided = {3: [999, 679, 359], 4: [999, 759, 519, 279], 8: [999, 879, 759, 639, 519, 399, 279, 159]}
    spread = {3: [999, 679, 339], 4: [999, 759, 499, 259], 8: [999, 879, 759, 639, 499, 379, 259, 139]}
    for n in (3, 4, 8):
        assert scheduler.table(n, strided=True).timesteps.tolist() == strided[n]
        assert scheduler.table(n).timesteps.tolist() == spread[n]
    assert scheduler.table(4, grid_strength=0.5).timesteps.tolist() == [499, 379, 259, 139]
    assert scheduler.table(4, strength=0.5).timesteps.tolist() == spread[4][2:]
