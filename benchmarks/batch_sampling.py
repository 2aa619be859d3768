"""A job of many prompts with the shipped model: images per second, and how long the device waits for the host.

    python -m benchmarks.batch_sampling                      # 192 images; about ten minutes on two cores
    python -m benchmarks.batch_sampling --images 2000 --steps 20 --batch-size 64

Beside it, the same prompts in a loop: call the pipeline with a batch, save its images, go on with the next. The pixels
of both must be equal. Compilation is left out of all times.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import write

SUBJECTS = ("a red apple", "red heart", "grinning face", "watermelon", "a rocket", "a blue whale", "pizza", "umbrella")
STYLES = ("noto style", "fluent style", "twemoji style")
TARGET = 0.03
"""The part of the time that the device may wait."""


def prompts(count: int) -> list[dict[str, Any]]:
    """Prompts whose guidance differs, as those of a data set do."""
    each = lambda i: f"{SUBJECTS[i % len(SUBJECTS)]}, {STYLES[i % len(STYLES)]}"
    return [{"prompt": each(i), "guidance_scale": 3.0 + i % 4} for i in range(count)]


def loop(pipe: Any, rows: list[dict[str, Any]], folder: Path, batch: int, steps: int) -> None:
    """A loop over calls of the pipeline."""
    folder.mkdir()
    for begin in range(0, len(rows), batch):
        part = rows[begin : begin + batch]
        seeds = list(range(begin + 1, begin + 1 + len(part)))
        scales = [row["guidance_scale"] for row in part]
        out = pipe([row["prompt"] for row in part], seed=seeds, guidance_scale=scales, num_inference_steps=steps)
        for seed, image in zip(seeds, out.images, strict=True):
            image.save(folder / f"{seed:08d}-{seed}.png")


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result of some work, its seconds, and its seconds of processor time, which other programs disturb less."""
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16, help="a power of two, for the loop's sake")
    parser.add_argument("--model", default="diffuse-jax/emoji")
    parser.add_argument("--print-only", action="store_true", help="leave docs/results as it is")
    args = parser.parse_args()

    from diffuse_jax import DiffusionPipeline
    from diffuse_jax.batch import sample_many
    from diffuse_jax.sharding import make_mesh

    pipe = DiffusionPipeline.from_pretrained(args.model, mesh=make_mesh())
    rows = prompts(args.images - args.images % args.batch_size)
    few = {"guidance_scale": 3.0, "num_inference_steps": args.steps, "batch_size": args.batch_size}
    pipe.compile([row["prompt"] for row in rows[: args.batch_size]], **few)
    with tempfile.TemporaryDirectory() as folder:
        by_loop = lambda: loop(pipe, rows, Path(folder) / "loop", args.batch_size, args.steps)
        options = {"batch_size": args.batch_size, "num_inference_steps": args.steps}
        by_job = lambda: sample_many(pipe, rows, Path(folder) / "job", **options)
        _, loop_seconds, loop_cpu = timed(by_loop)
        report, job_seconds, job_cpu = timed(by_job)
        same = all(
            np.array_equal(
                np.asarray(Image.open(path)), np.asarray(Image.open(next(Path(folder, "job").rglob(path.name))))
            )
            for path in Path(folder, "loop").iterdir()
        )
    result = {
        "images": report.made,
        "batch size": args.batch_size,
        "steps": args.steps,
        "images/s": round(report.made / job_seconds, 2),
        "images/s of the loop": round(report.made / loop_seconds, 2),
        "CPU s per image": round(job_cpu / report.made, 3),
        "CPU s per image of the loop": round(loop_cpu / report.made, 3),
        "device waits": f"{100 * report.waited:.2f} %",
        "pixels equal": "yes" if same else "no",
    }
    print(json.dumps(result))
    assert not report.failed
    assert same, "the job and the loop make different images"
    if report.waited > TARGET:
        print(f"the device waits more than {100 * TARGET:.0f} % of the time")
    if not args.print_only:
        about = "A job with the shipped model against a loop over calls that saves each batch before the next."
        write("batch_sampling", "Batch sampling", about, [result], "jax", "jaxlib")


if __name__ == "__main__":
    main()
