"""Loader arguments of other libraries that have a different name here or are not needed."""

from __future__ import annotations

from collections.abc import Iterable

HABITS = {
    "torch_dtype": "pass dtype=, for example dtype='bfloat16'",
    "use_safetensors": "leave it out: safetensors are preferred, then .bin, then .msgpack",
    "from_pt": "leave it out: PyTorch weights are read directly",
    "from_flax": "leave it out: .msgpack files are read if there are no others",
    "use_auth_token": "pass token=",
    "device_map": "pass mesh=, for example make_mesh()",
    "low_cpu_mem_usage": "leave it out: parameters are read one after another",
    "original_config": "leave it out: sizes are inferred from the tensors",
    "original_config_file": "leave it out: sizes are inferred from the tensors",
    "extract_ema": "pass ema=",
    "scheduler_type": "pass scheduler=, for example EulerDiscreteScheduler()",
    "num_in_channels": "leave it out: sizes are inferred from the tensors",
    "custom_pipeline": "import the module that defines the class",
}
"""Arguments of diffusers' loaders -> what to write instead."""


def refuse_habits(names: Iterable[str]) -> None:
    """Reject loader arguments of other libraries, before anything is read or downloaded.

    Raises:
      TypeError: there is one; the message says what to write instead.
    """
    if known := [name for name in names if name in HABITS]:
        raise TypeError("; ".join(f"there is no {name}= here: {HABITS[name]}" for name in known))
