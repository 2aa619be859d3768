"""This library as a contestant of ``pipeline.py``."""

from __future__ import annotations

from typing import Any

from serving import Contestant, count_compilations, serve


def setup() -> Contestant:
    import jax

    import diffuse_jax

    pipe: Any = None

    def load(folder: str, programs: str | None = None) -> None:
        nonlocal pipe
        pipe = diffuse_jax.DiffusionPipeline.from_pretrained(folder)
        jax.block_until_ready(pipe.params)
        if programs is not None:
            pipe.load_compiled(programs)

    def draw(prompts: list[str], steps: int, guidance: float, seed: int) -> Any:
        seeds = [seed + i for i in range(len(prompts))]
        return pipe(prompts, num_inference_steps=steps, guidance_scale=guidance, seed=seeds).images

    def save(programs: str) -> None:
        pipe.save_compiled(programs)

    name = f"diffuse_jax {diffuse_jax.__version__}"
    return Contestant(name, {"load": load, "draw": draw, "save": save}, count_compilations())


if __name__ == "__main__":
    serve(setup)
