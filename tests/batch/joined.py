"""``diffuse-jax generate --prompts-file`` with images from the stub, as a script for the test of joined processes."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import diffuse_jax
from diffuse_jax import cli
from tests.batch.stub import Stub


def main() -> int:
    open_it = lambda source, **options: SimpleNamespace(scheduler=None)
    vars(diffuse_jax)["DiffusionPipeline"] = SimpleNamespace(from_pretrained=open_it)
    from diffuse_jax.batch import job

    device: Any = lambda pipe, batch_size: Stub()
    job.Device = device
    return cli.main(["generate", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
