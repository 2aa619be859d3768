"""Samplers defined on noise levels: Heun, DPM-Solver-2, LMS, iPNDM, SDE, EDM, consistency models, flow matching."""

from __future__ import annotations

import functools
from typing import Any

from benchmarks.scheduler_cases.case import SD, STEPS, TRAINED_BETAS, Case, Theirs

MIDPOINT = ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
BETAS = ("HeunDiscreteScheduler", *MIDPOINT, "LMSDiscreteScheduler", "DPMSolverSDEScheduler")
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def cases() -> list[Case]:
    """Every option of every scheduler of the family."""
    return [*_with_betas(), *_ipndm(), *_edm(), *_karras_ve(), *_consistency(), *_flow()]


def _with_betas() -> list[Case]:
    """Samplers of networks trained with betas, on top of Stable Diffusion's."""
    out: list[Case] = []

    def add(names: tuple[str, ...], label: str, config: dict[str, Any] | None = None, **rest: Any) -> None:
        out.extend(Case(name, label, SD | (config or {}), **rest) for name in names)

    add(BETAS, "plain")
    add(BETAS, "v", {"prediction_type": "v_prediction"})
    # diffusers does not implement sample prediction for the others.
    add(("HeunDiscreteScheduler", "LMSDiscreteScheduler"), "sample", {"prediction_type": "sample"})
    for spacing in ("leading", "linspace", "trailing"):
        add(BETAS, spacing, {"timestep_spacing": spacing})
    add(BETAS, "offset", {"timestep_spacing": "leading", "steps_offset": 1})
    for schedule, label in {"linear": "linear", "squaredcos_cap_v2": "cosine"}.items():
        config = {"beta_schedule": schedule, "beta_start": 0.0001, "beta_end": 0.02}
        add(tuple(n for n in BETAS if "Ancestral" not in n), label, config)
        # In long steps from a high level, diffusers loses the lower level (a difference of squares) to rounding.
        add(("KDPM2AncestralDiscreteScheduler",), label, config, steps=STEPS[3 if label == "linear" else 6 :])
    add(("HeunDiscreteScheduler",), "exp", {"beta_schedule": "exp"})
    add(BETAS, "trained-betas", {"trained_betas": TRAINED_BETAS})
    few = {"num_train_timesteps": 500, "beta_start": 0.0017, "beta_end": 0.024}
    add(BETAS, "500-train-steps", few, steps=(*STEPS[:-1], 499))
    for flag in SPACINGS:
        for prediction, label in {"epsilon": flag, "v_prediction": f"{flag}-v"}.items():
            config = {flag: True, "prediction_type": prediction}
            add(tuple(name for name in BETAS if name[0] != "L"), label, config)
            # With 999 levels at this spacing, the last step to sigma 0 extrapolates four slopes to 150 times their
            # distance, which is beyond float32.
            add(("LMSDiscreteScheduler",), label, config, steps=STEPS if flag == "use_beta_sigmas" else STEPS[:-1])
    add(BETAS, "strength", plan={"strength": 0.6}, steps=STEPS[1:])
    heun = ("HeunDiscreteScheduler",)
    add(heun, "clip", {"clip_sample": True})
    add(heun, "clip2", {"clip_sample": True, "clip_sample_range": 2.0, "prediction_type": "v_prediction"})
    add(heun, "explicit-timesteps", plan={"timesteps": [999, 850, 736, 545, 343, 233, 124, 24]}, steps=(0,))
    add(("DPMSolverSDEScheduler",), "noise", plan={"s_noise": 1.1}, step={"s_noise": 1.1})
    euler = ("EulerDiscreteScheduler",)
    for flag in SPACINGS:
        add(euler, f"{flag}-range", {flag: True, "sigma_min": 0.1, "sigma_max": 9.0})
        add(euler, f"{flag}-log-linear", {flag: True, "interpolation_type": "log_linear"})
        add(euler, f"{flag}-sigma-min-last", {flag: True, "final_sigmas_type": "sigma_min"})
        add(euler, f"{flag}-v", {flag: True, "prediction_type": "v_prediction", "timestep_type": "continuous"})
    add(euler, "log-linear-sigma-min-last", {"interpolation_type": "log_linear", "final_sigmas_type": "sigma_min"})
    for order in (1, 2, 3, 4, 5, 6):
        add(("LMSDiscreteScheduler",), f"order-{order}", plan={"order": order}, step={"order": order})
    return out


EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
COSINE = "CosineDPMSolverMultistepScheduler"


def _edm() -> list[Case]:
    """Samplers whose levels lie between their own sigma_min and sigma_max."""
    out: list[Case] = []

    def add(names: tuple[str, ...], label: str, config: dict[str, Any] | None = None, **rest: Any) -> None:
        out.extend(Case(name, label, config or {}, **rest) for name in names)

    every, multistep = (*EDM, COSINE), (EDM[1], COSINE)
    # In diffusers, a single level of exponential spacing is the lowest one.
    several = STEPS[1:]
    add(EDM, "plain")
    add((COSINE,), "plain", steps=several)
    add(every, "karras", {"sigma_schedule": "karras"})
    add(every, "exponential", {"sigma_schedule": "exponential"}, steps=several)
    add(every, "v", {"prediction_type": "v_prediction", "sigma_schedule": "karras"})
    add((COSINE,), "epsilon", {"prediction_type": "epsilon", "sigma_schedule": "karras"})
    range_ = {"sigma_min": 0.01, "sigma_max": 40.0, "sigma_data": 0.7, "rho": 5.0, "sigma_schedule": "karras"}
    add(every, "range", range_)
    # With a single step, diffusers' Euler does not move.
    add(every, "sigma-min-last", {"final_sigmas_type": "sigma_min"}, steps=several)
    add(every, "strength", plan={"strength": 0.6}, steps=several)
    churn = {"s_churn": 10.0, "s_tmin": 0.2, "s_tmax": 30.0, "s_noise": 1.01}
    add(EDM[:1], "churn", plan=churn, step=churn)
    add(EDM[:1], "churn-v", {"prediction_type": "v_prediction"}, plan=churn, step=churn)
    for kind in ("dpmsolver++", "sde-dpmsolver++"):
        for order, solver in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")):
            config = {"algorithm_type": kind, "solver_order": order, "solver_type": solver}
            # diffusers does not implement the stochastic variant of order 3.
            if kind == "dpmsolver++" or order < 3:
                add(EDM[1:], f"{kind}-{order}-{solver}", config)
    for config in ({"solver_order": 1}, {"solver_type": "heun"}):
        add((COSINE,), f"{config}", config, steps=several)
    for label, config in {
        "not-lower-final": {"lower_order_final": False},
        "not-lower-final-sigma-min": {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
        "euler-at-final": {"euler_at_final": True, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
    }.items():
        add(multistep, label, config, steps=several)
    threshold = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}
    add(EDM[1:], "threshold", threshold)
    return out


def _karras_ve() -> list[Case]:
    several = STEPS[1:]  # diffusers divides by the number of steps less one
    configs = {
        "plain": {},
        "churn-from-the-start": {"s_max": 200.0, "s_churn": 2.0},
        "range": {"sigma_min": 0.1, "sigma_max": 30.0, "s_noise": 1.0, "s_min": 0.3, "s_max": 10.0},
        "no-churn": {"s_churn": 0.0},
    }
    name, published = "KarrasVeScheduler", {"as_published": True}
    loop = functools.partial(_karras_ve_loop, published=True)
    # diffusers' levels are squares: with the ranges above, what the harness has for a network overflows float32.
    narrow = {"sigma_min": 0.1, "sigma_max": 1.5, "s_min": 0.05, "s_max": 1.7}
    own = {
        "narrow": narrow,
        "churn-from-the-start": narrow | {"s_max": 5.0, "s_churn": 2.0},
        "narrow-no-churn": narrow | {"s_churn": 0.0, "s_noise": 1.0},
    }
    return [
        *(Case(name, k, v, steps=several, loop=_karras_ve_loop) for k, v in own.items()),
        *(Case(name, f"{k}-published", v, published, steps=several, loop=loop) for k, v in configs.items()),
    ]


def _karras_ve_loop(theirs: Theirs, published: bool = False) -> list[Any]:
    """Algorithm 2 with diffusers' methods. The paper's levels are the roots of diffusers' levels, and its networks
    predict the noise where diffusers' predict minus the noise.

    The noise before the first step is part of the first sample here, so none is drawn for it.
    """
    scheduler, samples, noise = theirs.scheduler, [], iter(theirs.noise)
    schedule = scheduler.schedule.sqrt() if published else scheduler.schedule
    network = (lambda x, t: -theirs.network(x, t)) if published else theirs.network
    first = scheduler.add_noise_to_input
    theirs.drawn = theirs.start / scheduler.init_noise_sigma
    raised = first(0 * theirs.start, schedule[-1])[0]
    x, theirs.drawn = (theirs.start**2 + raised**2).sqrt() * theirs.start.sign(), 0 * theirs.start
    for t in theirs.timesteps.tolist():
        sigma, target = schedule[t], schedule[t - 1] if t else 0 * schedule[0]
        x_hat, sigma_hat = scheduler.add_noise_to_input(x, sigma)
        samples.append(x_hat)
        step = scheduler.step(network(x_hat, sigma_hat), sigma_hat, target, x_hat)
        next(noise)
        if target:
            samples.append(step.prev_sample)
            out = network(step.prev_sample, target)
            step = scheduler.step_correct(out, sigma_hat, target, x_hat, step.prev_sample, step.derivative)
            theirs.drawn = next(noise)
        x = step.prev_sample
    return [*samples, x]


def _consistency() -> list[Case]:
    few = (1, 2, 3, 5, 10, 20, 40)  # networks are trained with 40
    name = "CMStochasticIterativeScheduler"
    configs = {
        "plain": {},
        "not-clipped": {"clip_denoised": False},
        "range": {"sigma_min": 0.01, "sigma_max": 40.0, "sigma_data": 0.7, "rho": 5.0},
        "noise": {"s_noise": 1.2},
    }
    out = [Case(name, label, config, steps=few) for label, config in configs.items()]
    out.append(Case(name, "999-train-steps", {"num_train_timesteps": 999}))
    # Without the highest level, diffusers starts with more noise than the first one has.
    for places in ([39, 12, 0], [17, 0]):
        out.append(Case(name, f"explicit-{places}", {}, plan={"timesteps": places}, steps=(0,)))
    out.append(Case(name, "strength", {}, plan={"strength": 0.6}, steps=few[1:]))
    return out


FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")


def _flow() -> list[Case]:
    out: list[Case] = []

    def add(names: tuple[str, ...], label: str, config: dict[str, Any] | None = None, **rest: Any) -> None:
        out.extend(Case(name, label, config or {}, **rest) for name in names)

    every = (*FLOW, "FlowMatchHeunDiscreteScheduler")
    several = STEPS[1:]
    add(every, "plain")
    for shift in (0.5, 3.0):
        add(every, f"shift-{shift:g}", {"shift": shift})
    add(every, "500-train-steps", {"num_train_timesteps": 500, "shift": 2.0})
    add(every, "strength", {"shift": 3.0}, plan={"strength": 0.6}, steps=several)
    dynamic = {"use_dynamic_shifting": True, "shift": 3.0}
    add(FLOW, "dynamic", dynamic, plan={"mu": 1.15})
    add(FLOW, "dynamic-linear", dynamic | {"time_shift_type": "linear"}, plan={"mu": 2.3})
    # A single step at pure noise cannot be stretched; diffusers divides zero by zero.
    add(FLOW, "terminal", {"shift_terminal": 0.1, "shift": 3.0}, steps=several)
    add(FLOW, "terminal-dynamic", dynamic | {"shift_terminal": 0.02}, plan={"mu": 0.8}, steps=several)
    for flag in SPACINGS:
        add(FLOW, flag, {flag: True})
        add(FLOW, f"{flag}-shift", {flag: True, "shift": 3.0, "shift_terminal": 0.05}, steps=several)
    # With stochastic sampling, diffusers reads the outputs of such networks as if time ran the other way.
    add(FLOW[:1], "inverted", {"invert_sigmas": True})
    add(FLOW[:1], "inverted-shift", {"invert_sigmas": True, "shift": 3.0})
    add(FLOW[:1], "stochastic", {"stochastic_sampling": True})
    add(FLOW[:1], "stochastic-dynamic", dynamic | {"stochastic_sampling": True}, plan={"mu": 1.15})
    sigmas = [1.0, 0.9, 0.75, 0.5, 0.2, 0.1]
    add(FLOW, "explicit-sigmas", plan={"sigmas": sigmas}, steps=(0,))
    add(FLOW, "explicit-sigmas-shift", {"shift": 3.0, "shift_terminal": 0.1}, plan={"sigmas": sigmas}, steps=(0,))
    add(FLOW, "explicit-sigmas-dynamic", dynamic, plan={"sigmas": sigmas, "mu": 1.0}, steps=(0,))
    add(FLOW, "explicit-sigmas-karras", {"use_karras_sigmas": True}, plan={"sigmas": sigmas}, steps=(0,))
    add(FLOW, "explicit-timesteps", plan={"timesteps": [1000.0, 870.5, 600.0, 250.0]}, steps=(0,))
    return out


def _ipndm() -> list[Case]:
    betas = tuple(float(b) for b in (1.0, 0.97, 0.9, 0.7, 0.4, 0.1, 0.0))
    trained = {"trained_betas": betas, "num_train_timesteps": len(betas)}
    name = "IPNDMScheduler"
    few, published = (len(betas) - 1,), {"as_published": True}
    return [
        Case(name, "plain", {}),
        Case(name, "trained-betas", trained, steps=few),
        Case(name, "published", {}, published, loop=_from_pure_noise),
        Case(name, "trained-betas-published", trained, published, steps=few, loop=_from_pure_noise),
    ]


def _from_pure_noise(theirs: Theirs) -> list[Any]:
    """diffusers takes the clean sample in pure noise as 0; here the network predicts it, and the rest is the same."""
    samples, scheduler = [theirs.start], theirs.scheduler
    for t in theirs.timesteps:
        out = theirs.network(samples[-1], t)
        sample = scheduler.step(out, t, samples[-1]).prev_sample
        if len(samples) == 1:
            sample = scheduler.betas[1] * theirs.start - scheduler.alphas[1] * out
        samples.append(sample)
    return samples
