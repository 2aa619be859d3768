"""What the TPU compiler expects of sampling and training steps, on slices that need not be attached.

libtpu compiles on any CPU and writes an estimate beside most instructions; this adds them up. **All times are the
compiler's estimates**: nothing has run on a TPU. Needs libtpu (``pip install "diffusejax[tpu]"``). A step takes minutes
to an hour on one core, and each is written as soon as it is done::

    python benchmarks/tpu_aot.py --steps sampling --models small --pixels 64 --print-only   # a quick trial
    python benchmarks/tpu_aot.py --steps sampling --models sd15 sdxl --slices v5e:2x4 v6e:2x4
    python benchmarks/tpu_aot.py --steps full --models sd15 --batch 8
    python benchmarks/tpu_aot.py --steps lora full --models sdxl --batch 1 --pixels 1024 --slices v5p:2x2x1
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -m benchmarks.tpu_aot

import hlo
from common import RESULTS, write
from tpu_programs import Step, needs, refusal, sampling_step, slice_mesh, training_step
from trainers import MODELS

ABOUT = (
    "Steps compiled by libtpu on a CPU; **all times are the compiler's estimates, nothing has run on a TPU**. `ms` is "
    "the sum of the estimated cycles, loop bodies as often as they run, over the chip's clock, and `attention_ms` the "
    "time of the Pallas attention calls, which carry no estimate, at the peak rate with heads padded to 128. `flop_ms` "
    "is the step's arithmetic (without recomputation) and `hbm_ms` the bytes that the compiler counts, at the chip's "
    "peak rates; `of_flop` is `ms` and `attention_ms` over `flop_ms`. `GiB` is what a chip needs, of `has_GiB`. "
    "`batch` is per chip: UNet inputs when sampling (two for an image with guidance), images when training."
)
PROFILE = (
    "The same steps by kind of work: milliseconds of the compiler's estimate, and the bytes that collectives send. "
    "`attention` is the Pallas calls at the peak rate."
)


class Chip(NamedTuple):
    """What its maker says of a chip: HBM in GiB, operations a second in bfloat16, bytes a second, and clock in Hz.

    The clock is that at which all matrix units together reach the stated rate.
    """

    hbm: float
    flops: float
    bandwidth: float
    clock: float


CHIPS = {
    "v4": Chip(32, 275e12, 1.23e12, 1.05e9),
    "v5e": Chip(16, 197e12, 0.82e12, 1.5e9),
    "v5p": Chip(95, 459e12, 2.77e12, 1.75e9),
    "v6e": Chip(32, 918e12, 1.64e12, 1.75e9),
}
STEPS = ("sampling", "full", "lora")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", nargs="+", choices=STEPS, default=["sampling"], help="a UNet evaluation, or a step of training")
    add("--models", nargs="+", choices=sorted(MODELS), default=["sd15"])
    add("--slices", nargs="+", default=["v5e:2x4"], help="types and shapes: v5e:2x4, v5p:2x2x1, v6e:2x4, v5e:4x4 ...")
    add("--batch", type=int, default=2, help="per chip: UNet inputs when sampling, images when training")
    add("--pixels", type=int, default=512)
    add("--remat", default="blocks", help="like --remat_policy of the trainers")
    add(
        "--effort",
        choices=("O0", "O1", "O2", "O3"),
        default="O2",
        help="compiler effort; O1 takes a third of O2's time",
    )
    add("--dump", type=Path, help="folder for the compiled programs as text")
    add("--print-only", action="store_true", help="print rows, leave docs/results unchanged")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.slices if name.split(":")[0] not in CHIPS]:
        parser.error(f"--slices {unknown[0]}: the chip is none of {', '.join(CHIPS)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    jax.config.update("jax_optimization_level", args.effort)
    for topology in args.slices:
        for model in args.models:
            for kind in args.steps:
                row, profile = measure(args, topology, model, kind)
                print(json.dumps(row), json.dumps(profile), sep="\n", flush=True)
                if not args.print_only:
                    keep("tpu_aot", "Steps on TPUs, by the compiler's estimate", ABOUT, row)
                    keep("tpu_aot_profile", "Steps on TPUs, by kind of work", PROFILE, profile)
    return 0


def label(args: argparse.Namespace, topology: str, model: str, kind: str) -> dict[str, Any]:
    """The columns that identify a row."""
    trained = {} if kind == "sampling" else {"remat": args.remat}
    return {"step": kind, "model": model, "slice": topology, "batch": args.batch, "pixels": args.pixels} | trained


def measure(args: argparse.Namespace, topology: str, model: str, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row of one step, and the row of its profile."""
    start, named = time.perf_counter(), label(args, topology, model, kind)
    chip = CHIPS[topology.split(":")[0]]
    step = lower(args, topology, model, kind)
    print(f"{named}: traced in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    start = time.perf_counter()
    row = named | {"effort": args.effort, "flop_ms": 1e3 * step.flops / chip.flops, "has_GiB": chip.hbm}
    try:
        compiled = step.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = refusal(str(error))
        return row | {"fits": False, "GiB": found["total"]}, named
    text = compiled.as_text()
    if args.dump:
        args.dump.mkdir(parents=True, exist_ok=True)
        (args.dump / f"{kind}-{model}-{topology.replace(':', '-')}.txt").write_text(text)
    program, memory, cost = hlo.parse(text), needs(compiled), compiled.cost_analysis() or {}
    to_ms = lambda cycles: 1e3 * cycles / chip.clock
    attention = 1e3 * hlo.attention_flops(program) / chip.flops
    total = to_ms(hlo.cycles(program))
    row |= {
        "ms": total,
        "attention_ms": attention,
        "of_flop": (total + attention) / row["flop_ms"],
        "hbm_ms": 1e3 * cost.get("bytes accessed", float("nan")) / chip.bandwidth,
        "fits": True,
        "GiB": memory["total"],
        "compile_seconds": round(time.perf_counter() - start),
    }
    sent = hlo.sent(program)
    profile = named | {"attention": attention} | {name: to_ms(n) for name, n in hlo.profile(program).items()}
    return row, profile | {f"{name} MiB": moved / 2**20 for name, (_, moved) in sent.items()}


def lower(args: argparse.Namespace, topology: str, model: str, kind: str) -> Step:
    """The step, traced for a slice: sampling shards images, training also parameters."""
    if kind == "sampling":
        return sampling_step(model, slice_mesh(topology), args.batch, args.pixels)
    mesh = slice_mesh(topology, data=1, fsdp=-1)
    return training_step(model, kind, mesh, args.batch, args.pixels, remat=args.remat)


def keep(name: str, title: str, about: str, row: dict[str, Any]) -> None:
    """Write a row to a file of results, in place of an earlier one of the same step."""
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    names = ("step", "model", "slice", "batch", "pixels", "remat")
    same = lambda other: all(other.get(key) == row.get(key) for key in names)
    write(name, title, about, [other for other in before if not same(other)] + [row], "jax", "libtpu")


if __name__ == "__main__":
    raise SystemExit(main())
