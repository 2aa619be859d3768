"""What DeepFloyd IF's cascade needs of a device's memory, with all stages on it and with offloading.

The programs are those of the pipelines: T5's encoding, both stages with guidance, and the x4 upscaler with its decoder,
each for one image. Parameters are shapes, so nothing is allocated and nothing runs; the compiler says what a program
needs besides them. Both stages of IF and T5 XXL at full size take about 2 GB of memory and some minutes to compile::

    python benchmarks/if_memory.py                            # IF-I-XL, IF-II-L, T5 XXL and the upscaler
    python benchmarks/if_memory.py --size tiny --print-only   # a quick trial
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -m benchmarks.if_memory

from common import write
from folders import write_tokenizer

from diffuse_jax import IFPipeline, IFSuperResolutionPipeline, StableDiffusionUpscalePipeline, sample
from diffuse_jax.models import AutoencoderKL, UNet2DConditionModel
from diffuse_jax.models import presets as networks
from diffuse_jax.pipelines.families.clip import encode_ids
from diffuse_jax.schedulers import DDIMScheduler, DDPMScheduler
from diffuse_jax.text import CLIPTextModel, T5EncoderModel
from diffuse_jax.text import presets as text

GIB = 1 << 30

ABOUT = (
    "Memory of DeepFloyd IF's cascade in GiB, one image with guidance: T5 XXL, IF-I-XL at 64 pixels, IF-II-L at 256 "
    "and the x4 upscaler at 1024, each as the whole program that its pipeline compiles. Nothing was run. "
    "`parameters` are those that a step reads, counted exactly from the networks' shapes, in the dtype of the row. "
    "`temporary` is what the compiled program needs besides arguments and results, by its `memory_analysis()`; it was compiled for the CPU "
    "in float32 for both dtypes, because in bfloat16 the CPU's compiler makes float32 copies of all parameters, which "
    "GPUs and TPUs do not need. With `all_on_device` the parameters of all steps stay; with `T5_offloaded` those of T5 "
    'are there only while it encodes (`stage_1.offload("text_encoder")`); with `all_offloaded` (`offload()` of each '
    "stage) only those that the step reads."
)

TINY: dict[str, Any] = {
    "block_out_channels": (16,),
    "layers_per_block": 1,
    "num_attention_heads": 8,
    "norm_num_groups": 4,
    "cross_attention_dim": 32,
}
TINY_IF = TINY | {
    "down_block_types": ("SimpleCrossAttnDownBlock2D",),
    "up_block_types": ("SimpleCrossAttnUpBlock2D",),
    "encoder_hid_dim": 24,
    "addition_embed_type_num_heads": 4,
}


def configs(size: str) -> dict[str, Any]:
    """The configurations of all networks, as published or tiny."""
    full = {
        "t5": text.T5_XXL,
        "first": networks.IF_I_XL_UNET,
        "second": networks.IF_II_L_UNET,
        "third": networks.X4_UPSCALER_UNET,
        "vae": networks.X4_UPSCALER_VAE,
        "clip": text.OPENCLIP_H,
    }
    if size == "full":
        return full
    changes: dict[str, dict[str, Any]] = {
        "t5": {"vocab_size": 64, "d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 1, "num_heads": 3},
        "first": TINY_IF | {"sample_size": 16},
        "second": TINY_IF | {"sample_size": 64, "time_embedding_dim": None},
        "third": TINY
        | {
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
            "only_cross_attention": (True,),
        },
        "vae": {"block_out_channels": (8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
        "clip": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    }
    return {name: config.replace(**changes[name]) for name, config in full.items()}


def stages(size: str) -> tuple[Any, Any, Any]:
    """The three pipelines, with shapes in the place of parameters; T5 is in the first one."""
    import transformers

    found = configs(size)
    kinds = {"t5": T5EncoderModel, "vae": AutoencoderKL, "clip": CLIPTextModel}
    models = {name: kinds.get(name, UNet2DConditionModel)(config) for name, config in found.items()}
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0)]
    words = transformers.T5Tokenizer(vocab=marks, extra_ids=0, model_max_length=77)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        clip_words = transformers.CLIPTokenizer.from_pretrained(folder)
    noise = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    sampler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True)

    def made(kind: Any, nets: Mapping[str, str], **others: Any) -> Any:
        parts = {name: models[model] for name, model in nets.items()}
        return kind({**parts, **others}, {name: part.shapes() for name, part in parts.items()})

    return (
        made(IFPipeline, {"text_encoder": "t5", "unet": "first"}, tokenizer=words, scheduler=sampler),
        made(IFSuperResolutionPipeline, {"unet": "second"}, scheduler=sampler, image_noising_scheduler=noise),
        made(
            StableDiffusionUpscalePipeline,
            {"unet": "third", "vae": "vae", "text_encoder": "clip"},
            tokenizer=clip_words,
            scheduler=DDIMScheduler(prediction_type="v_prediction"),
            low_res_scheduler=noise,
        ),
    )


def programs(size: str) -> Iterator[tuple[str, int, jax.stages.Lowered, dict[str, Any]]]:
    """Each step's name, height in pixels, program and networks, whose parameters are shapes."""
    first, second, third = stages(size)
    tokens = first.family.tokens(first, {"text_encoder": ["a", "a"]})
    part, params = first.family.text_part(first), {"text_encoder": first.params["text_encoder"]}
    yield "encode with T5", 0, jax.jit(partial(encode_ids, part)).lower(params, tokens), params
    width = first.components["text_encoder"].config.d_model
    embeds = dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), np.zeros((1, 77, width), np.float32))
    edges = [pipe.components["unet"].config.sample_size for pipe in (first, second)]
    image = lambda edge: np.zeros((1, edge, edge, 3), np.float32)
    requests = {
        "first stage": (first, first.request(**embeds, seed=0)),
        "second stage": (second, second.request(**embeds, image=image(edges[0]), seed=0)),
        "x4 upscaler": (third, third.request("a", image=image(edges[1]), seed=0)),
    }
    for name, (pipe, request) in requests.items():
        params = {net: pipe.params[net] for net in request.method.networks}
        run = jax.jit(partial(sample, request.method))
        height = request.method.latent_shape[0] * (pipe.components["vae"].config.scale if "vae" in params else 1)
        yield name, height, run.lower(params, request.rows, request.plan), params


class Measured(NamedTuple):
    """A step's name, height in pixels, number of parameters, temporary memory in bytes and seconds to compile."""

    step: str
    pixels: int | None
    parameters: int
    temporary: int
    seconds: float


def measure(size: str) -> list[Measured]:
    """Every step, compiled."""
    found = []
    for name, height, lowered, params in programs(size):
        start = time.perf_counter()
        temporary = lowered.compile().memory_analysis().temp_size_in_bytes
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        found.append(Measured(name, height or None, count, temporary, time.perf_counter() - start))
        print(json.dumps(found[-1]._asdict()), file=sys.stderr, flush=True)
    return found


def table(found: list[Measured], dtype: str) -> list[dict[str, Any]]:
    """A row for each step, with parameters in a dtype."""
    gib = lambda count: count * jnp.dtype(dtype).itemsize / GIB
    t5, everything, rows = found[0], sum(one.parameters for one in found), []
    for one in found:
        on_device = {
            "all_on_device": everything,
            "T5_offloaded": everything if one is t5 else everything - t5.parameters,
            "all_offloaded": one.parameters,
        }
        rows.append({
            "step": one.step,
            "pixels": one.pixels,
            "dtype": dtype,
            "parameters": gib(one.parameters),
            "temporary": one.temporary / GIB,
            **{name: gib(count) + one.temporary / GIB for name, count in on_device.items()},
        })  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--effort", choices=("O0", "O1", "O2", "O3"), default="O1", help="compiler effort")
    parser.add_argument("--print-only", action="store_true", help="print rows, leave docs/results unchanged")
    args = parser.parse_args(argv)
    jax.config.update("jax_optimization_level", args.effort)
    found = measure(args.size)
    rows = [row for dtype in args.dtypes for row in table(found, dtype)]
    for row in rows:
        print(json.dumps(row), flush=True)
    if not args.print_only and args.size == "full":
        print(write("if_memory", "Memory of DeepFloyd IF", ABOUT, rows, "jax", "jaxlib"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
