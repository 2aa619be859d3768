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
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -m benchmarks.tpu_fit

from common import RESULTS, write
from trainers import METHODS, MODELS, batch_shapes, make_trainer

# Before importing JAX: this process only compiles, possibly next to others.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from diffuse_jax.kernels import target_platform
from diffuse_jax.models.remat import POLICIES
from diffuse_jax.sharding import make_mesh, param_shardings, train_batch_sharding
from diffuse_jax.training.flops import count_flops
from diffuse_jax.training.optimizer import OPTIMIZERS, make_optimizer
from diffuse_jax.training.state import init_state, make_step, mean_gradient

GIB = 1 << 30
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
    devices = topologies.get_topology_desc(args.topology, "tpu").devices
    mesh = make_mesh(data=-1, fsdp=args.fsdp or len(devices), devices=devices)
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
    trainer = make_trainer(
        args.model, args.method, dtype=jnp.bfloat16, remat=args.remat, rank=args.rank, cached=args.cached
    )
    optimizer = make_optimizer(args.optimizer, lambda _: jnp.float32(1e-5))
    state = jax.eval_shape(lambda p: init_state(p, optimizer, args.ema), trainer.trainable)
    shardings = param_shardings(state, mesh)
    step = make_step(trainer.loss, optimizer, 0, shardings=shardings)
    batch = batch_shapes(args.model, args.batch * mesh.size, args.pixels, cached=args.cached)
    parts = {name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in batch.items()}
    gradient = lambda *shapes: mean_gradient(trainer.loss, *shapes, jax.random.key(0))
    flops = count_flops(gradient, trainer.trainable, trainer.frozen, parts) / mesh.size

    placed = lambda tree, shardings: jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings
    )
    batch_shardings = jax.tree.map(lambda _: train_batch_sharding(mesh), parts)
    inputs = (
        placed(state, shardings),
        placed(trainer.frozen, param_shardings(trainer.frozen, mesh)),
        placed(parts, batch_shardings),
    )
    start = time.perf_counter()
    with target_platform("tpu"):
        lowered = step.trace(*inputs).lower(lowering_platforms=("tpu",))
    print(
        f"traced in {time.perf_counter() - start:.0f} s, {flops / 1e12:.2f} TFLOP per chip", file=sys.stderr, flush=True
    )
    jax.config.update("jax_optimization_level", args.effort)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return refusal(str(error)) | {"TFLOP": flops / 1e12}
    seconds = time.perf_counter() - start
    if args.dump:
        args.dump.write_text(compiled.as_text())
    return needs(compiled) | {"TFLOP": flops / 1e12, "compile_seconds": round(seconds)}


def needs(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Memory and arithmetic of a compiled program on one device."""
    memory = compiled.memory_analysis()
    state = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = state + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    cost = compiled.cost_analysis() or {}
    return {
        "fits": True,
        "state": state / GIB,
        "temporary": memory.temp_size_in_bytes / GIB,
        "program": memory.generated_code_size_in_bytes / GIB,
        "total": total / GIB,
        "peak": memory.peak_memory_in_bytes / GIB,
        "compiler_TFLOP": cost.get("flops", float("nan")) / 1e12,
    }


def refusal(message: str) -> dict[str, Any]:
    """The row of a program that does not fit, from the compiler's message; other errors are raised."""
    found = re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", message)
    if found is None:
        raise RuntimeError(message)
    print(message, file=sys.stderr)
    return {"fits": False, "total": float(found[1])}


if __name__ == "__main__":
    raise SystemExit(main())
