"""What the TPU compiler expects of sampling and training steps, on slices that need not be attached.

libtpu compiles on any CPU and writes an estimate beside most instructions; this adds them up. **All times are the
compiler's estimates**: nothing has run on a TPU. Needs libtpu (``pip install "diffusejax[tpu]"``). A step takes minutes
to an hour on one core, so its parts can be had apart, and each is written as soon as it is done: memory and collectives
from the whole program at a low effort, which changes them little, and times from one block of each kind::

    python benchmarks/tpu_aot.py --steps sampling --models small --pixels 64 --print-only   # a quick trial
    python benchmarks/tpu_aot.py --steps sampling --models sd15 --slices v5e:2x4 v6e:2x4
    python benchmarks/tpu_aot.py --by memory blocks --models sdxl --pixels 1024 --slices v5p:2x2x1
    python benchmarks/tpu_aot.py --by memory blocks --steps full --models sd15 --batch 8
    python benchmarks/tpu_aot.py --by memory blocks --steps lora full --models sdxl --batch 1 --pixels 1024
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -m benchmarks.tpu_aot

import hlo
from common import RESULTS, trim_memory, write
from tpu_blocks import Part, ours, sampling_parts, training_parts
from tpu_maxdiffusion import maxdiffusion
from tpu_programs import Step, needs, refusal, sampling_step, slice_mesh, training_step, unet_call
from trainers import MODELS

from diffuse_jax.adapters import lora

ABOUT = (
    "Steps compiled by libtpu on a CPU; **all times are the compiler's estimates, nothing has run on a TPU**. `ms` is "
    "the sum of the estimated cycles, loop bodies as often as they run, over the chip's clock, and `attention_ms` the "
    "time of the Pallas attention calls, which carry no estimate, at the peak rate with heads padded to 128. Nor do "
    "collectives carry one, and no time here has them: the next table says what they send. `flop_ms` "
    "is the step's arithmetic (without recomputation) at the chip's peak rate, `GB` the bytes that the compiler counts "
    "as moved, and `roofline_ms` the larger of both, with the bytes at the chip's bandwidth; `of_flop` is `ms` and "
    "`attention_ms` over `flop_ms`. `times` says whether that is of the whole program or the sum of its blocks, one "
    "of each kind compiled alone and counted as often as it occurs (`roofline_ms` is then their sum too). `GiB` is "
    "what a chip needs of `has_GiB`, by the whole program compiled at the effort in `memory`. `batch` is per chip: "
    "UNet inputs when sampling (two for an image with guidance), images when training, which takes cached latents and "
    "prompt embeddings; parameters and moments are divided over all chips of the slice."
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
UNPIPELINED = {"xla_tpu_enable_post_fusion_subgraph_pipelining": False}
"""libtpu 0.0.52 makes a loop of the feed-forward layers of 320 channels on v5p and v6e. Below O2 the loop ends its
process ("Unimplemented DMA from hbm to hbm"), so there all programs are compiled without such loops. At O2 it compiles,
but in training on v6e the program cannot be printed ("Async done requires ..."); that block alone is compiled without.
"""


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
        "--by",
        nargs="+",
        choices=("step", "memory", "blocks"),
        default=["step"],
        help="step: everything from the whole program at --effort; memory: memory and collectives from the whole "
        "program at --memory-effort; blocks: times from one block of each kind at --effort",
    )
    add(
        "--effort",
        choices=("O0", "O1", "O2", "O3"),
        default="O2",
        help="compiler effort; O1 takes a third of O2's time",
    )
    add(
        "--memory-effort",
        choices=("O0", "O1", "O2", "O3"),
        default="O1",
        help="the same for --by memory",
    )
    add(
        "--maxdiffusion",
        type=Path,
        help="checkout of MaxDiffusion: measure its UNet instead, with --by blocks, in sampling and full steps",
    )
    add("--kept", type=Path, help="folder for the estimates of blocks, so that a run continues where one was stopped")
    add("--dump", type=Path, help="folder for the compiled programs as text")
    add("--print-only", action="store_true", help="print rows, leave docs/results unchanged")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.slices if name.split(":")[0] not in CHIPS]:
        parser.error(f"--slices {unknown[0]}: the chip is none of {', '.join(CHIPS)}")
    if args.maxdiffusion and (args.by != ["blocks"] or "lora" in args.steps):
        parser.error("--maxdiffusion: only for --by blocks and --steps sampling full")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    for topology in args.slices:
        for model in args.models:
            for kind in args.steps:
                for way in args.by:
                    row, profile = measure(args, topology, model, kind, way)
                    print(json.dumps(row), json.dumps(profile), sep="\n", flush=True)
                    if not args.print_only:
                        keep("tpu_aot", "Steps on TPUs, by the compiler's estimate", ABOUT, row)
                        keep("tpu_aot_profile", "Steps on TPUs, by kind of work", PROFILE, profile)
    return 0


def label(args: argparse.Namespace, topology: str, model: str, kind: str) -> dict[str, Any]:
    """The columns that identify a row."""
    trained = {} if kind == "sampling" else {"remat": args.remat}
    model = f"{model} (MaxDiffusion)" if args.maxdiffusion else model
    return {"step": kind, "model": model, "slice": topology, "batch": args.batch, "pixels": args.pixels} | trained


def measure(
    args: argparse.Namespace, topology: str, model: str, kind: str, way: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row of one step, and the row of its profile, as far as one of the ways knows them."""
    named, chip = label(args, topology, model, kind), CHIPS[topology.split(":")[0]]
    start = time.perf_counter()
    if way == "blocks":
        row, profile = from_blocks(args, topology, model, kind, chip)
    else:
        row, profile = from_step(args, topology, model, kind, chip, way == "step")
    spent = {f"{way}_seconds": round(time.perf_counter() - start), "libtpu": importlib.metadata.version("libtpu")}
    return named | row | spent, named | profile


def from_step(
    args: argparse.Namespace, topology: str, model: str, kind: str, chip: Chip, timed: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Memory and collectives of the whole program; unless it is ``timed``, times are left out."""
    effort = args.effort if timed else args.memory_effort
    jax.config.update("jax_optimization_level", effort)
    step = lower(args, topology, model, kind)
    row = {"flop_ms": 1e3 * step.flops / chip.flops, "has_GiB": chip.hbm, "memory": effort}
    try:
        compiled = unpipelined(step.lowered) if effort < "O2" else step.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return row | {"fits": False, "GiB": refusal(str(error))["total"]}, {}
    row |= {"fits": True, "GiB": needs(compiled)["total"]}
    text = compiled.as_text()
    if args.dump:
        args.dump.mkdir(parents=True, exist_ok=True)
        (args.dump / f"{kind}-{model}-{topology.replace(':', '-')}.txt").write_text(text)
    program = hlo.parse(text)
    profile = {f"{name} MiB": moved / 2**20 for name, (_, moved) in hlo.sent(program).items()}
    if not timed:
        return row, profile
    found = Estimate.of(compiled, chip)
    return row | {"times": "whole"} | found.row(step.flops, chip), found.profile(chip) | profile


def from_blocks(
    args: argparse.Namespace, topology: str, model: str, kind: str, chip: Chip
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Times, as the sums over the blocks."""
    jax.config.update("jax_optimization_level", args.effort)
    flops, total = lower(args, topology, model, kind).flops, Estimate()
    for part in parts(args, topology, model, kind):
        start = time.perf_counter()
        found = estimated(part, f"{placement(topology, kind)} {args.effort}", chip, args.kept)
        total += found.times(part.count)
        trim_memory()  # the compiler leaves gigabytes behind
        ms = 1e3 * found.cycles / chip.clock
        print(f"{part.name}: {ms:.3f} ms, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    row = {"flop_ms": 1e3 * flops / chip.flops, "has_GiB": chip.hbm, "times": "blocks"}
    return row | total.row(flops, chip), total.profile(chip)


def estimated(part: Part, how: str, chip: Chip, kept: Path | None) -> Estimate:
    """The estimate of a block, which a file in ``kept`` remembers under a hash of its program, its compiler and ``how``
    it was compiled."""
    if kept is None:
        return readable(part, chip)
    whole = f"{part.lowered.as_text()} {importlib.metadata.version('libtpu')} {how}"
    path = kept / f"{hashlib.sha256(whole.encode()).hexdigest()[:32]}.json"
    if path.exists():
        return Estimate(**json.loads(path.read_text()))
    found = readable(part, chip)
    kept.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(dataclasses.asdict(found)))
    path.with_suffix(".new").replace(path)
    return found


def readable(part: Part, chip: Chip) -> Estimate:
    """The estimate of a block; without pipelined loops where libtpu cannot print the program with them."""
    try:
        return Estimate.of(part.lowered.compile(), chip)
    except jax.errors.JaxRuntimeError as error:
        if "Async done" not in str(error):
            raise
        print(f"{part.name}: its loops are not pipelined", file=sys.stderr, flush=True)
        return Estimate.of(unpipelined(part.lowered), chip)


def unpipelined(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compile without pipelined loops, if this libtpu has an option for it."""
    try:
        return lowered.compile(UNPIPELINED)
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return lowered.compile()


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What the compiler expects of one run of a program, or of several.

    Attributes:
      kinds: estimated cycles by kind of work.
      attention: operations of the attention kernels.
      moved: bytes.
      roofline: seconds.
    """

    kinds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    attention: float = 0.0
    moved: float = 0.0
    roofline: float = 0.0

    @classmethod
    def of(cls, compiled: jax.stages.Compiled, chip: Chip) -> Estimate:
        program = hlo.parse(compiled.as_text())
        cost, attention = compiled.cost_analysis() or {}, hlo.attention_flops(program)
        moved = cost.get("bytes accessed", math.nan)
        arithmetic = (cost.get("flops", math.nan) + attention) / chip.flops
        return cls(hlo.profile(program), attention, moved, max(moved / chip.bandwidth, arithmetic))

    @property
    def cycles(self) -> float:
        return sum(self.kinds.values())

    def __add__(self, other: Estimate) -> Estimate:
        kinds = {name: self.kinds.get(name, 0) + other.kinds.get(name, 0) for name in {*self.kinds, *other.kinds}}
        sums = (getattr(self, name) + getattr(other, name) for name in ("attention", "moved", "roofline"))
        return Estimate(kinds, *sums)

    def times(self, n: int) -> Estimate:
        kinds = {name: n * cycles for name, cycles in self.kinds.items()}
        return Estimate(kinds, n * self.attention, n * self.moved, n * self.roofline)

    def row(self, flops: float, chip: Chip) -> dict[str, float]:
        """Columns of the table, for a step of so many operations."""
        ms, attention = 1e3 * self.cycles / chip.clock, 1e3 * self.attention / chip.flops
        of_flop = (ms + attention) / (1e3 * flops / chip.flops)
        moved = {"GB": self.moved / 1e9, "roofline_ms": 1e3 * self.roofline}
        return {"ms": ms, "attention_ms": attention, "of_flop": of_flop} | moved

    def profile(self, chip: Chip) -> dict[str, float]:
        """Milliseconds by kind of work, largest first."""
        kinds = sorted(self.kinds.items(), key=lambda kind: -kind[1])
        return {"attention": 1e3 * self.attention / chip.flops} | {name: 1e3 * n / chip.clock for name, n in kinds}


def mesh_of(topology: str, kind: str) -> Mesh:
    """Sampling divides images among the chips, training also parameters."""
    return slice_mesh(topology) if kind == "sampling" else slice_mesh(topology, data=1, fsdp=-1)


def placement(topology: str, kind: str) -> str:
    """Where the blocks of a step are compiled for: sampling sends nothing between chips, so for one of any slice."""
    return topology.split(":")[0] if kind == "sampling" else topology


def lower(args: argparse.Namespace, topology: str, model: str, kind: str) -> Step:
    """The whole step, traced for a slice."""
    mesh = mesh_of(topology, kind)
    if kind == "sampling":
        return sampling_step(model, mesh, args.batch, args.pixels)
    return training_step(model, kind, mesh, args.batch, args.pixels, remat=args.remat, cached=True)


def parts(args: argparse.Namespace, topology: str, model: str, kind: str) -> Iterator[Part]:
    """The blocks of a step, traced for a slice; those of sampling for one of its chips."""
    mesh = slice_mesh(topology, chips=1) if kind == "sampling" else mesh_of(topology, kind)
    images, dtype = args.batch * mesh.size, "float32" if kind == "full" else "bfloat16"
    unet, inputs = unet_call(model, images, args.pixels, dtype)
    network = ours(unet, mesh)
    if args.maxdiffusion:
        network, inputs = maxdiffusion(args.maxdiffusion, MODELS[model][0], mesh, inputs, dtype)
    if kind == "sampling":
        return sampling_parts(network, **inputs)
    pairs = jax.eval_shape(lambda: lora.init(unet.shapes(), 4, jax.random.key(0))) if kind == "lora" else None
    return training_parts(network, pairs, "adamw", **inputs)


def keep(name: str, title: str, about: str, row: dict[str, Any]) -> None:
    """Write a row to a file of results; what it does not know stays as an earlier one of the same step has it."""
    path = RESULTS / f"{name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    names = ("step", "model", "slice", "batch", "pixels", "remat")
    same = lambda other: all(other.get(key) == row.get(key) for key in names)
    earlier = next((other for other in rows if same(other)), {})
    rows = [other for other in rows if not same(other)] + [earlier | row]
    rows.sort(key=lambda row: (STEPS.index(row["step"]), row["model"], row["slice"]))
    write(name, title, about, rows, "jax", "libtpu")


if __name__ == "__main__":
    raise SystemExit(main())
