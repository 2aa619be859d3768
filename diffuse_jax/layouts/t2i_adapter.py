"""T2I-Adapters as TencentARC publishes them: the names of their tensors, and their configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from diffuse_jax.errors import WeightsError
from diffuse_jax.layouts.rows import Table, to_diffusers

HEAD = "adapter."
"""What diffusers' names begin with; some files have it before the original's names, too."""


def t2i_adapter_table(keys: Iterable[str]) -> Table:
    """The table of an adapter, from its keys in either spelling.

    The original numbers the blocks of a full adapter throughout, and those of a light adapter within their stage.

    Raises:
      WeightsError: the blocks do not form stages.
    """
    keys = set(keys)
    numbers = lambda pattern: sorted({tuple(map(int, m.groups())) for m in (re.match(pattern, k) for k in keys) if m})
    if light := numbers(r"body\.(\d+)\.body\.(\d+)\."):
        return _light(light)
    stages = numbers(r"adapter\.body\.(\d+)\.resnets\.(\d+)\.")
    if stages and "adapter.body.0.out_conv.weight" in keys:
        return _light(stages)
    first = numbers(r"body\.(\d+)\.in_conv\.")  # where the number of channels changes
    count = 1 + max(j for _, j in stages) if stages else first[0][0] if first else 2
    blocks = [i * count + j for i, j in stages] or [n for (n,) in numbers(r"body\.(\d+)\.block1\.")]
    if blocks != list(range(len(blocks))) or not count or len(blocks) % count:
        raise WeightsError(f"its blocks {blocks} do not form stages of {count}")
    table: Table = [("conv_in", "adapter.conv_in", "same")]
    table += [(f"body.{n}.in_conv", f"adapter.body.{n // count}.in_conv", "same") for n in blocks[::count]]
    return table + [(f"body.{n}", f"adapter.body.{n // count}.resnets.{n % count}", "same") for n in blocks]


def _light(blocks: list[tuple[int, ...]]) -> Table:
    """The table of a light adapter, from the numbers ``(stage, block)``."""
    stages = sorted({stage for stage, _ in blocks})
    table: Table = [
        (f"body.{i}.{name}", f"adapter.body.{i}.{name}", "same") for i in stages for name in ("in_conv", "out_conv")
    ]
    return table + [(f"body.{i}.body.{j}", f"adapter.body.{i}.resnets.{j}", "same") for i, j in blocks]


def read_tensors(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """An adapter's tensors under diffusers' names, from those in either spelling, and its ``config.json``."""
    if any(key.startswith("body.0.resnets.") for key in tensors):
        found = {HEAD + key: array for key, array in tensors.items()}
    else:
        found = to_diffusers(tensors, t2i_adapter_table(tensors))
    return found, _config(found)


def _config(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """``config.json`` of an adapter. Adapters for SDXL fold 16x16 pixels into channels, and others 8x8."""
    shape = lambda key: tensors[f"adapter.{key}.weight"].shape
    stages = 1 + max(int(m[1]) for key in tensors if (m := re.match(r"adapter\.body\.(\d+)\.", key)))
    light = "adapter.conv_in.weight" not in tensors
    folded = shape("body.0.in_conv" if light else "conv_in")[1]
    large = not light and folded % 256 == 0
    outputs = [shape(f"body.{i}.{'out_conv' if light else 'resnets.0.block1'}")[0] for i in range(stages)]
    factor = 16 if large else 8
    return {
        "_class_name": "T2IAdapter",
        "adapter_type": "light_adapter" if light else "full_adapter_xl" if large else "full_adapter",
        "in_channels": folded // factor**2,
        "channels": outputs[:-1] if light else outputs,
        "num_res_blocks": len({key.split(".")[4] for key in tensors if key.startswith("adapter.body.0.resnets.")}),
        "downscale_factor": factor,
    }
