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


class Program:
    """A program for a TPU that knows how often it was compiled."""

    TEXT = """HloModule step

ENTRY %main (x: f32[8]) -> f32[8] {
  ROOT %add.1 = f32[8] add(%x, %x), backend_config={"estimated_cycles":"%d"}
}
"""

    def __init__(self, cycles: int) -> None:
        self.cycles, self.compilations = cycles, 0

    def as_text(self) -> str:
        return self.TEXT.replace("%d", str(self.cycles))

    def compile(self) -> Program:
        self.compilations += 1
        return self

    def cost_analysis(self) -> dict[str, float]:
        return {"flops": 8.0, "bytes accessed": 64.0}


def test_estimates_are_remembered_for_a_program_and_how_it_is_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.1")
    import tpu_aot
    from tpu_blocks import Part

    chip, program = tpu_aot.CHIPS["v5e"], Program(100)
    estimate = lambda program, how: tpu_aot.estimated(Part("add", 1, program), how, chip, tmp_path / "kept")
    first = estimate(program, "v5e:2x4 O2")
    assert (first.cycles, first.moved) == (100, 64)
    assert estimate(Program(100), "v5e:2x4 O2") == estimate(program, "v5e:2x4 O2") == first
    assert program.compilations == 1
    assert estimate(program, "v5e:2x4 O3") == first
    assert estimate(Program(101), "v5e:2x4 O2").cycles == 101
    assert program.compilations == 2


def test_a_block_that_cannot_be_printed_is_compiled_without_pipelined_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tpu_aot
    from tpu_blocks import Part

    class Looping(Program):
        def compile(self, options: dict[str, bool] | None = None) -> Program:
            return Program(300) if options == tpu_aot.UNPIPELINED else Unprintable(100)

    class Unprintable(Program):
        def as_text(self) -> str:
            raise jax.errors.JaxRuntimeError("INTERNAL: Async done requires its operand to be an asynchronous op")

    assert tpu_aot.readable(Part("dense", 1, Looping(0)), tpu_aot.CHIPS["v6e"]).cycles == 300


def test_a_libtpu_without_that_option_compiles_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tpu_aot

    class Older(Program):
        def compile(self, options: dict[str, bool] | None = None) -> Program:
            if options:
                raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such compile option: 'xla_tpu_other'")
            return self

    program = Older(100)
    assert tpu_aot.unpipelined(program) is program
