"""What the compiled programs of pipelines send between devices: the table of docs/meshes.md."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.hlo import Collective, collectives
from diffuse_jax.models.controlnet import ControlNetConfig, ControlNetModel
from diffuse_jax.pipelines import (
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from diffuse_jax.pipelines.programs import Programs
from tests.adapters.test_layouts import lora, write
from tests.models.filling import random_params
from tests.pipelines import tiny
from tests.pipelines.test_adapters import SHARED
from tests.pipelines.test_safety import CHECKER, PROCESSOR, params_that_flag

PLAIN: Any = tiny.pipeline()
IMAGE = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
MASK = np.ones((8, 16, 16, 1), np.float32)
PROMPTS = {"prompt": ["a"] * 8, "num_inference_steps": 2, "seed": 0}


def test_collectives_are_read_from_the_text_of_a_program() -> None:
    text = """
      %a.1 = f32[2,8]{1,0} all-reduce(%x), channel_id=1, to_apply=%all-reduce-add
      ROOT b = (bf16[4]{0:T(256)}, f32[4]{0}) all-to-all(%x, %y)
      %c = (f32[4]{0}, f32[16]{0:T(256)}) all-gather-start(%x), dimensions={0}
      %d = f32[16]{0} all-gather-done(%c)
      %e = f32[] add(%all-reduce.3, %y)
    """
    kinds = {"all-reduce": 64, "all-to-all": 24, "all-gather": 64}
    assert collectives(text) == [Collective(kind, size) for kind, size in kinds.items()]


def sent(pipe: Any, mesh: str, **call: Any) -> tuple[Counter[str], Any]:
    """Compile a call on a mesh; how many collectives of each kind its programs have, and the program of the run."""
    there = pipe.replace(mesh=mesh, programs=Programs())
    there.compile(**call)
    programs = {key.fn.__name__: program for key, program in there.programs._programs.items()}
    found = Counter(each.kind for program in programs.values() for each in collectives(program.as_text()))
    return found, programs["sample"]


def with_lora(tmp_path: Path) -> tuple[Any, dict[str, Any]]:
    file = write(tmp_path, lora(np.random.default_rng(5), lambda n: 4), "kohya")
    return PLAIN.load_lora_weights(file, adapter_name="a"), {"lora_scale": np.linspace(0, 1, 8)}


def checked(tmp_path: Path) -> tuple[Any, dict[str, Any]]:
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(PLAIN)
    pipe = pipe.replace(safety_checker=(CHECKER, params_that_flag(0.0)), feature_extractor=PROCESSOR)
    return pipe, {"image": IMAGE, "strength": 1.0}


def inpainting(tmp_path: Path) -> tuple[Any, dict[str, Any]]:
    return StableDiffusionInpaintPipeline.from_pipe(PLAIN), {"image": IMAGE, "mask_image": MASK}


def controlled(tmp_path: Path) -> tuple[Any, dict[str, Any]]:
    net = ControlNetModel(ControlNetConfig(**SHARED, conditioning_embedding_out_channels=(4, 8)))
    params = random_params(net.shapes(), np.random.default_rng(0))
    return StableDiffusionControlNetPipeline.from_pipe(PLAIN, controlnet=(net, params)), {"image": IMAGE}


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in (with_lora, checked)]


@pytest.mark.parametrize("kind", [*SLOW, inpainting, controlled])
def test_devices_that_divide_the_images_send_nothing(kind: Any, tmp_path: Path) -> None:
    pipe, call = kind(tmp_path)
    found, program = sent(pipe, "data=8", **PROMPTS, **call)
    assert not found
    assert "num_partitions=8" in program.as_text().splitlines()[0]


SENDS = {
    "fsdp=8": {"all-gather"},
    "data=4,tensor=2": {"all-reduce", "all-gather", "collective-permute"},
    "data=2,sequence=4": {"all-reduce", "all-gather", "collective-permute"},
}
"""What may be sent on each mesh, by docs/meshes.md."""


@pytest.mark.parametrize("mesh", SENDS)
def test_other_axes_send_what_the_documentation_lists(mesh: str) -> None:
    found, program = sent(PLAIN, mesh, **PROMPTS)
    assert set(found) == SENDS[mesh]
    sizes = collectives(program.as_text())
    if mesh.startswith("fsdp"):
        leaves = jax.tree.leaves(dict(PLAIN.replace(mesh=mesh).params))
        cut = [x for x in leaves if not x.sharding.is_fully_replicated]
        assert found["all-gather"] <= len(cut), "each parameter is gathered once, where it is used"
        assert {each.bytes for each in sizes} <= {x.nbytes for x in cut}
    if "sequence" in mesh:
        attention = tiny.UNET.block_out_channels[0] * 64 * 4 * 2 * 4  # keys of the longest, a float32 per channel
        assert max(each.bytes for each in sizes) <= attention, "nothing larger than the keys of a layer is sent"
