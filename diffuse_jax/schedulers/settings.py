"""Settings across samplers: older spellings, and which lost settings to report when a user switches samplers."""

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
"""Details of a sampler's method. Switching samplers replaces them on purpose, so they are not reported."""

RELICS = frozenset({"tensor_format", "timestep_values", "timesteps"})
"""Keys from the first releases of diffusers that no longer mean anything."""

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
"""Settings that matter only if another one is on."""


def modern_spelling(data: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """The configuration with current names, without the defaults that diffusers filled in.

    Args:
      data: a configuration as read; ``_use_default_values`` lists the settings that diffusers filled in.
      renamed: old name -> new name, for the settings of the class being built.
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
    """The ``ignored`` settings that would change the network's inputs or the image.

    Left out are details of another method, settings that are off or that another setting disables, and settings that
    equal a default.

    Args:
      ignored: settings that a scheduler does not use.
      settings: all settings that it was built from.
      defaults: setting -> its defaults in the schedulers that have it.
    """

    def matters(name: str, value: Any) -> bool:
        if name in METHOD | RELICS or value is None or value is False:
            return False
        if name in SWITCH and not settings.get(SWITCH[name]):
            return False
        return value is True or value not in defaults.get(name, ())

    return {name: value for name, value in ignored.items() if matters(name, value)}
