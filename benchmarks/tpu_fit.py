"""How much memory of a TPU chip a training step takes, from compiling it for a slice that need not be attached.

libtpu compiles on any CPU, and the compiled program reports what it needs on each chip. Nothing is allocated: networks,
training state and batch are shapes, sharded as by ``train/text_to_image.py --mesh_fsdp``. Needs the libtpu that
``jax[tpu]`` requires for the installed JAX (``pip install "diffusejax[tpu]"``). One case takes minutes to an hour on
one core::

    python benchmarks/tpu_fit.py --model small --pixels 64 --print-only   # a quick trial
    python benchmarks/tpu_fit.py                                       # SD 1.5 with AdamW, 8 images per chip, v5e:2x4
    python benchmarks/tpu_fit.py --remat full --ema --batch 16
    python benchmarks/tpu_fit.py --model sdxl --method lora --batch 1 --pixels 1024
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -m benchmarks.tpu_fit

from common import RESULTS, write
from tpu_programs import needs, refusal, slice_mesh, training_step
from trainers import METHODS, MODELS

from diffuse_jax.models.remat import POLICIES
from diffuse_jax.training.optimizer import OPTIMIZERS

ABOUT = (
    "What one chip of the slice needs for a training step, in GiB, by `memory_analysis()` of the program that libtpu "
    "compiled on a CPU; it has not run on a TPU. `state` is what persists between steps (parameters, optimiser state "
    "and EMA in float32, frozen networks, the batch); `temporary` is what a step allocates; `program` is the code; "
    "`total` is their sum, and `peak` is the compiler's estimate of the peak, without the code. "
    "The compiler rejects a program that does not fit; `total` is then what it needs. `TFLOP` is the arithmetic of "
    "a step on one chip without recomputation, `compiler_TFLOP` the compiler's estimate of all of it."
)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    mesh = slice_mesh(args.topology, **({"fsdp": args.fsdp} if args.fsdp else {"data": 1, "fsdp": -1}))
    row = label(args, mesh) | measure(args, mesh)
    print(json.dumps(row), file=sys.stderr)
    if args.print_only:
        return 0
    path = RESULTS / "tpu_fit.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    key = label(args, mesh).items()
    print(write("tpu_fit", "Memory of training steps on TPUs", ABOUT, [r for r in before if key - r.items()] + [row],
                "jax", "libtpu"))  # fmt: skip
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=sorted(MODELS), default="sd15")
    add("--method", choices=METHODS, default="full")
    add("--rank", type=int, default=4, help="LoRA rank")
    add("--batch", type=int, default=8, help="images per chip")
    add("--pixels", type=int, default=512, help="height and width of the images")
    add("--remat", choices=POLICIES, default="blocks", help="like --remat_policy of the trainers")
    add("--ema", action="store_true", help="keep an exponential moving average")
    add("--cached", action="store_true", help="latents and prompt embeddings come with the batch")
    add("--optimizer", choices=sorted(OPTIMIZERS), default="adamw")
    add("--topology", default="v5e:2x4", help="type and shape of the slice")
    add("--fsdp", type=int, help="chips to shard parameters over (default: all); the rest are `data`")
    add(
        "--effort",
        choices=("O0", "O1", "O2", "O3"),
        default="O1",
        help="compiler effort; O1 takes a third of O2's time",
    )
    add("--print-only", action="store_true", help="leave docs/results unchanged")
    add("--dump", type=Path, help="where to write the compiled program as text")
    return parser.parse_args(argv)


def label(args: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """The columns that identify a row."""
    return {
        "model": args.model,
        "trained": "UNet" if args.method == "full" else f"LoRA, rank {args.rank}",
        "optimizer": args.optimizer,
        "slice": args.topology,
        "fsdp": mesh.shape["fsdp"],
        "batch_per_chip": args.batch,
        "pixels": args.pixels,
        "inputs": "latents" if args.cached else "pixels",
        "remat": args.remat,
        "ema": args.ema,
        "effort": args.effort,
    }


def measure(args: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """Compile the step and read what it needs on one chip."""
    start = time.perf_counter()
    step = training_step(
        args.model,
        args.method,
        mesh,
        args.batch,
        args.pixels,
        remat=args.remat,
        rank=args.rank,
        cached=args.cached,
        ema=args.ema,
        optimizer=args.optimizer,
    )
    print(
        f"traced in {time.perf_counter() - start:.0f} s, {step.flops / 1e12:.2f} TFLOP per chip",
        file=sys.stderr,
        flush=True,
    )
    jax.config.update("jax_optimization_level", args.effort)
    try:
        compiled = step.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return refusal(str(error)) | {"TFLOP": step.flops / 1e12}
    seconds = time.perf_counter() - start
    if args.dump:
        args.dump.write_text(compiled.as_text())
    return needs(compiled) | {"TFLOP": step.flops / 1e12, "compile_seconds": round(seconds)}


if __name__ == "__main__":
    raise SystemExit(main())
