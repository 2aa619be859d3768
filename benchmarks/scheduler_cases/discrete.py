"""All options of samplers defined on training timesteps, and of those with another diffusion process."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from benchmarks.scheduler_cases.case import SD, STEPS, Case, Theirs

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
THRESHOLD = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}
TIMESTEPS = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]


def cases() -> list[Case]:
    """Every option of every scheduler of the family."""
    return [
        *_inverse(),
        *_parallel(),
        *_ddpm(),
        *_wuerstchen(),
        *_unclip(),
        *_repaint(),
        *_score_sde(),
        *_consistency_decoder(),
    ]


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
    out = [case(label, config) for label, config in configs.items()]
    out.append(case("500-train-steps", {"num_train_timesteps": 500}, steps=STEPS[:-1]))
    # Towards noise, samples leave the range of images; 999 float32 steps at the edge of the clip add up to 6e-5.
    for limit in (1.0, 2.0):
        out.append(case(f"clip-{limit:g}", {"clip_sample": True, "clip_sample_range": limit}, steps=STEPS[:-1]))
    return [*out, case("strength", plan={"strength": 0.6}, steps=STEPS[1:])]


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
    """DDPM options that the classic family leaves out."""
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


def _wuerstchen() -> list[Case]:
    def loop(theirs: Theirs) -> list[Any]:
        """The scheduler needs a timestep for every sample; the last one is where the run ends."""
        samples = [theirs.start]
        for t, noise in zip(theirs.timesteps[:-1], theirs.noise, strict=False):
            theirs.drawn, out = noise, theirs.network(samples[-1], t)
            samples.append(theirs.scheduler.step(out, t.expand(len(out)), samples[-1]).prev_sample)
        return samples

    def case(label: str, config: dict[str, Any], **rest: Any) -> Case:
        return Case("DDPMWuerstchenScheduler", label, config, loop=loop, **rest)

    # The timesteps of the published pipelines: most steps at high noise.
    stage_c = [*np.linspace(1.0, 2 / 3, 20), *np.linspace(2 / 3, 0.0, 11)[1:]]
    return [
        case("plain", {}),
        case("scaler-above-1", {"scaler": 1.7}),
        case("scaler-below-1", {"scaler": 0.6}),
        case("s", {"s": 0.03}),
        case("explicit-timesteps", {}, plan={"timesteps": [float(t) for t in stage_c]}, steps=(0,)),
    ]


def _unclip() -> list[Case]:
    def loop(theirs: Theirs) -> list[Any]:
        """As in the pipelines: every step is passed the next timestep, the last one None."""
        samples, after = [theirs.start], [*theirs.timesteps[1:], None]
        for t, previous, noise in zip(theirs.timesteps, after, theirs.noise, strict=False):
            theirs.drawn, out = noise, theirs.network(samples[-1], t)
            samples.append(theirs.scheduler.step(out, t, samples[-1], prev_timestep=previous).prev_sample)
        return samples

    configs = {
        "plain": {},
        "not-clipped": {"clip_sample": False},
        "prior": {"clip_sample_range": 5.0, "prediction_type": "sample"},
        "learned-range": {"variance_type": "learned_range"},
        "learned-range-not-clipped": {"variance_type": "learned_range", "clip_sample": False},
    }
    # One step: diffusers divides by zero.
    out = [Case("UnCLIPScheduler", label, config, loop=loop, steps=STEPS[1:]) for label, config in configs.items()]
    few = {"num_train_timesteps": 500}
    return [*out, Case("UnCLIPScheduler", "500-train-steps", few, loop=loop, steps=STEPS[1:-1])]


def _repaint() -> list[Case]:
    def case(label: str, config: dict[str, Any], jumps: tuple[int, int] = (10, 10), **rest: Any) -> Case:
        plan = {"jump_length": jumps[0], "jump_n_sample": jumps[1]}
        # Jumps of 10 steps, ten times each, make 9819 evaluations of 999 steps.
        steps = rest.pop("steps", STEPS if jumps[1] <= 2 else STEPS[:-1])
        own = rest.pop("plan", {})
        loop = functools.partial(repaint_loop, published=bool(own))
        return Case("RePaintScheduler", label, SD | config, plan=plan | own, loop=loop, steps=steps, **rest)

    few, cut = (3, 2), {"clip_sample": False}
    out = [case("plain", {}), case("ancestral", {"eta": 1.0}), case("some-noise", {"eta": 0.4})]
    out += [
        case(f"jumps-{length}-{count}", cut | {"eta": 0.7}, (length, count))
        for length, count in ((1, 3), (2, 4), (7, 2))
    ]
    published = {"as_published": True}
    out += [case("published", {"eta": 0.4}, plan=published), case("published-2-4", cut, (2, 4), plan=published)]
    out += [case(f"not-clipped-eta-{eta:g}", cut | {"eta": eta}, few) for eta in (0.0, 0.5, 1.0)]
    for schedule in ("linear", "squaredcos_cap_v2", "sigmoid"):
        betas = {"beta_schedule": schedule, "beta_start": 0.0001, "beta_end": 0.02}
        out.append(case(schedule, betas | {"eta": 1.0}, few))
    out.append(case("every-training-step", {"num_train_timesteps": 50, "eta": 1.0, "beta_end": 0.1}, steps=(50,)))
    return out


def repaint_loop(theirs: Theirs, published: bool = False) -> list[Any]:
    """As the pipeline of diffusers with nothing known of the image; its many draws add up to our one for each row.

    A jump is one training step after the other. With ``published`` it begins where the step down has led, and so ends
    at the level of the timestep that the network is told next; diffusers' begins later by one less than the training
    steps in a step.
    """
    scheduler, samples, steps = theirs.scheduler, [theirs.start], [int(t) for t in theirs.timesteps]
    n, train = scheduler.num_inference_steps, len(scheduler.betas)
    k = 0
    for noise in theirs.noise:
        now, up = steps[k], []
        while k + 1 < len(steps) and steps[k + 1] > steps[k]:
            early = train // n - 1 if published else 0
            up += range(max(0, steps[k] - early), steps[k] - early + train // n)
            k += 1
        std = scheduler.eta * scheduler._get_variance(now) ** 0.5
        theirs.drawn = iter(_parts(noise, std, [float(scheduler.betas[j]) for j in up]))
        x, nothing = samples[-1], torch.zeros_like(samples[-1])
        x = scheduler.step(theirs.network(x, now), now, x, nothing, nothing).prev_sample
        scheduler.num_inference_steps = train  # undo_step then makes one training step
        for j in up:
            x = scheduler.undo_step(x, j)
        scheduler.num_inference_steps = n
        samples.append(x)
        k += 1
        if k == len(steps):
            break
    return samples


def _parts(noise: Any, std: Any, betas: list[float]) -> Any:
    """Independent-looking draws whose sum, weighted as steps with these betas weight them, is that of ``noise``."""
    after = np.sqrt(np.cumprod([1.0, *(1 - np.array(betas[::-1]))]))[::-1]
    weights = torch.tensor([float(std) * after[0], *np.sqrt(betas) * after[1:]], dtype=noise.dtype)
    others = torch.randn(len(weights), *noise.shape, generator=torch.Generator().manual_seed(0), dtype=noise.dtype)
    direction = weights / weights.norm().clamp(min=1e-30)
    return others + direction[:, None, None, None, None] * (noise - torch.tensordot(direction, others, 1))


def _score_sde() -> list[Case]:
    """The predictors; pipelines keep the mean of the last step. The corrector has its own test, as it is no table."""

    def loop(theirs: Theirs) -> list[Any]:
        scheduler, samples, levels = theirs.scheduler, [theirs.start], theirs.timesteps
        if hasattr(scheduler, "set_sigmas"):
            scheduler.set_sigmas(len(levels))
            levels = scheduler.sigmas
        for t, sigma, noise in zip(theirs.timesteps, levels, theirs.noise, strict=False):
            theirs.drawn, out = noise, theirs.network(samples[-1], sigma)
            order = (out, samples[-1], t) if levels is theirs.timesteps else (out, t, samples[-1])
            step = scheduler.step_pred(*order)
            x, mean = step if isinstance(step, tuple) else (step.prev_sample, step.prev_sample_mean)
            samples.append(mean if len(samples) == len(levels) else x)
        return samples

    vp, ve = "ScoreSdeVpScheduler", "ScoreSdeVeScheduler"
    # The function in place of a network is no score at sigma 1348: with that range, runs would diverge.
    narrow = {"sigma_max": 1.5, "sigma_min": 0.02}
    return [
        Case(vp, "plain", {}, loop=loop),
        Case(vp, "betas", {"beta_min": 0.3, "beta_max": 12}, loop=loop),
        Case(vp, "sampling-eps", {"sampling_eps": 0.05}, loop=loop),
        # With one step diffusers starts at sigma_max and steps from sigma_min.
        Case(ve, "narrow", narrow, loop=loop, steps=STEPS[1:]),
        Case(ve, "sampling-eps", narrow | {"sampling_eps": 1e-4}, loop=loop, steps=STEPS[1:]),
    ]


def _consistency_decoder() -> list[Case]:
    name = "ConsistencyDecoderScheduler"
    return [Case(name, f"sigma-data-{s:g}", {"sigma_data": s}, steps=(2,)) for s in (0.5, 0.9)]
