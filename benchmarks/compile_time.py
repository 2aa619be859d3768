"""What compiling costs: from Python to a program, from JAX's compilation cache, and from a saved program.

The whole text-to-image program of published architectures, from token ids to pixels, for the CPU in float32 (or with
``--dtype bfloat16``). Parameters are shapes: nothing is allocated and nothing runs. Each measurement has its own
process; a second one finds what the first has written::

    python benchmarks/compile_time.py                        # the shipped model, SD 1.5, SDXL; 1.2 GB of memory
    python benchmarks/compile_time.py --models emoji --print-only
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -m benchmarks.compile_time

from common import RESULTS, ROOT, peak_memory, write

STAGES = ("trace", "lower", "compile")

MODELS = {"emoji": 64, "sd15": 512, "sdxl": 1024}
"""Model -> height and width of its images in pixels."""

ABOUT = (
    "The text-to-image program, one image with guidance, for the CPU: seconds by the clock, and with `_cpu` processor "
    "seconds of all threads, which other programs on the machine disturb least. `trace` runs the Python code, `lower` "
    "makes StableHLO, `compile` is XLA, and `cold_cpu` is all three; `cached` is a next process that finds the "
    "program in JAX's compilation cache (it traces and lowers again), and `saved` one that reads a saved program, as "
    "after `load_compiled` (it does neither). Parameters are shapes: the sampler's loop, text encoders and decoder "
    "are in the program, but no weights. `MiB` is the size of the saved program, `peak_GiB` the memory of compiling."
)

Result = TypeVar("Result")


def pipeline(model: str, dtype: str) -> Any:
    """The pipeline of an architecture, with shapes in place of its parameters."""
    import transformers
    from folders import SHIPPED, networks, write_tokenizer

    from diffuse_jax import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffuse_jax.models import AutoencoderKL, UNet2DConditionModel, presets
    from diffuse_jax.text import CLIPTextModel, CLIPTextModelWithProjection
    from diffuse_jax.text import presets as text

    if model == "emoji":
        pipe = DiffusionPipeline.from_pretrained(SHIPPED, dtype=dtype)
        parts = {name: pipe.components[name] for name in pipe.params}
        others = {name: part for name, part in pipe.components.items() if name not in parts}
    else:
        parts = networks("sd15") if model == "sd15" else {
            "unet": UNet2DConditionModel(presets.SDXL_UNET),
            "vae": AutoencoderKL(presets.SDXL_VAE),
            "text_encoder": CLIPTextModel(text.CLIP_L),
            "text_encoder_2": CLIPTextModelWithProjection(text.OPENCLIP_BIGG),
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(Path(folder))
            tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
        others = {"scheduler": DDIMScheduler(beta_schedule="scaled_linear"), "tokenizer": tokenizer}
        others |= {"tokenizer_2": tokenizer} if model == "sdxl" else {}
    parts = {name: part.clone(dtype=dtype, param_dtype=dtype) for name, part in parts.items()}
    kind = StableDiffusionXLPipeline if model == "sdxl" else StableDiffusionPipeline
    return kind({**parts, **others}, {name: part.shapes() for name, part in parts.items()}, {})


def measure(model: str, dtype: str, folder: Path) -> dict[str, Any]:
    """Trace, lower and compile in this process; JAX's cache and the saved program are in ``folder``."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    from jax.experimental.serialize_executable import deserialize_and_load, serialize

    from diffuse_jax import sample

    found: dict[str, Any] = {}

    def timed(name: str, run: Callable[[], Result]) -> Result:
        start, processor = time.perf_counter(), time.process_time()
        result = run()
        found[name] = time.perf_counter() - start
        found[f"{name}_cpu"] = time.process_time() - processor  # of all threads; XLA compiles within this process
        return result

    pipe = pipeline(model, dtype)
    request = pipe.request("a red apple", num_inference_steps=25, height=MODELS[model], width=MODELS[model], seed=0)
    arguments = pipe.params, request.rows, request.plan
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    file = folder / "program"
    if file.exists():
        timed("saved", lambda: deserialize_and_load(*pickle.loads(file.read_bytes())))  # what this benchmark wrote
    traced = timed("trace", lambda: jax.jit(lambda *args: sample(request.method, *args)).trace(*shapes))
    lowered = timed("lower", traced.lower)
    program = timed("compile", lowered.compile)
    if not file.exists():
        file.write_bytes(pickle.dumps(serialize(program)))
    return found | {"MiB": file.stat().st_size / 2**20, "peak_GiB": peak_memory() / 2**30}


def rows(model: str, dtype: str) -> dict[str, Any]:
    """The row of one model: a process that compiles, and one that finds what it has written."""
    with tempfile.TemporaryDirectory(prefix="compile-") as folder:
        command = [sys.executable, __file__, "--measure", folder, "--models", model, "--dtype", dtype]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        answers = []
        for _ in range(2):
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            answers.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = answers
    for answer in answers:
        for clock in ("", "_cpu"):
            answer[f"all{clock}"] = sum(answer[f"{stage}{clock}"] for stage in STAGES)
    row = {"model": model, "pixels": MODELS[model], "dtype": dtype}
    for name, answer, stage in (
        *((stage, first, stage) for stage in STAGES), ("cached", second, "all"), ("saved", second, "saved")
    ):  # fmt: skip
        row |= {name: round(answer[stage], 1), f"{name}_cpu": round(answer[f"{stage}_cpu"], 1)}
    return row | {"cold_cpu": round(first["all_cpu"], 1), "MiB": first["MiB"], "peak_GiB": first["peak_GiB"]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--print-only", action="store_true", help="print rows, leave docs/results unchanged")
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(args.models[0], args.dtype, args.measure)))
        return 0
    for model in args.models:
        row = rows(model, args.dtype)
        print(json.dumps(row), flush=True)
        if not args.print_only:
            path = RESULTS / "compile_time.json"
            before = json.loads(path.read_text())["rows"] if path.exists() else []
            others = [one for one in before if (one["model"], one["dtype"]) != (model, args.dtype)]
            write("compile_time", "Compile time", ABOUT, [*others, row], "jax", "jaxlib")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
