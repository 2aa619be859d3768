"""Every option of every sampler against PyTorch diffusers, whole trajectories of a nonlinear function."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import scheduler_parity as parity
from benchmarks.scheduler_cases.case import SD, Case
from diffuse_jax import schedulers
from diffuse_jax.schedulers.categorical_table import log_posterior
from tests.schedulers.samplers import EVERY, REQUIRED, make, takes

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CASES = parity.cases()
NAMES = sorted(name for name in EVERY if hasattr(diffusers.schedulers, name))
THEIRS = {name: parity.torch_class(name) for name in NAMES}
# Formulas agree to rounding of float64; the compiled loop may lose what float32 and the number of steps explain.
EXACT, COMPILED = 1e-10, 1e-5
QUICK = (1, 2, 3, 20)


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    diffusers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    return parity.make_noise()


def check(case: Case, n: int, noise: np.ndarray) -> None:
    errors = parity.compare(case, n, noise, stock=False)
    assert errors["float64"] < EXACT, (n, errors)
    assert errors["float32"] < COMPILED, (n, errors)


def short(case: Case) -> tuple[int, ...]:
    """The numbers of steps that the ordinary suite runs: in them all orders of a solver rise and fall."""
    return tuple(n for n in case.steps if n in QUICK) or case.steps[:1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_trajectory(case: Case, noise: np.ndarray) -> None:
    for n in short(case):
        check(case, n, noise)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if len(short(case)) < len(case.steps)], ids=str)
def test_long_trajectory(case: Case, noise: np.ndarray) -> None:
    """All other numbers of steps; the ordinary suite runs each configuration at those of ``short``."""
    for n in set(case.steps) - set(short(case)):
        check(case, n, noise)


def test_one_compilation_for_all_samplers_and_step_counts(noise: np.ndarray) -> None:
    for case in CASES[:: len(CASES) // 20]:
        parity.jax_trajectory(case, case.steps[0], noise)
    # Ordinary plans, dynamic thresholding, two kinds of learned variance, one of them with thresholding.
    assert parity._loop()._cache_size() <= 5


@pytest.mark.parametrize("name", NAMES)
def test_saved_configuration_opens_in_pytorch(name: str, tmp_path) -> None:
    config = {"num_train_timesteps": 500, "prediction_type": "sample", "s": 0.01, "sigma_max": 60.0}
    config = {k: v for k, v in config.items() if takes(name, k, v)}
    ours = make(name, **config)
    ours.save_pretrained(tmp_path)
    theirs = THEIRS[name].from_pretrained(tmp_path)
    assert config
    assert {k: theirs.config[k] for k in config} == config
    theirs.save_pretrained(tmp_path / "back")
    back = getattr(schedulers, name).from_pretrained(tmp_path / "back")
    skip = {"_class_name", "_diffusers_version"}
    assert {k: v for k, v in back.to_json().items() if k not in skip} == {
        k: v for k, v in ours.to_json().items() if k not in skip
    }


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_those_of_pytorch(name: str) -> None:
    theirs = {k: v for k, v in THEIRS[name](**REQUIRED.get(name, {})).config.items() if not k.startswith("_")}
    ours = {k: v for k, v in make(name).to_json().items() if not k.startswith("_")}
    assert ours == theirs


@pytest.mark.parametrize("target", [n for n in NAMES if "PNDMScheduler" in getattr(THEIRS[n], "_compatibles", ())])
def test_from_config_keeps_what_pytorch_keeps(target: str) -> None:
    pndm = SD | {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}
    theirs = THEIRS[target].from_config(diffusers.PNDMScheduler.from_config(pndm).config)
    ours = getattr(schedulers, target).from_config(schedulers.PNDMScheduler.from_config(pndm))
    mine = ours.to_json()
    assert {k: v for k, v in theirs.config.items() if k in mine and k[0] != "_"} == {
        k: mine[k] for k in theirs.config if k in mine and k[0] != "_"
    }


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerDiscreteScheduler"])
def test_noising_and_velocity(name: str, noise: np.ndarray) -> None:
    t = np.array([0, 999])
    theirs = THEIRS[name](**SD)
    x0, eps = noise[0].astype(np.float32), noise[1].astype(np.float32)
    ours = getattr(schedulers, name)(**SD)
    # Their Euler schedulers want the timesteps they were set to, as floats.
    at = torch.tensor(t) if name == "DDPMScheduler" else theirs.timesteps[torch.tensor([999, 0])]
    want = theirs.add_noise(torch.tensor(x0), torch.tensor(eps), at).numpy()
    assert parity.relative(np.asarray(ours.add_noise(x0, eps, t)), want) < 1e-5
    if name == "DDPMScheduler":
        want = theirs.get_velocity(torch.tensor(x0), torch.tensor(eps), at).numpy()
        assert parity.relative(np.asarray(ours.velocity(x0, eps, t)), want) < 1e-5


@pytest.mark.parametrize("name", ["DDIMParallelScheduler", "DDPMParallelScheduler"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_steps_at_several_timesteps_at_once(name: str, prediction_type: str, noise: np.ndarray) -> None:
    config = SD | {"prediction_type": prediction_type, "clip_sample_range": 1.5}
    theirs, n = THEIRS[name](**config), 7
    theirs.set_timesteps(n)
    x, out = noise[:2, :1].repeat(n, 1).astype(np.float32)
    x, out = x + noise[2 : 2 + n, 0], out + noise[20 : 20 + n, 0]
    t = theirs.timesteps
    back = lambda a: torch.tensor(np.moveaxis(a, -1, 1).astype(np.float32))
    want = np.moveaxis(theirs.batch_step_no_noise(back(out), t, back(x)).numpy(), 1, -1)
    plan = getattr(schedulers, name)(**config).plan(n)
    got = plan.step(plan.resume(x), np.arange(n), out, noise=np.zeros_like(x)).sample
    assert parity.relative(np.asarray(got), want) < 1e-5


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_repaint_with_a_mask(eta: float, noise: np.ndarray) -> None:
    """What diffusers draws for the step, the known part and the jump is combined as the docstring of ours says."""
    config = SD | {"num_train_timesteps": 30, "eta": eta}
    theirs, jumps = THEIRS["RePaintScheduler"](**config), {"jump_length": 4, "jump_n_sample": 3}
    theirs.set_timesteps(30, **jumps)
    plan = schedulers.RePaintScheduler(**config).plan(30, **jumps)
    known, image = (noise[2] > 0.5).astype(np.float32), noise[1].astype(np.float32)
    torch_known, torch_image = (torch.tensor(np.moveaxis(a, -1, 1)) for a in (known, image))
    state, sample = plan.init(noise[0]), torch.tensor(np.moveaxis(noise[0], -1, 1).astype(np.float32))
    steps, rng, k = theirs.timesteps.tolist(), np.random.default_rng(0), 0

    def draw(a: list[np.ndarray]) -> torch.Tensor:
        a.append(rng.standard_normal(noise[0].shape).astype(np.float32))
        return torch.tensor(np.moveaxis(a[-1], -1, 1))

    for i in range(int(plan.num_evaluations)):
        now, first, up = steps[k], [], []
        out = parity.network(sample, now, torch, variance="", axis=1)
        with parity.patched(sys.modules[type(theirs).__module__], lambda *_, **__: draw(first), double=False):  # noqa: B023
            sample = theirs.step(out, now, sample, torch_image, torch_known).prev_sample
        alpha2 = float(theirs.alphas_cumprod[now - 1]) if now else 1.0
        std = eta * float(theirs._get_variance(now)) ** 0.5
        shrink2, total = 1.0, np.zeros_like(noise[0])
        while k + 1 < len(steps) and steps[k + 1] > steps[k]:
            beta = float(theirs.betas[steps[k]])
            with parity.patched(sys.modules[type(theirs).__module__], lambda *_, **__: draw(up), double=False):  # noqa: B023
                sample = theirs.undo_step(sample, steps[k])
            total, shrink2 = (1 - beta) ** 0.5 * total + beta**0.5 * up[-1], shrink2 * (1 - beta)
            k += 1
        k += 1
        both = (shrink2 * std**2 + 1 - shrink2) ** 0.5
        after = (1 - shrink2 * alpha2) ** 0.5
        z = (shrink2**0.5 * std * first[0] + total) / max(both, 1e-12)
        z_known = (shrink2**0.5 * (1 - alpha2) ** 0.5 * first[0] + total) / max(after, 1e-12)
        output = parity.network(plan.model_input(state, i), now, jax.numpy, variance="", axis=-1)
        state = plan.blend(plan.step(state, i, output, noise=z), i, image, z_known, known)
        assert parity.relative(np.asarray(state.sample), np.moveaxis(sample.numpy(), 1, -1)) < 1e-4
    np.testing.assert_array_equal(np.asarray(state.sample)[known > 0], image[known > 0])


@pytest.mark.parametrize("n", [2, 10, 60])
def test_predictor_and_corrector(n: int, noise: np.ndarray) -> None:
    """The whole loop of the pipeline; diffusers averages norms over a batch, so it gets one image at a time."""
    ours, theirs = schedulers.ScoreSdeVeScheduler(correct_steps=2), THEIRS["ScoreSdeVeScheduler"](correct_steps=2)
    plan, batch = ours.plan(n), len(noise[0])

    def score(x: Any, sigma: float, lib: Any) -> Any:
        return -(x - 0.3 * lib.tanh(x)) / (1 + sigma**2)

    theirs.set_timesteps(n)
    theirs.set_sigmas(n)
    state, samples = plan.init(noise[0]), [torch.tensor(noise[0, b : b + 1]).float() * 1348 for b in range(batch)]
    for i in range(n):
        draws = noise[2 + 3 * i : 5 + 3 * i]
        for turn in range(2):
            out = score(plan.model_input(state, i), float(plan.timestep(i)), jax.numpy)
            state = ours.correct(state, i, out, turn=turn, noise=draws[turn])
        out = score(plan.model_input(state, i), float(plan.timestep(i)), jax.numpy)
        state = plan.step(state, i, out, noise=draws[2])
        sigma = float(theirs.sigmas[i])
        for b, x in enumerate(samples):
            drawn = iter(torch.tensor(draws[:, b : b + 1]).float())
            with parity.patched(sys.modules[type(theirs).__module__], lambda *_, d=drawn, **__: next(d), double=False):
                for _ in range(2):
                    x = theirs.step_correct(score(x, sigma, torch), x).prev_sample
                step = theirs.step_pred(score(x, sigma, torch), theirs.timesteps[i], x)
            samples[b] = step.prev_sample if i + 1 < n else step.prev_sample_mean
        assert parity.relative(np.asarray(state.sample), torch.cat(samples).numpy()) < 2e-5


CLASSES, PIXELS = 11, 40


def categorical(n: int, rng: np.random.Generator) -> Iterator[tuple[Any, Any, Any, Any, Any]]:
    """Both sides of VQ-Diffusion before each of the last ``n`` timesteps, which is what diffusers runs.

    Theirs, the timestep, the classes, a prediction for ours and for theirs (class axis second).
    """
    theirs = THEIRS["VQDiffusionScheduler"](num_vec_classes=CLASSES + 1)
    theirs.set_timesteps(n)
    for t in theirs.timesteps:
        logits = 2 * rng.standard_normal((2, PIXELS, CLASSES))
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        yield theirs, t, rng.integers(0, CLASSES + 1, (2, PIXELS)), log_p, torch.tensor(np.moveaxis(log_p, -1, 1))


@pytest.mark.parametrize("n", [1, 2, 10, 100])
def test_vq_diffusion_posterior(n: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # they keep their tables in float32
    table = schedulers.VQDiffusionScheduler(num_vec_classes=CLASSES + 1).table(n)
    for i, (theirs, t, x, log_p, torch_p) in enumerate(categorical(n, rng)):
        got = np.exp(log_posterior(table.log_abc[i], x, log_p))
        if t == 0:
            np.testing.assert_allclose(got[..., :-1], np.exp(log_p), atol=1e-10)
            continue
        want = theirs.q_posterior(torch_p, torch.tensor(x), t).exp().numpy()
        np.testing.assert_allclose(got, np.moveaxis(want, 1, -1), atol=1e-10)


@pytest.mark.parametrize("n", [1, 10, 100])
def test_vq_diffusion_draws(n: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = schedulers.VQDiffusionScheduler(num_vec_classes=CLASSES + 1).plan(n)
    for i, (theirs, t, x, log_p, torch_p) in enumerate(categorical(n, rng)):
        uniform = rng.uniform(1e-6, 1, (2, PIXELS, CLASSES + 1)).astype(np.float32)
        drawn = torch.tensor(np.moveaxis(uniform, -1, 1)[:, : CLASSES + bool(t)])
        monkeypatch.setattr(torch, "rand", lambda *_, d=drawn, **__: d)
        want = theirs.step(torch_p.float(), t, torch.tensor(x)).prev_sample.numpy()
        np.testing.assert_array_equal(plan.step(x, i, log_p.astype(np.float32), uniform=uniform), want)


INTERCHANGEABLE = [cls.class_name for cls in schedulers.KarrasDiffusionSchedulers]
# Values that are nobody's default and that contradict nothing.
OWN: dict[str, Any] = {
    "num_train_timesteps": 60,
    "beta_start": 0.002,
    "beta_end": 0.015,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "clip_sample_range": 2.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.9,
    "sample_max_value": 1.5,
    "rescale_betas_zero_snr": True,
    "use_karras_sigmas": True,
    "flow_shift": 3.0,
    "sigma_min": 0.03,
    "sigma_max": 60.0,
    "sigma_data": 0.7,
    "sigma_schedule": "exponential",
    "rho": 5.0,
    "solver_order": 3,
    "solver_type": "heun",
    "algorithm_type": "sde-dpmsolver++",
    "euler_at_final": True,
    "final_sigmas_type": "sigma_min",
    "variance_type": "fixed_large",
    "interpolation_type": "log_linear",
    "noise_sampler_seed": 5,
    "lambda_min_clipped": -5.1,
    "disable_corrector": [1, 3],
    "time_shift_type": "linear",
}


def test_the_interchangeable_set_is_theirs() -> None:
    assert [e.name for e in diffusers.schedulers.KarrasDiffusionSchedulers] == INTERCHANGEABLE


@functools.cache
def their_settings(name: str) -> set[str]:
    """Settings of the class in diffusers."""
    return {*inspect.signature(THEIRS[name]).parameters}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers|numpy")  # many thousands of them
@pytest.mark.parametrize("source", INTERCHANGEABLE)
@pytest.mark.parametrize("target", INTERCHANGEABLE)
def test_any_two_keep_what_is_common(source: str, target: str, caplog: pytest.LogCaptureFixture) -> None:
    own = {k: v for k, v in OWN.items() if takes(source, k, tuple(v) if isinstance(v, list) else v)}
    if target == "DEISMultistepScheduler":
        own.pop("algorithm_type", None)  # theirs refuses that of a stochastic solver
    common = their_settings(source) & their_settings(target)
    other = THEIRS[target].from_config(THEIRS[source](**own).config)
    ours = getattr(schedulers, source)(**own)
    with caplog.at_level(logging.WARNING):
        built = getattr(schedulers, target).from_config(ours)
    mine = built.to_json()
    assert {k: mine[k] for k in their_settings(target)} == {k: other.config[k] for k in their_settings(target)}
    assert common & {*own} == {k for k in own if k in built.given}
    assert set(built.ignored) == {*own} - common
    assert all(f"'{k}'" not in caplog.text for k in mine if k not in built.ignored)
    again = getattr(schedulers, source).from_config(built)
    changed = {k for k in own if getattr(again, k) != getattr(ours, k)}
    assert changed <= {"solver_type", "algorithm_type"}, "the way back loses nothing but names that mean something else"
    assert len(built.table(10)) >= 10


def test_a_stochastic_solver_becomes_deis() -> None:
    source = schedulers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    assert schedulers.DEISMultistepScheduler.from_config(source).algorithm_type == "deis"
