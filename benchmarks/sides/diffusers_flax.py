"""The last diffusers with Flax pipelines, run as in its documentation, as a contestant of ``pipeline.py``."""

from __future__ import annotations

from typing import Any

from serving import Contestant, count_compilations, serve


def setup() -> Contestant:
    import diffusers
    import jax
    import numpy as np
    from diffusers import FlaxStableDiffusionPipeline
    from flax.jax_utils import replicate
    from flax.training.common_utils import shard

    pipe: Any = None
    params: Any = None

    def load(folder: str) -> None:
        nonlocal pipe, params
        pipe, host = FlaxStableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)
        params = jax.block_until_ready(replicate(host))

    def draw(prompts: list[str], steps: int, guidance: float, seed: int) -> Any:
        keys = jax.random.split(jax.random.PRNGKey(seed), jax.device_count())
        ids = shard(pipe.prepare_inputs(prompts))
        images = pipe(ids, params, keys, num_inference_steps=steps, guidance_scale=guidance, jit=True).images
        return pipe.numpy_to_pil(np.asarray(images).reshape(-1, *images.shape[-3:]))

    name = f"diffusers Flax {diffusers.__version__}"
    return Contestant(name, {"load": load, "draw": draw}, count_compilations())


if __name__ == "__main__":
    serve(setup)
