"""In place of a pipeline and its device: images whose pixels are a function of prompt and seed, made in no time.

As a script, a job with a pause for each image, for tests that end it: ``python tests/batch/stub.py PROMPTS OUTPUT``.
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from diffuse_jax.batch.device import Batch, Call, Clock, Made
from diffuse_jax.batch.job import LAYOUTS, Report, sample
from diffuse_jax.batch.jobs import Image, Rules, checked
from diffuse_jax.batch.lines import lines_of
from diffuse_jax.batch.loop import Job
from diffuse_jax.batch.reporting import failures_file
from diffuse_jax.batch.sinks import Sink


class Stub:
    """Refuses prompts with the word "refused"; notes the batches that it made."""

    def __init__(self, largest: int = 4, pause: float = 0.0, shape: tuple[int, int, int] = (8, 8, 3)) -> None:
        self.largest, self.pause, self.shape, self.ahead, self.clock = largest, pause, shape, 2, Clock()
        self.batches: list[list[str]] = []

    def close(self) -> None:
        pass

    def group(self, image: Image) -> Hashable:
        return image.job.group

    def batch(self, images: Sequence[Image]) -> Batch:
        if any("refused" in image.job.call["prompt"] for image in images):
            raise ValueError("the prompt is refused")
        return Batch(None, None, images, None)

    def start(self, batch: Batch) -> Iterator[Call]:
        self.batches.append([image.key for image in batch.images])
        results: Future[list[Made]] = Future()
        results.set_result([Made(image, self.pixels(image), None) for image in batch.images])
        yield Call(batch, 0, len(batch.images), self.largest, results)

    def finish(self, call: Call) -> list[Made]:
        time.sleep(self.pause)
        return call.results.result()

    def pixels(self, image: Image) -> np.ndarray:
        value = zlib.crc32(f"{image.job.call['prompt']} {image.seed}".encode())
        return np.full(self.shape, value % 256, np.uint8)


def job_of(prompts: Any, sink: Sink, **options: Any) -> Job:
    """A job with a sink; ``options`` are those of ``Job``, ``keep``, and the settings of rows."""
    fields = {name: options.pop(name) for name in ("rows_per_block", "process", "kind", "quality") if name in options}
    fields = {"kind": "png", "quality": 90, "rows_per_block": 10} | fields
    rules = Rules(checked(options), 0, (), {"model": "stub"})
    return Job(lines_of(prompts, rules.known), rules, sink, **fields)


def run(
    prompts: Any, output: Path, stub: Any = None, layout: str = "folder", sink: Sink | None = None, **options: Any
) -> Report:
    """A job from prompts to files."""
    output.mkdir(exist_ok=True)
    to_sample: dict[str, Callable[..., Any]] = {k: options.pop(k) for k in ("report", "stop") if k in options}
    job = job_of(prompts, sink or LAYOUTS[layout](output), **options)
    return sample(job, stub or Stub(), failures_file(output, job.process), **to_sample)


if __name__ == "__main__":
    prompts, output, layout, index, count = sys.argv[1:]
    run(prompts, Path(output), Stub(1, pause=0.02), layout, process=(int(index), int(count)))
