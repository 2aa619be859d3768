"""PyTorch diffusers, eager, as a contestant of ``pipeline.py``."""

from __future__ import annotations

from typing import Any

from serving import Contestant, serve


def setup() -> Contestant:
    import diffusers
    import torch

    pipe: Any = None

    def load(folder: str) -> None:
        nonlocal pipe
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)

    def draw(prompts: list[str], steps: int, guidance: float, seed: int) -> Any:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        return pipe(prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generators).images

    return Contestant(f"PyTorch diffusers {diffusers.__version__}", {"load": load, "draw": draw})


if __name__ == "__main__":
    serve(setup)
