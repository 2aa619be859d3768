"""The blocks whose times ``benchmarks/tpu_aot.py --by blocks`` adds up are the whole network."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import jax
import pytest

from diffuse_jax.training.flops import count_flops

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize(("model", "pixels"), [("sd15", 512), pytest.param("sdxl", 1024, marks=pytest.mark.slow)])
def test_they_have_its_parameters_and_do_its_arithmetic(
    monkeypatch: pytest.MonkeyPatch, model: str, pixels: int
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tpu_blocks
    import tpu_programs

    unet, inputs = tpu_programs.unet_call(model, 2, pixels)
    whole = unet.shapes()
    network = tpu_blocks.Network(unet, whole, None, tpu_blocks.BLOCKS, contextlib.nullcontext)
    parameters, operations = 0, 0.0
    kinds = tpu_blocks.blocks(network, **inputs)
    for block in kinds:
        own = block.part(whole)
        parameters += len(block.paths) * sum(math.prod(x.shape) for x in jax.tree.leaves(own))
        operations += len(block.paths) * count_flops(block.apply, own, block.arrays)
    assert parameters == sum(math.prod(x.shape) for x in jax.tree.leaves(whole))
    assert operations == count_flops(lambda p, x: unet.apply({"params": p}, **x), whole, inputs)
    assert len(kinds) < sum(len(block.paths) for block in kinds) / 2, "equal blocks count as one kind"
