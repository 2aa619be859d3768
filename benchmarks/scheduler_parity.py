"""How far each sampler's trajectory is from PyTorch diffusers', for every option.

    python benchmarks/scheduler_parity.py --output docs/results/scheduler_parity.json

The network is a fixed nonlinear function, the noise of stochastic samplers is the same on both sides. Errors are the
largest absolute difference over the whole trajectory, divided by the largest absolute value in it. Three of them:

* ``float64``: the NumPy table against diffusers with its float32 tables and arithmetic replaced by float64,
* ``float32``: the compiled JAX loop against the same,
* ``stock``: the compiled JAX loop against diffusers as it is, whose own tables are float32.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("float64", "float32", "stock")
ABOUT = (
    "Largest difference over trajectories of 5, 20 and 50 steps, relative to their largest value, for every option of"
    " every sampler, with a fixed nonlinear function for a network. float64: the NumPy table against diffusers in"
    " float64; float32: the compiled loop against the same; stock: the compiled loop against diffusers as installed,"
    " whose own tables are float32 (and whose spacings by exponential or beta sigmas, and by Karras sigmas on the"
    " cosine schedule, round the first timestep down by one)."
)

STEPS = (5, 20, 50)
SHAPE = (2, 4, 4, 3)
MOST_EVALUATIONS = 64

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VP, VE = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler"), ("EulerDiscreteScheduler",)
MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
ANCESTRAL = ("EulerAncestralDiscreteScheduler",)
ALL = (*VP, *VE, *ANCESTRAL, *MULTISTEP)
ZERO_SNR = tuple(name for name in ALL if name != "PNDMScheduler")
CORRECTING = ("DDIMScheduler", "DDPMScheduler", "LCMScheduler", *MULTISTEP)
# As a network with bounded betas would have been trained, but unlike every named schedule.
TRAINED_BETAS = tuple(float(b) for b in np.linspace(0.02, 0.12, 1000) ** 2 * 0.8 + 2e-4)


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of one scheduler: ``config`` of both sides, ``plan`` options here, ``step`` options there."""

    scheduler: str
    label: str
    config: dict[str, Any]
    plan: dict[str, Any] = dataclasses.field(default_factory=dict)
    step: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: tuple[int, ...] = STEPS

    def __str__(self) -> str:
        return f"{self.scheduler.removesuffix('Scheduler')}-{self.label}"


def cases() -> list[Case]:
    """Every option of every scheduler, one or a few at a time on top of Stable Diffusion's training schedule."""
    out: list[Case] = []

    def add(names: tuple[str, ...], label: str, config: dict[str, Any] | None = None, **rest: Any) -> None:
        for name in names:
            clip = {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {}
            plms = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
            out.append(Case(name, label, SD | clip | plms | (config or {}), **rest))

    add(ALL, "plain")
    add(ALL, "v", {"prediction_type": "v_prediction"})
    add((*(n for n in VP if n != "PNDMScheduler"), *VE, *MULTISTEP), "sample", {"prediction_type": "sample"})
    for spacing in ("leading", "linspace", "trailing"):
        add(ALL, spacing, {"timestep_spacing": spacing})
    add(ALL, "offset", {"timestep_spacing": "leading", "steps_offset": 1})
    for schedule in ("linear", "squaredcos_cap_v2"):
        add(ALL, schedule, {"beta_schedule": schedule, "beta_start": 0.0001, "beta_end": 0.02})
    add(ALL, "trained-betas", {"trained_betas": TRAINED_BETAS})
    add(ALL, "500-train-steps", {"num_train_timesteps": 500, "beta_start": 0.0017, "beta_end": 0.024})
    zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    add(ZERO_SNR, "zero-snr", zero_snr)
    add(CORRECTING, "threshold", {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9})
    add(("DDIMScheduler", "DDPMScheduler", "LCMScheduler"), "clip", {"clip_sample": True})
    add(("DDIMScheduler", "DDPMScheduler", "LCMScheduler"), "clip2", {"clip_sample": True, "clip_sample_range": 2.0})
    add(("DDIMScheduler", "PNDMScheduler"), "alpha-to-one-off", {"set_alpha_to_one": False})
    add(("PNDMScheduler",), "alpha-to-one", {"set_alpha_to_one": True})

    ddim = ("DDIMScheduler",)
    add(ddim, "eta-0.5", plan={"eta": 0.5}, step={"eta": 0.5})
    add(ddim, "eta-1", plan={"eta": 1.0}, step={"eta": 1.0})
    clipped = {"use_clipped_model_output": True, "eta": 0.3}
    add(ddim, "clipped-output", {"clip_sample": True}, plan=clipped, step=clipped)
    for kind in ("fixed_small_log", "fixed_large", "learned_range"):
        add(("DDPMScheduler",), kind, {"variance_type": kind, "clip_sample": True})
    add(("DDPMScheduler",), "sigmoid", {"beta_schedule": "sigmoid", "beta_start": 0.0001, "beta_end": 0.02})
    add(("PNDMScheduler",), "runge-kutta", {"skip_prk_steps": False})
    add(("PNDMScheduler",), "runge-kutta-v", {"skip_prk_steps": False, "prediction_type": "v_prediction"})
    add(("LCMScheduler",), "scaling", {"timestep_scaling": 1.0})

    for flag in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        add((*VE, *MULTISTEP), flag, {flag: True})
    add((*VE, *MULTISTEP), "sigma-min-last", {"final_sigmas_type": "sigma_min"})
    karras_min = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}
    add((*VE, *MULTISTEP), "karras-sigma-min-last", karras_min)
    add(VE, "log-linear", {"interpolation_type": "log_linear"})
    add(
        (*VE, "UniPCMultistepScheduler"),
        "karras-range",
        {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0},
    )
    add(VE, "continuous", {"timestep_type": "continuous", "prediction_type": "v_prediction"})
    churn = {"s_churn": 10.0, "s_tmin": 0.2, "s_tmax": 10.0, "s_noise": 1.01}
    add(VE, "churn", plan=churn, step=churn)
    add(VE, "churn-v", {"prediction_type": "v_prediction"}, plan=churn, step=churn)

    dpm = ("DPMSolverMultistepScheduler",)
    for order in (1, 2, 3):
        for kind in ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"):
            if (kind, order) == ("sde-dpmsolver", 3):
                continue
            last = "zero" if kind.endswith("++") else "sigma_min"
            for solver in ("midpoint", "heun") if order == 2 else ("midpoint",):
                config = {"algorithm_type": kind, "solver_order": order, "solver_type": solver}
                add(dpm, f"{kind}-{order}-{solver}", config | {"final_sigmas_type": last})
    noise_type = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    for prediction in ("v_prediction", "sample"):
        add(dpm, f"dpmsolver-{prediction}", noise_type | {"prediction_type": prediction})
    add(dpm, "dpmsolver-threshold", noise_type | {"thresholding": True, "sample_max_value": 1.5})
    for order in (2, 3):
        add(dpm, f"karras-{order}", {"use_karras_sigmas": True, "solver_order": order})
        not_lower = {"lower_order_final": False, "solver_order": order}
        add(dpm, f"not-lower-final-{order}", not_lower)
        add(dpm, f"not-lower-final-sigma-min-{order}", not_lower | {"final_sigmas_type": "sigma_min"})
        at_final = {"euler_at_final": True, "final_sigmas_type": "sigma_min", "solver_order": order}
        add(dpm, f"euler-at-final-{order}", at_final | {"lower_order_final": False})
    add(dpm, "karras-cosine", {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"})
    add(dpm, "lu", {"use_lu_lambdas": True})
    for spacing in ("leading", "linspace", "trailing"):
        clipped = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "timestep_spacing": spacing}
        add(dpm, f"lambda-clipped-{spacing}", clipped)

    unipc = ("UniPCMultistepScheduler",)
    for order in (1, 2, 3):
        for kind in ("bh1", "bh2"):
            # With bh1 and a last step to sigma 0 diffusers multiplies infinity by zero.
            last = {"final_sigmas_type": "sigma_min" if kind == "bh1" else "zero"}
            add(unipc, f"{kind}-{order}", {"solver_type": kind, "solver_order": order} | last)
            noise = {"predict_x0": False, "final_sigmas_type": "sigma_min"}
            add(unipc, f"noise-{kind}-{order}", {"solver_type": kind, "solver_order": order} | noise)
        add(unipc, f"some-corrected-{order}", {"solver_order": order, "disable_corrector": (0, 2)})
    not_lower = {"lower_order_final": False, "final_sigmas_type": "sigma_min", "solver_order": 3}
    add(unipc, "not-lower-final", not_lower)
    for prediction in ("v_prediction", "sample"):
        add(unipc, f"noise-{prediction}", {"prediction_type": prediction} | noise)

    def explicit(names: tuple[str, ...], kind: str, values: list[float]) -> None:
        add(names, f"explicit-{kind}", plan={kind: values}, steps=(0,))

    explicit(("DDPMScheduler", *VE, *dpm), "timesteps", [999, 850, 736, 645, 545, 455, 343, 233, 124, 24])
    explicit(("LCMScheduler",), "timesteps", [999, 759, 499, 259])
    explicit(VE, "sigmas", [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.38, 0.234, 0.113, 0.0])
    add(("LCMScheduler",), "original-100", plan={"original_inference_steps": 100})
    add(tuple(n for n in ALL if n != "LCMScheduler"), "strength", plan={"strength": 0.6})
    add(("LCMScheduler",), "strength", plan={"strength": 0.6}, steps=(5, 20))
    add(dpm, "strength-3", {"solver_order": 3}, plan={"strength": 0.6})
    add(unipc, "strength-3", {"solver_order": 3}, plan={"strength": 0.6})
    return out


def network(x: Any, t: Any, lib: Any, *, variance: bool, axis: int) -> Any:
    """A smooth nonlinear function of sample and timestep in place of a network."""
    out = 0.9 * x + 0.2 * lib.sin(1.5 * x + 0.002 * t)
    return lib.concatenate([out, lib.tanh(x)], axis) if variance else out


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


class _Double(types.ModuleType):
    """A module whose ``float32`` is ``float64``."""

    def __init__(self, module: types.ModuleType) -> None:
        super().__init__(module.__name__)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


@contextlib.contextmanager
def patched(module: types.ModuleType, draw: Callable[..., Any], *, double: bool) -> Iterator[None]:
    """Let a diffusers scheduler module take its noise from ``draw`` and, if asked, work in float64."""
    import torch

    names: dict[str, Any] = {"randn_tensor": draw}
    if double:
        names |= {"torch": _Double(torch), "np": _Double(np)}
    names = {k: v for k, v in names.items() if hasattr(module, k)}
    before, dtype = {k: getattr(module, k) for k in names}, torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    for k, v in names.items():
        setattr(module, k, v)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        for k, v in before.items():
            setattr(module, k, v)


def torch_trajectory(case: Case, n: int, noise: np.ndarray, *, double: bool) -> np.ndarray:
    """The samples of diffusers; ``noise[0]`` starts the run, ``noise[1]`` is the picture of image to image."""
    import diffusers
    import torch

    cls = getattr(diffusers, case.scheduler)
    z = torch.from_numpy(np.moveaxis(noise, -1, 2).copy()).to(torch.float64 if double else torch.float32)
    current: list[Any] = [None]
    with patched(importlib.import_module(cls.__module__), lambda *a, **k: current[0], double=double):
        scheduler = cls(**{k: list(v) if isinstance(v, tuple) else v for k, v in case.config.items()})
        plan = dict(case.plan)
        keep = {k: plan[k] for k in ("timesteps", "sigmas", "original_inference_steps") if k in plan}
        strength = plan.get("strength", 1.0)
        if case.scheduler == "LCMScheduler" and "strength" in plan:
            keep["strength"] = plan["strength"]
        scheduler.set_timesteps(**(keep if not n else {"num_inference_steps": n} | keep))
        begin = 0 if case.scheduler == "LCMScheduler" else n - int(n * strength)
        timesteps = scheduler.timesteps[begin:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        if "strength" in plan:
            sample = scheduler.add_noise(z[1], z[0], timesteps[:1].repeat(len(z[0])))
        else:
            sample = z[0] * scheduler.init_noise_sigma
        samples = [sample]
        variance = case.config.get("variance_type") == "learned_range"
        for t, current[0] in zip(timesteps, z[2:], strict=False):
            out = network(scheduler.scale_model_input(sample, t), float(t), torch, variance=variance, axis=1)
            sample = scheduler.step(out, t, sample, **case.step).prev_sample
            samples.append(sample)
    return np.moveaxis(torch.stack(samples).numpy().astype(np.float64), 2, -1)


# ---- this library ----------------------------------------------------------------------------------------------------


def numpy_trajectory(case: Case, n: int, noise: np.ndarray) -> np.ndarray:
    """The float64 table, executed in NumPy."""
    table = _scheduler(case).table(n or None, **case.plan)
    variance = table.learned_variance
    start = table.init_scale * noise[0]
    if "strength" in case.plan:
        start = table.levels[0, 0] * noise[1] + table.levels[0, 1] * noise[0]

    def model(x: np.ndarray, t: float) -> np.ndarray:
        return network(x, t, np, variance=variance, axis=-1)

    return np.stack(table.run(model, start, noise[2:]))


def jax_trajectory(case: Case, n: int, noise: np.ndarray) -> np.ndarray:
    """The float32 plan in one compiled loop that all cases share."""
    plan = _scheduler(case).plan(n or None, **case.plan)
    samples = _loop()(plan, noise.astype(np.float32), "strength" in case.plan)
    return np.asarray(samples)[: int(plan.num_evaluations) + 1].astype(np.float64)


def _scheduler(case: Case) -> Any:
    from diffuse_jax import schedulers

    return getattr(schedulers, case.scheduler).from_config(case.config)


@functools.cache
def _loop() -> Any:
    import jax
    import jax.numpy as jnp

    @jax.jit
    def run(plan: Any, noise: jax.Array, from_image: jax.Array) -> jax.Array:
        state = plan.init(noise[0])
        state = jax.tree.map(lambda a, b: jnp.where(from_image, a, b), plan.init(noise[0], noise[1]), state)
        samples = jnp.zeros((MOST_EVALUATIONS + 1, *noise.shape[1:])).at[0].set(state.sample)

        def body(i: jax.Array, carry: Any) -> Any:
            state, samples = carry
            x, t = plan.model_input(state, i), plan.timestep(i)
            out = network(x, t, jnp, variance=plan.learned_variance, axis=-1)
            state = plan.step(state, i, out, noise=noise[i + 2])
            return state, samples.at[i + 1].set(state.sample)

        return jax.lax.fori_loop(0, plan.num_evaluations, body, (state, samples))[1]

    return run


def make_noise(seed: int = 0) -> np.ndarray:
    """Start, picture and one draw per evaluation, the same float32 numbers on every side."""
    shape = (MOST_EVALUATIONS + 2, *SHAPE)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(np.float64)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute value of ``b``; infinite if anything is not finite."""
    if a.shape != b.shape:
        raise ValueError(f"trajectories have {len(a)} and {len(b)} samples")
    error = np.abs(a - b).max() / np.abs(b).max()
    return float(error) if np.isfinite(error) else float("inf")


def compare(case: Case, n: int, noise: np.ndarray, *, stock: bool) -> dict[str, float]:
    """The errors of one case at one number of steps; the third one only if asked for."""
    exact = torch_trajectory(case, n, noise, double=True)
    ours = jax_trajectory(case, n, noise)
    errors = {"float64": relative(numpy_trajectory(case, n, noise), exact), "float32": relative(ours, exact)}
    return errors | ({"stock": relative(ours, torch_trajectory(case, n, noise, double=False))} if stock else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results/scheduler_parity.json"))
    args = parser.parse_args()
    import diffusers
    import torch

    diffusers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    noise, configs = make_noise(), {}
    for case in cases():
        errors = [compare(case, n, noise, stock=True) for n in case.steps]
        worst = {kind: max(e[kind] for e in errors) for kind in KINDS}
        configs.setdefault(case.scheduler, {})[case.label] = worst
    rows = [
        {"scheduler": name, "configurations": len(own)} | {k: max(e[k] for e in own.values()) for k in KINDS}
        for name, own in configs.items()
    ]
    result = {
        "title": "Sampler trajectories against PyTorch diffusers",
        "about": ABOUT,
        "machine": {"diffusers": diffusers.__version__, "torch": torch.__version__},
        "rows": rows,
        "configurations": configs,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{sum(map(len, configs.values()))} configurations, written to {args.output}")


if __name__ == "__main__":
    main()
