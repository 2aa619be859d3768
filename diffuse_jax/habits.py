"""Arguments that people are used to from the loaders of other libraries."""

from __future__ import annotations

from collections.abc import Iterable

HABITS = {
    "torch_dtype": "give dtype=, for example dtype='bfloat16'",
    "use_safetensors": "leave it out: safetensors are read where there are any, then .bin, then .msgpack",
    "from_pt": "leave it out: PyTorch's weights are what is read",
    "from_flax": "leave it out: .msgpack files are read where there are no others",
    "use_auth_token": "give token=",
    "device_map": "give mesh=, for example make_mesh()",
    "low_cpu_mem_usage": "leave it out: parameters are read one after another",
    "original_config": "leave it out: sizes are read off the tensors",
    "original_config_file": "leave it out: sizes are read off the tensors",
    "custom_pipeline": "import the module that defines the class",
}
"""Arguments of diffusers' loaders that are others here, and what to write."""


def refuse_habits(names: Iterable[str]) -> None:
    """Answer arguments that other libraries' loaders have, before anything is read or downloaded.

    Raises:
      TypeError: what to write instead.
    """
    if known := [name for name in names if name in HABITS]:
        raise TypeError("; ".join(f"there is no {name}= here: {HABITS[name]}" for name in known))
