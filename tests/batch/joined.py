"""``diffuse-jax generate --prompts-file`` with images from the stub, as a script for the test of joined processes."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import jax

import diffuse_jax
from diffuse_jax import cli
from tests.batch.stub import Stub


def main() -> int:
    def open_it(source: str, **options: Any) -> SimpleNamespace:
        if os.environ.get("FAILS") == str(jax.process_index()):
            raise OSError("there is no model")
        return SimpleNamespace(scheduler=None)

    vars(diffuse_jax)["DiffusionPipeline"] = SimpleNamespace(from_pretrained=open_it)
    from diffuse_jax.batch import job

    device: Any = lambda pipe, batch_size: Stub(pause=float(os.environ.get("PAUSE", "0")))
    job.Device = device
    return cli.main(["generate", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
