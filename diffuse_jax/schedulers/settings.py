"""Settings across samplers: older spellings, and what is worth telling a user whose new sampler has no such setting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

METHOD = frozenset(
    {
        "algorithm_type",
        "correct_steps",
        "corrector_order",
        "disable_corrector",
        "eta",
        "euler_at_final",
        "lower_order_final",
        "noise_sampler_seed",
        "original_inference_steps",
        "predict_x0",
        "predictor_order",
        "s_churn",
        "s_max",
        "s_min",
        "s_noise",
        "s_tmax",
        "s_tmin",
        "sampling_eps",
        "set_alpha_to_one",
        "skip_prk_steps",
        "snr",
        "solver_order",
        "solver_p",
        "solver_type",
        "stochastic_sampling",
        "tau_func",
        "timestep_scaling",
        "variance_type",
    }
)
"""How a sampler works inside. Whoever takes another sampler takes its way of working: nothing is lost."""

RELICS = frozenset({"tensor_format", "timestep_values", "timesteps"})
"""Keys of the first releases of diffusers, without meaning since."""

SWITCH = {
    "clip_sample_range": "clip_sample",
    "dynamic_thresholding_ratio": "thresholding",
    "sample_max_value": "thresholding",
    "flow_shift": "use_flow_sigmas",
    "shift_terminal": "use_flow_sigmas",
    "base_image_seq_len": "use_dynamic_shifting",
    "base_shift": "use_dynamic_shifting",
    "max_image_seq_len": "use_dynamic_shifting",
    "max_shift": "use_dynamic_shifting",
    "time_shift_type": "use_dynamic_shifting",
    "upscale_mode": "scale_factors",
}
"""Settings that matter only where another one is on."""


def modern_spelling(data: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """The same configuration in today's words, without what diffusers filled in by itself.

    Args:
      data: a configuration as read; one that a diffusers object shows marks settings that it was not given.
      renamed: old name -> name of a setting, of the class that is built.
    """
    defaults = data.get("_use_default_values") or ()
    data = {k: v for k, v in data.items() if k not in defaults and k != "_use_default_values"}
    predict_epsilon = data.pop("predict_epsilon", None)
    if predict_epsilon is not None:
        data.setdefault("prediction_type", "epsilon" if predict_epsilon else "sample")
    for old, new in renamed.items():
        if data.get(old) is not None:
            data[new] = data.pop(old)
    return {k: (v.tolist() if isinstance(v, np.ndarray) else v) for k, v in data.items()}


def worth_telling(
    ignored: Mapping[str, Any], settings: Mapping[str, Any], defaults: Mapping[str, Iterable[Any]]
) -> dict[str, Any]:
    """Those of the ``ignored`` settings that change what the network or the picture gets.

    Left out are settings of another method, those that are off, those that another one makes pointless, and those that
    say what is the case anyway.

    Args:
      ignored: settings that a scheduler has no use for.
      settings: all that it was built from.
      defaults: setting -> its defaults in the schedulers that have it.
    """

    def matters(name: str, value: Any) -> bool:
        if name in METHOD | RELICS or value is None or value is False:
            return False
        if name in SWITCH and not settings.get(SWITCH[name]):
            return False
        return value is True or value not in defaults.get(name, ())

    return {name: value for name, value in ignored.items() if matters(name, value)}
