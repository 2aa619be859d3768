"""Samples from a pipeline as one of several processes, as a script: for the test that compares them with one.

python tests/pipelines/sample.py MODEL OUTPUT.npy [COORDINATOR PROCESSES PROCESS]
"""

from __future__ import annotations

import sys

import jax
import numpy as np

from diffuse_jax import DiffusionPipeline
from diffuse_jax.sharding import make_mesh


def main(model: str, output: str, *distributed: str) -> None:
    if distributed:
        address, processes, process = distributed
        jax.distributed.initialize(address, int(processes), int(process))
    pipe = DiffusionPipeline.from_pretrained(model, mesh=make_mesh(data=2, fsdp=2))
    try:
        pipe(1, num_inference_steps=1)
        refused = False
    except ValueError as error:
        refused = "seed" in str(error)
    assert refused == bool(distributed), "processes that would draw different seeds are refused"
    images = pipe(3, num_inference_steps=2, seed=[5, 6, 7], output_type="np").images
    if jax.process_index() == 0:
        np.save(output, images)


if __name__ == "__main__":
    main(*sys.argv[1:])
