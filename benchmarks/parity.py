"""Whole pipelines compared with PyTorch by ``diffuse-jax parity``, by device and dtype.

    python -m benchmarks.parity --device cpu

Writes ``docs/results/parity_<device>.json``. JAX runs on its default device, PyTorch on the named one.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import common
from diffuse_jax import torch_backend
from tests.oracle import folders

ABOUT = (
    "The same prompts, seeds and plans on both sides; PyTorch reads the checkpoint with its own loader. Largest"
    " relative error (Euclidean norm of the difference over that of PyTorch's) of the networks for equal inputs, of"
    " the latents after each step, each side on its own trajectory, and of the pixels; `same`: all of them, and every"
    " parameter and setting, are within the tolerances of the dtype. The tiny models have random weights."
)
PACKAGES = ("jax", "flax", "torch", "diffusers", "transformers")
STEPS, GUIDANCE = 10, 5.0


class Case(NamedTuple):
    """A model and a dtype; ``make`` writes its folder, or returns the id of an existing model."""

    model: str
    dtype: str
    make: Callable[[Path], Path | str]


MODELS: dict[str, Callable[[Path], Path | str]] = {
    "diffuse-jax/emoji": lambda _: "diffuse-jax/emoji",
    "tiny SD 1": folders.stable_diffusion,
    "tiny SD 2": lambda folder: folders.stable_diffusion(folder, v_prediction=True),
    "tiny SDXL": folders.stable_diffusion_xl,
}
CASES = [Case(name, dtype, make) for name, make in MODELS.items() for dtype in ("float32", "bfloat16", "float16")]


def measure(case: Case, device: str, steps: int = STEPS) -> tuple[dict[str, Any], Any]:
    """The row of the table, and the full :class:`diffuse_jax.torch_backend.parity.Result`."""
    parity = torch_backend.load("parity")
    with tempfile.TemporaryDirectory() as folder:
        sides = parity.open_sides(str(case.make(Path(folder) / "model")), dtype=case.dtype, device=device)
    options = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "seed": 0}
    result = parity.check(sides, parity.Request(("a red apple, noto style", "grinning face"), options))
    largest = lambda of: max(row.relative_error for row in result.rows if of(row.name))
    row = {
        "model": case.model,
        "dtype": case.dtype,
        "device": device_name(sides),
        "steps": steps,
        "networks": largest(lambda name: not name.startswith(("latents", "pixels"))),
        "latents": largest(lambda name: name.startswith("latents")),
        "pixels": largest(lambda name: name == "pixels"),
        "same": result.ok,
    }
    return row, result


def device_name(sides: Any) -> str:
    """The devices that JAX and PyTorch ran on."""
    found = torch_backend.load("command").devices(sides)
    return f"{found['jax_device']} (JAX), {found['torch_device']} (PyTorch)"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    rows = []
    for case in CASES:
        row, result = measure(case, args.device)
        rows.append(row)
        print(row, flush=True)
        if not result.ok:
            print(torch_backend.load("report").table(result.rows), *result.differences, sep="\n", flush=True)
    title = f"Pipelines against PyTorch on {'CUDA' if args.device == 'cuda' else 'the CPU'}"
    print(common.write(f"parity_{args.device}", title, ABOUT, rows, *PACKAGES))
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
