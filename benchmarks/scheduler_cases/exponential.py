"""Exponential integrators beyond the classic ones, SA-Solver, TCD and the options of the newest release."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from benchmarks.scheduler_cases.case import SD, STEPS, TRAINED_BETAS, Case, Theirs
from diffuse_jax.schedulers import Scheduler

DEIS, INVERSE = "DEISMultistepScheduler", "DPMSolverMultistepInverseScheduler"
SINGLE, SA = "DPMSolverSinglestepScheduler", "SASolverScheduler"
TCD, LCM = "TCDScheduler", "LCMScheduler"
MULTI, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"

MOST = STEPS[:-1]
"""Without 999 steps: more than there are timesteps, or too many for published formulas (order 3 of DEIS and order 4
of SA-Solver lose eight digits to cancellation there)."""


def cases() -> list[Case]:
    """Every option of every scheduler, one or a few at a time on top of Stable Diffusion's training schedule."""
    return [*_common(), *_deis(), *_inverse(), *_single(), *_sa(), *_consistency(), *_flow(), *_classic()]


def _case(name: str, label: str, config: dict[str, Any] | None = None, **rest: Any) -> Case:
    return Case(name, label, SD | (config or {}), **rest)


def _common() -> list[Case]:
    """Options that all of them share."""
    out: list[Case] = []
    for name in (DEIS, INVERSE, SINGLE, SA):

        def add(label: str, config: dict[str, Any] | None = None, name: str = name, **rest: Any) -> None:
            out.append(_case(name, label, config, **rest))

        add("plain")
        for prediction in ("v_prediction", "sample"):
            add(prediction, {"prediction_type": prediction})
        if name != SINGLE:
            for spacing in ("leading", "linspace", "trailing"):
                add(spacing, {"timestep_spacing": spacing})
            add("offset", {"timestep_spacing": "leading", "steps_offset": 1}, steps=MOST)
        for schedule in ("linear", "squaredcos_cap_v2"):
            add(schedule, {"beta_schedule": schedule, "beta_start": 0.0001, "beta_end": 0.02})
        add("trained-betas", {"trained_betas": TRAINED_BETAS})
        add("500-train-steps", {"num_train_timesteps": 500, "beta_start": 0.0017, "beta_end": 0.024}, steps=MOST)
        add("threshold", {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9})
        for flag in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
            # With one step diffusers stays at the first sigma; its inverse sampler drops steps of equal timesteps.
            add(flag, {flag: True}, steps=(2, 3, 5, 10) if name == INVERSE else STEPS[1:])
        add("strength", plan={"strength": 0.6}, steps=STEPS[1:])
    return out


def _deis() -> list[Case]:
    out = []
    for order in (1, 2, 3):
        steps, several = (STEPS, STEPS[1:]) if order < 3 else (MOST, MOST[1:])
        config = {"solver_order": order}
        out.append(_case(DEIS, f"order-{order}", config, steps=steps))
        out.append(_case(DEIS, f"strength-{order}", config, plan={"strength": 0.6}, steps=several))
        out.append(_case(DEIS, f"not-lower-final-{order}", config | {"lower_order_final": False}, steps=steps))
        out.append(_case(DEIS, f"karras-{order}", config | {"use_karras_sigmas": True}, steps=several))
    return out


def _inverse() -> list[Case]:
    out = []
    for order in (1, 2, 3):
        for kind in ("dpmsolver++", "dpmsolver"):
            for solver in ("midpoint", "heun"):
                config = {"algorithm_type": kind, "solver_order": order, "solver_type": solver}
                out.append(_case(INVERSE, f"{kind}-{order}-{solver}", config))
        config = {"solver_order": order, "lower_order_final": False}
        out.append(_case(INVERSE, f"not-lower-final-{order}", config))
        out.append(_case(INVERSE, f"euler-at-final-{order}", config | {"euler_at_final": True}))
        out.append(_case(INVERSE, f"strength-{order}", config, plan={"strength": 0.6}, steps=STEPS[1:]))
        # The last step stays where it is; with a higher order there diffusers divides zero by zero.
        karras = {"solver_order": order, "use_karras_sigmas": True}
        out.append(_case(INVERSE, f"karras-{order}", karras, steps=(2, 3, 5, 10)))
    noise = {"algorithm_type": "dpmsolver", "thresholding": True, "sample_max_value": 1.5}
    out.append(_case(INVERSE, "dpmsolver-threshold", noise))
    for prediction in ("v_prediction", "sample"):
        config = {"algorithm_type": "dpmsolver", "prediction_type": prediction}
        out.append(_case(INVERSE, f"dpmsolver-{prediction}", config))
    for variance in ("learned", "learned_range"):
        out.append(_case(INVERSE, variance, {"variance_type": variance}))
    for spacing in ("leading", "linspace", "trailing"):
        config = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "timestep_spacing": spacing}
        out.append(_case(INVERSE, f"lambda-clipped-{spacing}", config, steps=MOST))
    return out


def _single() -> list[Case]:
    out = []
    for order in (1, 2, 3):
        for kind in ("dpmsolver++", "sde-dpmsolver++", "dpmsolver"):
            for solver in ("midpoint", "heun"):
                last = "zero" if kind.endswith("++") else "sigma_min"
                config = {"algorithm_type": kind, "solver_order": order, "solver_type": solver}
                # A wrong sign makes the weight of the second derivative -1 instead of 0, which amplifies rounding.
                unstable = (kind, order, solver) == ("sde-dpmsolver++", 3, "heun")
                steps = STEPS[:5] if unstable else STEPS
                config["final_sigmas_type"] = last
                out.append(_case(SINGLE, f"{kind}-{order}-{solver}", config, steps=steps))
        config = {"solver_order": order, "final_sigmas_type": "sigma_min"}
        out.append(_case(SINGLE, f"sigma-min-{order}", config))
        out.append(_case(SINGLE, f"lower-final-{order}", config | {"lower_order_final": True}))
        out.append(_case(SINGLE, f"karras-{order}", config | {"use_karras_sigmas": True}))
        out.append(_case(SINGLE, f"strength-{order}", {"solver_order": order}, plan={"strength": 0.6}, steps=STEPS[1:]))
    for prediction in ("v_prediction", "sample"):
        config = {"algorithm_type": "dpmsolver", "prediction_type": prediction, "final_sigmas_type": "sigma_min"}
        out.append(_case(SINGLE, f"dpmsolver-{prediction}", config))
    for variance in ("learned", "learned_range"):
        out.append(_case(SINGLE, variance, {"variance_type": variance}))
    config = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}
    out.append(_case(SINGLE, "lambda-clipped", config, steps=MOST))
    timesteps = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    out.append(_case(SINGLE, "explicit-timesteps", {"solver_order": 3}, plan={"timesteps": timesteps}, steps=(0,)))
    return out


def _sa() -> list[Case]:
    out = []
    for kind in ("data_prediction", "noise_prediction"):
        for orders in ((1, 1), (1, 2), (2, 1), (3, 3), (3, 2), (2, 4), (4, 4)):
            config = {"algorithm_type": kind, "predictor_order": orders[0], "corrector_order": orders[1]}
            steps, label = STEPS if max(orders) < 4 else MOST, f"{kind}-{orders[0]}-{orders[1]}"
            out.append(_case(SA, label, config, steps=steps))
            out.append(_case(SA, f"{label}-not-lower", config | {"lower_order_final": False}, steps=steps))
        for label, tau in {"ode": lambda t: 0.0, "sde": lambda t: 1.0, "varied": lambda t: 0.3 + t / 1000}.items():
            config = {"algorithm_type": kind, "predictor_order": 3, "corrector_order": 3}
            out.append(_case(SA, f"{kind}-{label}", config, plan={"tau": tau}, loop=_with_tau(tau)))
        config["predictor_order"] = 4
        out.append(_case(SA, f"{kind}-strength", config, plan={"strength": 0.6}, steps=MOST[1:]))
    for prediction in ("v_prediction", "sample"):
        config = {"algorithm_type": "noise_prediction", "prediction_type": prediction}
        out.append(_case(SA, f"noise-{prediction}", config))
    for variance in ("learned", "learned_range"):
        out.append(_case(SA, variance, {"variance_type": variance}))
    for spacing in ("leading", "linspace", "trailing"):
        config = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "timestep_spacing": spacing}
        out.append(_case(SA, f"lambda-clipped-{spacing}", config, steps=MOST))
    return out


def _consistency() -> list[Case]:
    """At most 50 steps, as in the distillation."""
    out = []
    for prediction in ("epsilon", "v_prediction", "sample"):
        for eta in (0.0, 0.3, 1.0):
            option, config = {"eta": eta}, {"prediction_type": prediction}
            out.append(_case(TCD, f"{prediction}-{eta}", config, plan=option, step=option, steps=MOST))
    for schedule in ("linear", "squaredcos_cap_v2"):
        config = {"beta_schedule": schedule, "beta_start": 0.0001, "beta_end": 0.02}
        out.append(_case(TCD, schedule, config, steps=MOST))
    out.append(_case(TCD, "trained-betas", {"trained_betas": TRAINED_BETAS}, steps=MOST))
    zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    out.append(_case(TCD, "zero-snr", zero_snr, steps=MOST))
    config = {"num_train_timesteps": 500, "beta_start": 0.0017, "beta_end": 0.024}
    out.append(_case(TCD, "500-train-steps", config, steps=MOST))
    for name in (TCD, LCM):
        config = {"original_inference_steps": 100}
        out.append(_case(name, "original-100-config", config, steps=MOST))
        out.append(_case(name, "original-70", plan={"original_inference_steps": 70}, steps=MOST))
        for strength in (0.5, 0.8):
            out.append(_case(name, f"strength-{strength}", plan={"strength": strength}, steps=MOST[1:-1]))
        timesteps = [999, 759, 520, 499, 259, 3]
        # LCM of diffusers adds noise after the last step of a custom list if the run starts late in it.
        for strength in (1.0, 0.5) if name == TCD else (1.0,):
            plan = {"timesteps": timesteps, "strength": strength}
            out.append(_case(name, f"explicit-{strength}", plan=plan, steps=(0,)))
    return out


def _classic() -> list[Case]:
    """Later options of the multistep samplers of the first releases."""
    out = []
    for variance in ("learned", "learned_range"):
        for kind, last in {"dpmsolver++": "zero", "sde-dpmsolver++": "zero", "dpmsolver": "sigma_min"}.items():
            config = {"variance_type": variance, "algorithm_type": kind, "final_sigmas_type": last}
            out.append(_case(MULTI, f"{variance}-{kind}", config))
    for flag in ("use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas", "use_karras_sigmas"):
        for order in (1, 3):
            config = {flag: True, "solver_order": order, "final_sigmas_type": "sigma_min", "euler_at_final": True}
            out.append(_case(MULTI, f"{flag}-{order}-sigma-min", config))
            sde = {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}
            out.append(_case(MULTI, f"{flag}-{order}-sde", {flag: True, "solver_order": order} | sde))
    cosine = {"use_lu_lambdas": True, "beta_schedule": "squaredcos_cap_v2"}
    out.append(_case(MULTI, "lu-cosine", cosine))
    for flag in ("use_exponential_sigmas", "use_beta_sigmas", "use_karras_sigmas"):
        config = {flag: True, "sigma_min": 0.1, "sigma_max": 9.0, "solver_order": 3}
        out.append(_case(UNIPC, f"{flag}-range", config))
        config = config | {"final_sigmas_type": "sigma_min"}
        out.append(_case(UNIPC, f"{flag}-range-sigma-min", config, steps=STEPS[1:]))
        out.append(_case(UNIPC, f"{flag}-strength", {flag: True}, plan={"strength": 0.6}, steps=STEPS[1:]))
    predictors: dict[str, tuple[str, int, dict[str, Any]]] = {
        "dpm-2": (MULTI, 2, {"solver_order": 2}),
        "dpm-3": (MULTI, 2, {"solver_order": 3}),
        "sde": (MULTI, 2, {"algorithm_type": "sde-dpmsolver++"}),
        "dpm-1": (MULTI, 3, {"solver_order": 1}),
        "single": (SINGLE, 1, {"solver_order": 3}),
    }
    for label, (name, order, config) in predictors.items():
        plan = {"solver_p": Scheduler.from_config({"_class_name": name} | SD | config)}
        loop = _with_predictor(name, config)
        out.append(_case(UNIPC, f"predictor-{label}", {"solver_order": order}, plan=plan, loop=loop))
    return out


def _with_predictor(name: str, config: dict[str, Any]) -> Callable[[Theirs], list[Any]]:
    def loop(theirs: Theirs) -> list[Any]:
        import torch

        from benchmarks.scheduler_cases.torch_side import patched, torch_class

        cls = torch_class(name)
        double = theirs.start.dtype == torch.float64
        with patched(importlib.import_module(cls.__module__), theirs.draw, double=double):
            theirs.scheduler.solver_p = cls(**SD, **config)
            theirs.scheduler.solver_p.set_timesteps(len(theirs.scheduler.timesteps))
            return _run(theirs)

    return loop


def _flow() -> list[Case]:
    """Noise levels of flow matching; diffusers converts such outputs only to clean samples, not to noise."""
    out = []
    plain = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}

    def add(name: str, label: str, config: dict[str, Any], final: float | None = None, **rest: Any) -> None:
        rest |= {} if final is None else {"loop": _ending_at(final)}
        out.append(_case(name, f"flow-{label}", plain | config, **rest))

    first = 0.001
    for name in (MULTI, SINGLE, UNIPC):
        dynamic = {"use_dynamic_shifting": True}
        for order in (1, 2, 3):
            add(name, f"{order}", {"solver_order": order})
            add(name, f"shift-{order}", {"solver_order": order, "flow_shift": 3.0})
        add(name, "strength", {"flow_shift": 3.0}, plan={"strength": 0.6}, steps=STEPS[1:])
        add(name, "dynamic", dynamic, plan={"mu": 0.8})
        add(name, "500-train-steps", {"num_train_timesteps": 500}, steps=MOST)
        add(name, "threshold", {"thresholding": True, "sample_max_value": 1.5})
        # diffusers ends at a level of the betas (DPM-Solver), not at that of the first training step.
        final = None if name == UNIPC else first
        few = MOST[1:] if name == UNIPC else MOST  # a single step of UniPC stays at pure noise
        add(name, "sigma-min", {"final_sigmas_type": "sigma_min"}, final, steps=few)
    for order in (1, 2, 3):
        add(MULTI, f"sde-{order}", {"algorithm_type": "sde-dpmsolver++", "solver_order": order})
        add(SINGLE, f"sde-{order}", {"algorithm_type": "sde-dpmsolver++", "solver_order": order})
        add(DEIS, f"{order}", {"solver_order": order, "flow_shift": 3.0}, steps=MOST)
        low = 3 * first / (1 + 2 * first)
        published = {"plan": {"as_published": True}, "steps": MOST}
        add(DEIS, f"{order}-published", {"solver_order": order, "flow_shift": 3.0}, low, **published)
        config = {"predictor_order": order, "corrector_order": order, "flow_shift": 3.0}
        add(SA, f"{order}", config, steps=MOST)
        add(SA, f"{order}-published", config, low, **published)
    add(UNIPC, "linear-dynamic", {"use_dynamic_shifting": True, "time_shift_type": "linear"}, plan={"mu": 2.5})
    add(UNIPC, "terminal", {"shift_terminal": 0.1, "flow_shift": 2.0}, steps=STEPS[1:])
    karras = {"use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 200.0}
    add(UNIPC, "karras", karras)
    add(UNIPC, "karras-sigma-min", karras | {"final_sigmas_type": "sigma_min"}, steps=STEPS[1:])
    return out


def _with_tau(tau: Callable[[float], float]) -> Callable[[Theirs], list[Any]]:
    def change(scheduler: Any) -> None:
        scheduler.tau_func = tau

    return _after(change)


def _ending_at(sigma: float) -> Callable[[Theirs], list[Any]]:
    def change(scheduler: Any) -> None:
        scheduler.sigmas[-1] = sigma

    return _after(change)


def _after(change: Callable[[Any], None]) -> Callable[[Theirs], list[Any]]:
    """The usual run of diffusers with a changed scheduler."""

    def loop(theirs: Theirs) -> list[Any]:
        change(theirs.scheduler)
        return _run(theirs)

    return loop


def _run(theirs: Theirs) -> list[Any]:
    samples = [theirs.start]
    for t, noise in zip(theirs.timesteps, theirs.noise, strict=False):
        theirs.drawn = noise
        out = theirs.network(samples[-1], t)
        samples.append(theirs.scheduler.step(out, t, samples[-1]).prev_sample)
    return samples
