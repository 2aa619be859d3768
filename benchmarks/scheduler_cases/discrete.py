"""Samplers that live on training timesteps, and those with a process of their own: every option of theirs."""

from __future__ import annotations

from typing import Any

from benchmarks.scheduler_cases.case import SD, STEPS, Case

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
THRESHOLD = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}
TIMESTEPS = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]


def cases() -> list[Case]:
    """Every option of every scheduler of the family."""
    return [*_inverse(), *_parallel(), *_ddpm()]


def _inverse() -> list[Case]:
    def case(label: str, config: dict[str, Any] | None = None, **rest: Any) -> Case:
        return Case("DDIMInverseScheduler", label, SD | {"clip_sample": False} | (config or {}), **rest)

    early = {"set_alpha_to_one": False}
    configs = {
        "plain": {},
        "v": {"prediction_type": "v_prediction"},
        # A network that predicts the clean sample cannot start from a clean one; diffusers divides by zero.
        "sample": early | {"prediction_type": "sample"},
        "alpha-to-one-off": early,
        "leading": {"timestep_spacing": "leading"},
        "trailing": {"timestep_spacing": "trailing"},
        "offset": {"steps_offset": 1},
        "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        "cosine": COSINE,
        "zero-snr": ZERO_SNR,
    }
    own = [case(label, config) for label, config in configs.items()]
    own.append(case("500-train-steps", {"num_train_timesteps": 500}, steps=STEPS[:-1]))
    # On the way to noise samples leave the range of pictures; 999 float32 steps on the edge of the clip add up to 6e-5.
    for limit in (1.0, 2.0):
        own.append(case(f"clip-{limit:g}", {"clip_sample": True, "clip_sample_range": limit}, steps=STEPS[:-1]))
    return [*own, case("strength", plan={"strength": 0.6}, steps=STEPS[1:])]


def _parallel() -> list[Case]:
    out = []
    for name in ("DDIMParallelScheduler", "DDPMParallelScheduler"):
        for prediction in PREDICTIONS:
            out.append(Case(name, prediction, SD | {"clip_sample": False, "prediction_type": prediction}))
        for spacing in SPACINGS:
            out.append(Case(name, spacing, SD | {"timestep_spacing": spacing}))
        out.append(Case(name, "threshold", SD | THRESHOLD))
        out.append(Case(name, "strength", SD, plan={"strength": 0.6}, steps=STEPS[1:]))
    out.append(Case("DDIMParallelScheduler", "eta-1", SD, plan={"eta": 1.0}, step={"eta": 1.0}))
    out.append(Case("DDPMParallelScheduler", "learned-range", SD | {"variance_type": "learned_range"}))
    out.append(Case("DDPMParallelScheduler", "explicit-timesteps", SD, plan={"timesteps": TIMESTEPS}, steps=(0,)))
    return out


def _ddpm() -> list[Case]:
    """What the classic family leaves out of DDPM."""
    name, out = "DDPMScheduler", []
    variances = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range")
    for kind in variances:
        for spacing in SPACINGS:
            config = {"variance_type": kind, "timestep_spacing": spacing, "clip_sample": False}
            out.append(Case(name, f"{kind}-{spacing}", SD | config))
        for prediction in PREDICTIONS[1:]:
            config = {"variance_type": kind, "prediction_type": prediction, "clip_sample": False}
            out.append(Case(name, f"{kind}-{prediction}", SD | config))
        config = {"variance_type": kind}
        out.append(Case(name, f"{kind}-explicit-timesteps", SD | config, plan={"timesteps": TIMESTEPS}, steps=(0,)))
    out.append(Case(name, "laplace", SD | {"beta_schedule": "laplace"}))
    out.append(Case(name, "learned-clip", SD | {"variance_type": "learned", "clip_sample_range": 2.0}))
    out.append(Case(name, "learned-range-threshold", SD | THRESHOLD | {"variance_type": "learned_range"}))
    return out
