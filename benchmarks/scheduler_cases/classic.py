"""All options of the samplers of the first releases: DDIM, DDPM, PNDM, Euler, DPM-Solver++, UniPC, LCM."""

from __future__ import annotations

from typing import Any

from benchmarks.scheduler_cases.case import SD, STEPS, TRAINED_BETAS, Case

VP, VE = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler"), ("EulerDiscreteScheduler",)
MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
ANCESTRAL = ("EulerAncestralDiscreteScheduler",)
ALL = (*VP, *VE, *ANCESTRAL, *MULTISTEP)
ZERO_SNR = tuple(name for name in ALL if name != "PNDMScheduler")
CORRECTING = ("DDIMScheduler", "DDPMScheduler", "LCMScheduler", *MULTISTEP)


def cases() -> list[Case]:
    """Every option of every scheduler, one or a few at a time on top of Stable Diffusion's training schedule."""
    out: list[Case] = []

    def add(
        names: tuple[str, ...],
        label: str,
        config: dict[str, Any] | None = None,
        steps: tuple[int, ...] = STEPS,
        **rest: Any,
    ) -> None:
        for name in names:
            # Steps cannot outnumber the training timesteps, or those of the distillation for LCM.
            most = 50 if name == "LCMScheduler" else (config or {}).get("num_train_timesteps", 1000)
            rest["steps"] = tuple(n for n in steps if n <= most)
            clip = {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {}
            plms = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
            out.append(Case(name, label, SD | clip | plms | (config or {}), **rest))

    add(ALL, "plain")
    add(ALL, "v", {"prediction_type": "v_prediction"})
    add((*(n for n in VP if n != "PNDMScheduler"), *VE, *MULTISTEP), "sample", {"prediction_type": "sample"})
    for spacing in ("leading", "linspace", "trailing"):
        add(ALL, spacing, {"timestep_spacing": spacing})
    offset = {"timestep_spacing": "leading", "steps_offset": 1}
    add(tuple(n for n in ALL if n not in MULTISTEP), "offset", offset)
    # The timesteps of multistep samplers reach the last training timestep even without an offset.
    add(MULTISTEP, "offset", offset, steps=STEPS[:-1])
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
    add(("PNDMScheduler",), "runge-kutta", {"skip_prk_steps": False}, steps=STEPS[3:])
    add(
        ("PNDMScheduler",),
        "runge-kutta-v",
        {"skip_prk_steps": False, "prediction_type": "v_prediction"},
        steps=STEPS[3:],
    )
    add(("LCMScheduler",), "scaling", {"timestep_scaling": 1.0})

    for flag in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        add((*VE, *MULTISTEP), flag, {flag: True})
    add((*VE, *MULTISTEP), "sigma-min-last", {"final_sigmas_type": "sigma_min"})
    karras_min = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}
    add((*VE, "DPMSolverMultistepScheduler"), "karras-sigma-min-last", karras_min)
    # With one step diffusers stays at the first sigma.
    add(("UniPCMultistepScheduler",), "karras-sigma-min-last", karras_min, steps=STEPS[1:])
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
        add(dpm, f"lambda-clipped-{spacing}", clipped, steps=STEPS[:-1])

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
    add(tuple(n for n in ALL if n != "LCMScheduler"), "strength", plan={"strength": 0.6}, steps=STEPS[1:])
    add(("LCMScheduler",), "strength", plan={"strength": 0.6}, steps=(5, 20))
    add(dpm, "strength-3", {"solver_order": 3}, plan={"strength": 0.6}, steps=STEPS[1:])
    add(unipc, "strength-3", {"solver_order": 3}, plan={"strength": 0.6}, steps=STEPS[1:])
    return out
