"""Convolution on a CPU: XLA's against patches times matrix, for the shapes that occur in the networks.

The rule in ``diffuse_jax/kernels/convolution.py`` is based on these results::

    python benchmarks/conv_cpu.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffuse_jax.kernels import conv2d
from diffuse_jax.kernels.convolution import choose_algorithm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -m benchmarks.conv_cpu

from common import write

SHAPES = [  # batch, height and width, channels in and out, window, stride
    (2, 8, 1280, 1280, 3, 1),
    (2, 8, 2560, 1280, 3, 1),
    (2, 16, 1280, 1280, 3, 1),
    (2, 16, 2560, 1280, 3, 1),
    (2, 16, 1280, 1280, 3, 2),
    (2, 32, 640, 640, 3, 1),
    (2, 32, 640, 640, 3, 2),
    (2, 64, 320, 320, 3, 1),
    (2, 64, 960, 320, 1, 1),
    (2, 16, 2560, 1280, 1, 1),
    (1, 64, 512, 512, 3, 1),
    (1, 256, 256, 256, 3, 1),
    (16, 16, 128, 128, 3, 1),
    (16, 8, 256, 256, 3, 1),
    (8, 8, 512, 512, 3, 1),
]


def measure(shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Fastest of interleaved runs of each algorithm, in milliseconds: wall-clock time, and CPU time on all cores."""
    batch, size, channels, features, window, stride = shape
    rng = np.random.default_rng(0)
    x = jax.device_put(rng.standard_normal((batch, size, size, channels), dtype=np.float32))
    kernel = jax.device_put(rng.standard_normal((window, window, channels, features), dtype=np.float32))
    pads = ((window // 2,) * 2,) * 2
    names = ("direct", "matmul" if window == stride == 1 else "patches")
    programs = {n: jax.jit(partial(conv2d, stride=stride, padding=pads, algorithm=n)) for n in names}
    runs = {name: partial(_wait, program, x, kernel) for name, program in programs.items()}
    best = _interleave(runs, rounds)
    work = 2 * batch * (size // stride) ** 2 * channels * features * window**2
    chosen = choose_algorithm(x.shape, kernel.shape, (stride, stride), pads)
    row = {"shape": f"{batch}x{size}x{size}x{channels}", "kernel": f"{window}x{window}x{features}", "stride": stride}
    for kind, name in zip(("direct", "matrix"), names, strict=True):
        seconds, cpu = best[name]
        row |= {f"{kind}_ms": round(seconds * 1e3, 2), f"{kind}_cpu_ms": round(cpu * 1e3, 2)}
        row[f"{kind}_gflops_per_core"] = round(work / cpu / 1e9, 1)
    return row | {"chosen": chosen}


def _wait(program: Callable[..., jax.Array], *arguments: jax.Array) -> None:
    program(*arguments).block_until_ready()


def _interleave(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, tuple[float, float]]:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(rounds + 1):  # the first compiles
        for name, run in runs.items():
            start, cpu = time.perf_counter(), time.process_time()
            run()
            if turn:
                times[name].append((time.perf_counter() - start, time.process_time() - cpu))
    return {name: (min(t for t, _ in pairs), min(c for _, c in pairs)) for name, pairs in times.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rows = [measure(shape, parser.parse_args(argv).rounds) for shape in SHAPES]
    about = (
        "XLA's convolution (direct) and the same as a matrix product (patches, or for 1x1 the pixels themselves): the "
        "fastest of interleaved runs, the least CPU time on all cores, and the resulting speed; float32."
    )
    print(write("conv_cpu", "Convolution on a CPU", about, rows, "jax", "jaxlib"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
