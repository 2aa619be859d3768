"""Marker tensors: what a single file says about its noise schedule and latents that other tensors do not show.

======================================  =======================================================================
``v_pred`` (empty)                      the network predicts v, in a family that predicts noise
``ztsnr`` (empty)                       the noise schedule ends in pure noise (zero terminal SNR)
``edm_mean``, ``edm_std``               Playground 2.5: mean and standard deviation of the latents' channels; noise
                                        levels and preconditioning are those of EDM
``edm_vpred.sigma_max``, ``sigma_min``  CosXL: v in EDM's noise levels, and the largest and smallest of them
======================================  =======================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffuse_jax.errors import bad
from diffuse_jax.layouts.families import DDIM, EULER, PNDM, Family
from diffuse_jax.layouts.record import Configs

Tensors = Mapping[str, np.ndarray]

V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
LATENTS_MEAN, LATENTS_STD = "edm_mean", "edm_std"
SIGMA_MAX, SIGMA_MIN = "edm_vpred.sigma_max", "edm_vpred.sigma_min"

MARKERS = (V_PREDICTION, ZERO_SNR, LATENTS_MEAN, LATENTS_STD, SIGMA_MAX, SIGMA_MIN)

PLAYGROUND = {
    "_class_name": "EDMDPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "final_sigmas_type": "zero",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
    "solver_order": 2,
    "solver_type": "midpoint",
}
PLAYGROUND_VAE_SCALE = 0.5
COSXL_SIGMA_MIN = 0.002
COSXL = {
    "_class_name": "EDMEulerScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "sigma_data": 1.0,
    "sigma_min": COSXL_SIGMA_MIN,
    "sigma_schedule": "exponential",
}


class Marks(NamedTuple):
    """What a file's markers say.

    Attributes:
      scheduler: ``scheduler_config.json``.
      vae: values of the autoencoder's ``config.json``.
      options: values of ``model_index.json``, by name of the pipeline class that has them.
    """

    scheduler: dict[str, Any]
    vae: dict[str, Any] = {}  # noqa: RUF012
    options: Mapping[str, dict[str, Any]] = {}


def read_markers(path: Path, tensors: Tensors, family: Family, prediction_type: str | None, default: str) -> Marks:
    """What the markers of a file of this family say.

    Args:
      prediction_type: what the caller says, which replaces what the markers say; or None.
      default: the prediction type of a file without markers.

    Raises:
      WeightsError: markers of SDXL in a file of another family, or without a value that they need.
    """
    edm = [name for name in MARKERS[2:] if name in tensors]
    if edm and family.scheduler is not EULER:
        raise bad(path, f"has {edm[0]!r}, which marks files of Stable Diffusion XL, but is not one of them")
    asked = {} if prediction_type is None else {"prediction_type": prediction_type}
    if LATENTS_MEAN in edm or LATENTS_STD in edm:
        return Marks(PLAYGROUND | asked, _latents(path, tensors))
    if edm:
        sigmas = {name.rpartition(".")[2]: _numbers(path, tensors, name, 1)[0] for name in edm}
        if "sigma_max" not in sigmas:
            raise bad(path, f"has {SIGMA_MIN!r} but not {SIGMA_MAX!r}")
        low, high = sigmas.get("sigma_min", COSXL_SIGMA_MIN), sigmas["sigma_max"]
        if not 0 < low < high <= 1e9:
            limits = f"{SIGMA_MAX!r} must be above {SIGMA_MIN!r}, which must be above 0"
            raise bad(path, f"{limits}, got {high:g} and {low:g}")
        edit = {"StableDiffusionXLInstructPix2PixPipeline": {"is_cosxl_edit": True}}
        return Marks(COSXL | sigmas | asked, options=edit)
    predicted = prediction_type or ("v_prediction" if V_PREDICTION in tensors else default)
    if ZERO_SNR not in tensors:
        return Marks({**family.scheduler, "prediction_type": predicted})
    # PNDM cannot start at pure noise.
    base = DDIM if family.scheduler is PNDM else family.scheduler
    return Marks({**base, "prediction_type": predicted, "rescale_betas_zero_snr": True})


def _latents(path: Path, tensors: Tensors) -> dict[str, Any]:
    """Playground's statistics of the latents, one number for each of their channels."""
    if missing := [name for name in (LATENTS_MEAN, LATENTS_STD) if name not in tensors]:
        raise bad(path, f"has only one of {LATENTS_MEAN!r} and {LATENTS_STD!r}; {missing[0]!r} is missing")
    decoder = tensors.get("first_stage_model.decoder.conv_in.weight")
    count = 4 if decoder is None else decoder.shape[1]
    mean, std = (_numbers(path, tensors, name, count) for name in (LATENTS_MEAN, LATENTS_STD))
    if min(std) <= 0:
        raise bad(path, f"{LATENTS_STD!r} must hold numbers above 0, got {std}")
    return {"latents_mean": mean, "latents_std": std, "scaling_factor": PLAYGROUND_VAE_SCALE}


def _numbers(path: Path, tensors: Tensors, name: str, count: int) -> list[float]:
    """A marker's numbers."""
    found = [float(x) for x in tensors[name].reshape(-1)[: count + 1]]
    if len(found) != count or not all(map(np.isfinite, found)):
        raise bad(path, f"{name!r} must hold {count} finite numbers, got shape {list(tensors[name].shape)}: {found}")
    return found


def markers_for(family: Family, configs: Configs | None, schedulers: Configs | None) -> dict[str, np.ndarray]:
    """The markers that tell other programs what :func:`read_markers` reads, if it is not the family's default."""
    scheduler, vae = (schedulers or {}).get("scheduler", {}), (configs or {}).get("vae", {})
    predicts_v = scheduler.get("prediction_type") == "v_prediction"
    if family.scheduler is EULER and vae.get("latents_mean") and vae.get("latents_std"):
        statistics = {LATENTS_MEAN: vae["latents_mean"], LATENTS_STD: vae["latents_std"]}
        return {name: np.asarray(values, np.float32) for name, values in statistics.items()}
    if family.scheduler is EULER and predicts_v and "sigma_data" in scheduler:
        sigmas = {SIGMA_MAX: scheduler.get("sigma_max", 80.0), SIGMA_MIN: scheduler.get("sigma_min", 0.002)}
        return {name: np.asarray(value, np.float32) for name, value in sigmas.items()}
    names = [V_PREDICTION] * (predicts_v and family.prediction_type != "v_prediction")
    names += [ZERO_SNR] * (scheduler.get("rescale_betas_zero_snr") is True)
    return {name: np.zeros(0, np.float32) for name in names}
