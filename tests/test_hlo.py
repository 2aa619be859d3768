"""What ``benchmarks/hlo.py`` reads from the text of a compiled program."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "hlo.py"

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
TEXT = f"""HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}}

%fused (p: bf16[2,64]) -> f32[64] {{
  %p = bf16[2,64]{{1,0:T(8,128)(2,1)}} parameter(0)
  %wide = f32[2,64]{{1,0}} convert(%p), {CYCLES % 9999}
  ROOT %reduce.1 = f32[64]{{0}} reduce(%wide, %zero), dimensions={{0}}, to_apply=%sum
}}

%body (s: (s32[], f32[64])) -> (s32[], f32[64]) {{
  %s = (s32[], f32[64]{{0}}) parameter(0)
  %value = f32[64]{{0}} get-tuple-element(%s), index=1
  %all-reduce.1 = f32[64]{{0:T(128)}} all-reduce(%value), to_apply=%sum, {CYCLES % 7}
  ROOT %next = (s32[], f32[64]{{0}}) tuple(%index, %all-reduce.1)
}}

%condition (s: (s32[], f32[64])) -> pred[] {{
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

ENTRY %main (x: bf16[2,64], q: bf16[1,8,256,40], k: bf16[1,8,384,40]) -> f32[64] {{
  %x = bf16[2,64]{{1,0:T(8,128)(2,1)}} parameter(0)
  %q = bf16[1,8,256,40]{{3,2,1,0}} parameter(1)
  %k = bf16[1,8,384,40]{{3,2,1,0}} parameter(2)
  %sums = f32[64]{{0}} fusion(%x), kind=kLoop, calls=%fused, metadata={{op_name="jit(step)/norm/reduce_sum"}}, {CYCLES % 100}
  %product = f32[64,64]{{1,0}} fusion(%sums), kind=kOutput, calls=%multiply, metadata={{op_name="jit(step)/dot_general"}}, {CYCLES % 50}
  %copy.1 = f32[64]{{0}} copy(%sums), {CYCLES % 5}
  %part = f32[8]{{0}} fusion(%sums), kind=kCustom, calls=%all-reduce-scatter
  %attend = bf16[1,8,256,40]{{3,2,1,0}} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call"
  %loop = (s32[], f32[64]{{0}}) while(%start), condition=%condition, body=%body, backend_config={{"known_trip_count":{{"n":"25"}}}}
  ROOT %out = f32[64]{{0}} get-tuple-element(%loop), index=1
}}

%all-reduce-scatter (p.2: f32[64]) -> f32[8] {{
  %all-reduce.2 = f32[64]{{0:T(128)}} all-reduce(%p.2), to_apply=%sum
  ROOT %slice.1 = f32[8]{{0}} dynamic-slice(%all-reduce.2, %offset), dynamic_slice_sizes={{8}}
}}

%multiply (p.1: f32[64]) -> f32[64,64] {{
  ROOT %convolution.1 = f32[64,64]{{1,0}} convolution(%p.1, %p.1), dim_labels=bf_io->bf, metadata={{op_name="jit(step)/dot_general"}}
}}
"""  # noqa: E501 - the compiler's lines


@pytest.fixture(scope="module")
def hlo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hlo", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hlo"] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_bodies_of_loops_count_as_often_as_they_run_and_those_of_fusions_not(hlo: ModuleType) -> None:
    assert hlo.cycles(hlo.parse(TEXT)) == 100 + 50 + 5 + 25 * 7


def test_the_profile_says_what_fusions_contain(hlo: ModuleType) -> None:
    expected = {"collective": 175, "sum, mean": 100, "matrix product": 50, "copy, transpose": 5}
    assert hlo.profile(hlo.parse(TEXT)) == expected


def test_collectives_have_a_count_and_bytes(hlo: ModuleType) -> None:
    assert hlo.sent(hlo.parse(TEXT)) == {"all-reduce": (25, 25 * 64 * 4), "reduce-scatter": (1, 64 * 4)}


def test_attention_is_counted_with_heads_of_whole_lanes(hlo: ModuleType) -> None:
    assert hlo.attention_flops(hlo.parse(TEXT)) == 2 * 2 * 8 * 256 * 384 * 128


def test_settings_of_a_kernel_may_have_lines_of_their_own(hlo: ModuleType) -> None:
    """As those of the splash kernels: what follows them counts, and so do their heads without an axis of images."""
    call = """%attend = bf16[8,256,40]{2,1,0} custom-call(%ids, %q.3, %k.3, %k.3), custom_call_target="tpu_custom_call", backend_config={"window": {"text": "}}}", "more":
"block_q": 256
}}, metadata={op_name="jit(step)/splash_mha_dq/pallas_call"}"""  # noqa: E501
    lines = TEXT.splitlines()
    place = next(number for number, line in enumerate(lines) if "%attend" in line)
    inputs = "  %ids = s32[256,128,1]{2,1,0} parameter(3)\n  %q.3 = bf16[8,256,40]{2,1,0} bitcast(%q)\n"
    inputs += "  %k.3 = bf16[8,384,40]{2,1,0} bitcast(%k)\n"
    program = hlo.parse("\n".join((*lines[:place], f"{inputs}  {call}", *lines[place + 1 :])))
    assert hlo.profile(program) == hlo.profile(hlo.parse(TEXT))
    assert hlo.attention_flops(program) == 3 * 2 * 8 * 256 * 384 * 128


def test_bytes_of_shapes(hlo: ModuleType) -> None:
    assert hlo.size("bf16[2,3]") == 12
    assert hlo.size("(f32[2], s32[], pred[5])") == 8 + 4 + 5


def test_other_text_is_refused(hlo: ModuleType) -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("HloModule nothing")
