"""The first thing to run on a new machine: are all chips there, fast, and right?

    python tpu/check.py                   # on a TPU VM, on a GPU, on a CPU
    python tpu/check.py --json > report.json

On a slice, start it on every worker: ``python -m tpu run NAME -- python tpu/check.py``. It measures a matrix product on
every device and an all-reduce over all of them against what the manufacturer says, trains a model for two steps, draws
an image with it, and saves and loads the compiled program. The exit status is 0 if every check passed, otherwise 1. The
report is what a bug report asks for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
# Run as a script, Python looks for modules in this folder; the package that is meant is the folder itself.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != HERE]
if str(HERE.parent) not in sys.path:
    sys.path.append(str(HERE.parent))

MATMUL_SHARE, REDUCE_SHARE = 0.5, 0.05
"""Less than this part of the peak is a failure. Both are deliberately low; they have not been tuned on TPUs. What an
all-reduce can reach depends on the shape of the slice: one with few links per chip cannot use them all."""
PROMPT = "a red apple"


class Result(NamedTuple):
    """What a check found.

    Attributes:
      ok: whether it passed.
      text: for people.
      values: for programs.
    """

    ok: bool
    text: str
    values: dict[str, Any]


def main() -> int:
    args = parse_args()
    import jax

    from diffuse_jax.training.distributed import initialize_distributed
    from diffuse_jax.training.settings import ProcessSettings

    initialize_distributed(ProcessSettings())
    report: dict[str, Any] = {
        "host": socket.gethostname(),
        "process": jax.process_index(),
        "processes": jax.process_count(),
        "checks": {},
    }
    show = lambda line: None if args.json else print(line, flush=True)
    show(f"{report['host']}: process {report['process']} of {report['processes']}")
    for name, check in CHECKS.items():
        begin = time.perf_counter()
        try:
            result = check(args)
        except Exception as error:  # the report says so, and the other checks run
            result = Result(False, f"{type(error).__name__}: {error}".splitlines()[0][:300], {})
        seconds = round(time.perf_counter() - begin, 2)
        report["checks"][name] = {"ok": result.ok, "text": result.text, "seconds": seconds, **result.values}
        show(f"{'pass' if result.ok else 'FAIL'}  {name:<14} {result.text}  [{seconds:.1f} s]")
    failed = [name for name, check in report["checks"].items() if not check["ok"]]
    report["ok"] = not failed
    if args.json:
        print(json.dumps(report, indent=2), flush=True)
    show(f"{len(failed)} of {len(CHECKS)} checks failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--json", action="store_true", help="print the report as JSON instead of text")
    add("--model", default="diffuse-jax/emoji", help="folder or Hub id of a Stable Diffusion (the shipped model)")
    add("--matrix", type=_count, help="side of the matrices (8192; 1024 on a CPU)")
    add("--megabytes", type=_count, help="bytes of each device in the all-reduce (64; 4 on a CPU)")
    return parser.parse_args()


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def versions(args: argparse.Namespace) -> Result:
    """What is installed."""
    import platform

    import diffuse_jax
    from diffuse_jax.cli import REQUIRED, version

    found = {"diffuse_jax": diffuse_jax.__version__, "python": platform.python_version()}
    found |= {name: version(name) for name in (*REQUIRED, "libtpu")}
    text = ", ".join(f"{name} {found[name]}" for name in ("diffuse_jax", "python", "jax", "libtpu"))
    return Result(True, f"{text} on {platform.platform()}", {"versions": found})


def devices(args: argparse.Namespace) -> Result:
    """Every chip of a slice is there; the memory of each is reported."""
    import jax

    from tpu.slices import generation_of, slices_of

    every, here = jax.devices(), jax.local_devices()
    kind = here[0].device_kind
    values: dict[str, Any] = {"kind": kind, "platform": here[0].platform, "devices": len(every), "local": len(here)}
    text = f"{len(every)} x {kind}, {len(here)} of them here"
    if (stats := here[0].memory_stats()) and "bytes_limit" in stats:
        values["memory"] = stats["bytes_limit"]
        text += f", {stats['bytes_limit'] / 2**30:.1f} GiB each"
    if here[0].platform != "tpu":
        return Result(True, f"{text}; not a TPU", values)
    values["topology"] = "x".join(map(str, extent([device.coords for device in every])))
    text += f", topology {values['topology']}"
    if math.prod(extent([device.coords for device in every])) > len({device.coords for device in every}):
        return Result(False, f"{text}: some of its chips are missing", values)
    generation = generation_of(kind)
    if generation is None:
        return Result(True, f"{text}; a generation that is not in tpu/slices.py", values)
    chips = len({device.coords for device in every})
    if chips not in [one.chips for one in slices_of(generation)]:
        return Result(False, f"{text}: {generation.name} has no slice of {chips}; do all workers run this?", values)
    return Result(True, text, values)


def extent(coordinates: list[tuple[int, ...]]) -> list[int]:
    """The lengths of the box around the chips."""
    return [max(axis) - min(axis) + 1 for axis in zip(*coordinates)]


def matmul(args: argparse.Namespace) -> Result:
    """The speed of a bfloat16 matrix product on each device of this process, one after the other: a slow one shows."""
    import jax
    import jax.numpy as jnp

    from diffuse_jax.training.flops import peak_flops

    side, rounds = (args.matrix or 1024, 2) if jax.default_backend() == "cpu" else (args.matrix or 8192, 30)
    again = jax.jit(lambda x: jax.lax.fori_loop(0, rounds, lambda _, y: (y @ x) / side, x))
    speeds, wrong = [], []
    for device in jax.local_devices():
        x = jax.device_put(jnp.ones((side, side), jnp.bfloat16), device)
        speeds.append(2.0 * side**3 * rounds / seconds_of(again, x))
        if not bool((again(x) == 1).all()):
            wrong.append(device.id)
    peak, slow = peak_flops(jax.local_devices()[0]), min(speeds)
    values = {"side": side, "flops": speeds, "peak": peak}
    text = f"{slow / 1e12:.3g} to {max(speeds) / 1e12:.3g} TFLOP/s on {len(speeds)} device(s) at {side} x {side}"
    if wrong:
        return Result(False, f"{text}; wrong products on device {wrong}", values)
    if peak is None:
        return Result(True, f"{text}; peak of this device unknown", values)
    text += f", {slow / peak:.0%} of {peak / 1e12:.0f}"
    at = jax.local_devices()[speeds.index(slow)].id
    return Result(slow >= MATMUL_SHARE * peak, f"{text} (slowest: device {at}; at least {MATMUL_SHARE:.0%})", values)


def interconnect(args: argparse.Namespace) -> Result:
    """Sums over all devices are right, and as fast as the links allow.

    The bandwidth is what a ring would need: each of ``n`` devices sends ``2 (n - 1) / n`` times its bytes.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from tpu.slices import generation_of

    every, cpu = jax.devices(), jax.default_backend() == "cpu"
    n, rounds = len(every), 2 if cpu else 20
    size = (args.megabytes or (4 if cpu else 64)) * 2**20 // 4
    if n == 1:
        return Result(True, "one device: nothing to connect", {"devices": 1})
    mesh = Mesh(np.asarray(every), ("all",))
    rows = NamedSharding(mesh, PartitionSpec("all"))
    row = lambda at: np.full((1, size), at[0].start or 0, np.float32)  # the number of the device
    x = jax.make_array_from_callback((n, size), rows, row)

    def mean(y: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, rounds, lambda _, z: jax.lax.pmean(z, "all"), y)

    spec = PartitionSpec("all")
    reduce = jax.jit(jax.shard_map(mean, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    found = {float(jnp.max(jnp.abs(shard.data - (n - 1) / 2))) for shard in reduce(x).addressable_shards}
    speed = 2 * (n - 1) / n * size * 4 * rounds / seconds_of(reduce, x)
    values: dict[str, Any] = {"devices": n, "bytes": size * 4, "bytes_per_second": speed}
    text = f"sum over {n} devices, {size * 4 >> 20} MiB each: {speed / 1e9:.3g} GB/s per device"
    if max(found) > 1e-3 * n:
        return Result(False, f"{text}; the sum is wrong by {max(found):g}", values)
    generation = generation_of(every[0].device_kind)
    if generation is None:
        return Result(True, f"{text}; peak of this interconnect unknown", values)
    values["peak"] = peak = generation.interconnect
    share = f"{speed / peak:.0%} of {peak / 1e9:.0f} over all links"
    return Result(speed >= REDUCE_SHARE * peak, f"{text}, {share} (at least {REDUCE_SHARE:.0%})", values)


def seconds_of(function: Callable[[Any], Any], x: Any) -> float:
    """The shortest of three runs, after one that compiles."""
    function(x).block_until_ready()
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        function(x).block_until_ready()
        times.append(time.perf_counter() - begin)
    return min(times)


def sample(args: argparse.Namespace) -> Result:
    """An image for each device of this process, and again in another pipeline from the saved program."""
    import jax
    import numpy as np

    from diffuse_jax import DiffusionPipeline
    from diffuse_jax.pipelines.programs import Programs
    from diffuse_jax.sharding import make_mesh

    mesh = make_mesh(devices=jax.local_devices())
    images, times, compiled = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            opened = DiffusionPipeline.from_pretrained(args.model, mesh=mesh)
            pipe = dataclasses.replace(opened, programs=Programs()).load_compiled(folder)  # as in another process
            begin = time.perf_counter()
            out = pipe([PROMPT] * mesh.size, num_inference_steps=4, seed=[0] * mesh.size, output_type="np")
            images.append(out.images)
            times.append(time.perf_counter() - begin)
            compiled.append(pipe.programs.compilations)
            pipe.save_compiled(folder)
    first, second = map(np.asarray, images)
    values = {"first_seconds": times[0], "from_saved_seconds": times[1], "compilations": compiled}
    text = f"{len(first)} image(s): {times[0]:.1f} s, {times[1]:.1f} s from the saved program"
    if not np.isfinite(first).all() or first.std() < 1e-3:
        return Result(False, f"{text}; the image is empty or not finite", values)
    if np.abs(first - first[:1]).max() > 1e-2:
        return Result(False, f"{text}; devices draw different images for one seed", values)
    if compiled[1]:
        return Result(False, f"{text}; the saved program was not used", values)
    if not np.array_equal(first, second):
        return Result(False, f"{text}; the saved program draws another image", values)
    return Result(True, text, values)


def train(args: argparse.Namespace) -> Result:
    """Two training steps of the UNet on all devices of all processes, on one image: the loss is finite, and the
    parameters change."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from diffuse_jax import DiffusionPipeline
    from diffuse_jax.sharding import make_mesh, param_shardings, put_params, readable, train_batch_sharding
    from diffuse_jax.training.families import trained_family
    from diffuse_jax.training.latent import loss_of, networks, whole
    from diffuse_jax.training.objective import Objective
    from diffuse_jax.training.state import init_state, make_step

    pipe = DiffusionPipeline.from_pretrained(args.model)
    mesh = make_mesh()
    side = pipe.components["unet"].config.sample_size * 2 ** (len(pipe.components["vae"].config.block_out_channels) - 1)
    rows = (1, mesh.size)
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    host = {"pixel_values": np.broadcast_to(pixels, (*rows, *pixels.shape))}
    for name, words in trained_family(pipe).words(pipe).items():
        ids = words.ids(PROMPT)
        host[name] = np.broadcast_to(ids, (*rows, *ids.shape))
    place = train_batch_sharding(mesh)
    batch = {
        name: jax.make_array_from_callback(x.shape, place, lambda at, x=x: x[at])  # type: ignore[misc]
        for name, x in host.items()
    }
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), {"unet": pipe.params["unet"]})
    frozen = put_params({name: tree for name, tree in pipe.params.items() if name != "unet"}, mesh)
    optimizer = optax.adamw(1e-4)
    state = init_state(params, optimizer, False, mesh)
    objective = Objective(scheduler=pipe.scheduler)
    loss = loss_of(pipe, whole(networks(pipe)), objective)
    step = make_step(loss, optimizer, 0, shardings=param_shardings(state, mesh))
    losses, times = [], []
    for _ in range(2):
        begin = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - begin)
    apart = jax.tree.map(lambda new, old: jnp.abs(new - old).max(), state.params, params)
    moved = float(readable(jax.tree.reduce(jnp.maximum, apart)))
    values = {"losses": losses, "first_seconds": times[0], "second_seconds": times[1], "largest_change": moved}
    text = f"losses {losses[0]:.4g}, {losses[1]:.4g}; {mesh.size} image(s) a step: {times[0]:.1f} s, {times[1]:.2f} s"
    if not all(map(math.isfinite, losses)) or not 0 < moved < 1:
        return Result(False, f"{text}; largest change of a parameter {moved:g}", values)
    return Result(True, text, values)


CHECKS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "versions": versions,
    "devices": devices,
    "matmul": matmul,
    "interconnect": interconnect,
    "sample": sample,
    "train": train,
}

if __name__ == "__main__":
    raise SystemExit(main())
