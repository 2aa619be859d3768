"""Where a UNet step and the decoder spend their time on a CPU, layer by layer, against PyTorch's layers.

Convolutions, matrix products and self-attention of SD 1.5 for two images, and convolutions of the decoder for one, in
float32; both sides in one process, taking turns::

    python benchmarks/cpu_layers.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -m benchmarks.cpu_layers

from common import write
from conv_cpu import _interleave, _wait

from diffuse_jax.kernels import attention, conv2d

CONVOLUTIONS = [(2, 64, 320, 320), (2, 32, 640, 640), (2, 16, 1280, 1280), (1, 256, 256, 256), (1, 512, 128, 128)]
"""Batch, height and width, channels in and out, of 3x3 convolutions."""
PRODUCTS = [(8192, 320, 2560), (8192, 1280, 320), (2048, 640, 5120), (2048, 640, 640), (512, 1280, 10240)]
"""Rows, inputs and outputs."""
ATTENTIONS = [(2, 4096, 8, 40), (2, 1024, 8, 80)]
"""Batch, tokens, heads and head size."""

ABOUT = (
    "Layers of SD 1.5 in float32, this library's and PyTorch's: fastest of interleaved runs, billions of operations "
    "per second of CPU time, and the ratio of the times."
)

Sides = tuple[Callable[[], None], Callable[[], None]]


def convolution(batch: int, size: int, channels: int, features: int) -> tuple[str, float, Sides]:
    """A label, the operations, and this library's and PyTorch's run."""
    import torch

    x, kernel = normal(batch, size, size, channels), normal(3, 3, channels, features)
    run = jax.jit(partial(conv2d, stride=1, padding=((1, 1), (1, 1))))
    ours = partial(_wait, run, jnp.asarray(x), jnp.asarray(kernel))
    tensors = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    theirs = lambda: torch.nn.functional.conv2d(*tensors, padding=1)
    work = 2 * batch * size**2 * channels * features * 9
    return f"3x3 convolution, {batch}x{size}x{size}x{channels} to {features}", work, (ours, theirs)


def product(rows: int, inputs: int, outputs: int) -> tuple[str, float, Sides]:
    """As :func:`convolution`."""
    import torch

    x, kernel = normal(rows, inputs), normal(inputs, outputs)
    ours = partial(_wait, jax.jit(jnp.matmul), jnp.asarray(x), jnp.asarray(kernel))
    tensors = torch.from_numpy(x), torch.from_numpy(kernel.T.copy())
    theirs = lambda: torch.nn.functional.linear(*tensors)
    return f"matrix product, {rows}x{inputs} to {outputs}", 2 * rows * inputs * outputs, (ours, theirs)


def self_attention(batch: int, tokens: int, heads: int, depth: int) -> tuple[str, float, Sides]:
    """As :func:`convolution`."""
    import torch

    parts = [normal(batch, tokens, heads, depth) for _ in range(3)]
    ours = partial(_wait, jax.jit(attention), *map(jnp.asarray, parts))
    tensors = [torch.from_numpy(x.transpose(0, 2, 1, 3).copy()) for x in parts]
    theirs = lambda: torch.nn.functional.scaled_dot_product_attention(*tensors)
    work = 4 * batch * heads * tokens**2 * depth
    return f"self-attention, {batch}x{tokens}, {heads} heads of {depth}", work, (ours, theirs)


def normal(*shape: int) -> np.ndarray:
    """Normal noise, float32."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def measure(label: str, work: float, sides: Sides, rounds: int) -> dict[str, Any]:
    """The row of one layer."""
    import torch

    with torch.inference_mode():
        times = _interleave(dict(zip(("diffuse_jax", "PyTorch"), sides)), rounds)
    row: dict[str, Any] = {"layer": label}
    for name, (seconds, cpu) in times.items():
        row |= {f"{name} ms": 1e3 * seconds, f"{name} GFLOP/s per core": work / cpu / 1e9}
    return row | {"ratio": times["diffuse_jax"][0] / times["PyTorch"][0]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--print-only", action="store_true", help="print rows, leave docs/results unchanged")
    args = parser.parse_args(argv)
    layers = [convolution(*one) for one in CONVOLUTIONS]
    layers += [product(*one) for one in PRODUCTS] + [self_attention(*one) for one in ATTENTIONS]
    rows = [measure(*layer, args.rounds) for layer in layers]
    if args.print_only:
        print(*rows, sep="\n")
    else:
        print(write("cpu_layers", "Layers on a CPU", ABOUT, rows, "jax", "jaxlib", "torch"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
