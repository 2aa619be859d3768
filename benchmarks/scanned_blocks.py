"""Whether equal transformer blocks are better scanned than written out: compiling, a step, and memory.

SDXL has runs of ten equal blocks. Checkpoints name their parameters one by one, so a scan has to stack them within the
program. Both sides compute the same network from the same parameters, here with fewer channels::

    python benchmarks/scanned_blocks.py                              # the CPU, a loop of steps
    python benchmarks/scanned_blocks.py --target v5e:2x4 --size 32   # the compiler's estimate for a TPU; needs libtpu
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -m benchmarks.scanned_blocks

import jax
import jax.numpy as jnp
from common import RESULTS, write
from hlo import cycles, parse
from jax.sharding import SingleDeviceSharding
from tpu_aot import CHIPS
from tpu_programs import placed, slice_mesh

from diffuse_jax.kernels import compiler_options, target_platform
from diffuse_jax.models.attention import TransformerBlock
from diffuse_jax.training.initial import initial_params

ABOUT = (
    "A run of equal transformer blocks, written out and scanned over parameters that the program stacks, within a loop "
    "of `evaluations`. `compile_cpu` is processor seconds of tracing, lowering and compiling; `evaluation_cpu` the "
    "least processor seconds of one evaluation; for a TPU `evaluation_ms` is the compiler's estimate without its "
    "attention kernels, and nothing ran. `temporary_MiB` is what the program needs beside its parameters."
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--depth", type=int, default=10, help="blocks of the run")
    add("--width", type=int, default=640, help="channels; SDXL has 1280")
    add("--size", type=int, default=16, help="height and width of the feature map; SDXL has 32")
    add("--evaluations", type=int, default=4, help="steps of the loop")
    add("--rounds", type=int, default=3, help="timed runs of each side, in turns")
    add("--target", default="cpu", help="cpu, or a TPU slice such as v5e:2x4")
    add("--print-only", action="store_true", help="print rows, leave docs/results unchanged")
    args = parser.parse_args(argv)
    found = measure(args)
    print(*map(json.dumps, found), sep="\n")
    if not args.print_only:
        path = RESULTS / "scanned_blocks.json"
        before = json.loads(path.read_text())["rows"] if path.exists() else []
        kept = [row for row in before if row["target"] != args.target]
        write("scanned_blocks", "Scanned transformer blocks", ABOUT, [*kept, *found], "jax", "jaxlib")
    return 0


def evaluate(block: TransformerBlock, params: dict[str, Any], x: jax.Array, context: jax.Array, scan: bool) -> Any:
    """The run of blocks; ``params`` has one entry for each."""
    one = lambda x, params: (block.apply({"params": params}, x, context), None)
    if scan:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params.values())
        return jax.lax.scan(one, x, stacked)[0]
    for each in params.values():
        x, _ = one(x, each)
    return x


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of both sides."""
    tpu = args.target != "cpu"
    dtype = jnp.bfloat16 if tpu else jnp.float32
    block = TransformerBlock(args.width // 64, dtype=dtype, param_dtype=dtype)
    shape = lambda *n: jax.ShapeDtypeStruct(n, dtype)
    x, context = shape(2, args.size**2, args.width), shape(2, 77, args.width)
    one = jax.eval_shape(block.init, jax.random.key(0), x, context)["params"]
    arguments = {f"transformer_blocks_{i}": one for i in range(args.depth)}, x, context
    if tpu:
        place = SingleDeviceSharding(slice_mesh(args.target).devices.flat[0])
        arguments = placed(arguments, jax.tree.map(lambda _: place, arguments))

    def program(scan: bool) -> tuple[Any, float]:
        def loop(params: Any, x: jax.Array, context: jax.Array) -> jax.Array:
            step = lambda _, x: 0.5 * x + 0.1 * evaluate(block, params, x, context, scan)
            return jax.lax.fori_loop(0, args.evaluations, step, x)

        jax.clear_caches()
        start = time.process_time()
        with target_platform("tpu" if tpu else "cpu"):
            traced = jax.jit(loop, compiler_options=compiler_options()).trace(*arguments)
            compiled = traced.lower(lowering_platforms=("tpu",) if tpu else None).compile()
        return compiled, time.process_time() - start

    with target_platform("tpu" if tpu else "cpu"):  # what is imported once
        jax.eval_shape(lambda *args: evaluate(block, *args, scan=False), *arguments)
    named = {"target": args.target, "depth": args.depth, "width": args.width, "tokens": args.size**2}
    size = args.depth * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one))
    named |= {"evaluations": args.evaluations, "parameters_MiB": size / 2**20}
    rows, sides = [], []
    for scan in (False, True):
        compiled, seconds = program(scan)
        rows.append(named | {"side": "scanned" if scan else "written out", "compile_cpu": seconds})
        if tpu:
            estimate = cycles(parse(compiled.as_text())) / CHIPS[args.target.split(":")[0]].clock
            rows[-1]["evaluation_ms"] = 1e3 * estimate / args.evaluations
        rows[-1]["temporary_MiB"] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        sides.append(compiled)
    if not tpu:
        values = [initial_params(arguments[0], 0), *(jnp.ones(s.shape, s.dtype) for s in (x, context))]
        spent: list[list[float]] = [[], []]
        for _ in range(args.rounds + 1):
            for side, times in zip(sides, spent, strict=True):
                start = time.process_time()
                side(*values).block_until_ready()
                times.append((time.process_time() - start) / args.evaluations)
        for row, times in zip(rows, spent, strict=True):
            row["evaluation_cpu"] = min(times)
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
