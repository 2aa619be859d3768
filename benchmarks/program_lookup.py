"""Host time of a call before its program runs: building the request, and looking up the compiled program.

    python -m benchmarks.program_lookup

Parameter trees have the published structures with one element in each array, because only the number of arrays matters
here; no network is compiled or run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import write
from diffuse_jax.models import AutoencoderKL, UNet2DConditionModel, presets
from diffuse_jax.pipelines import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffuse_jax.pipelines import method as verbs
from diffuse_jax.pipelines.programs import Programs, signature_of
from diffuse_jax.schedulers import DDIMScheduler
from diffuse_jax.text import CLIPTextModel, CLIPTextModelWithProjection
from diffuse_jax.text import presets as text

FAMILIES: dict[str, tuple[type[DiffusionPipeline], dict[str, Any]]] = {
    "Stable Diffusion 1.5": (
        StableDiffusionPipeline,
        {
            "unet": UNet2DConditionModel(presets.SD15_UNET),
            "vae": AutoencoderKL(presets.SD_VAE),
            "text_encoder": CLIPTextModel(text.CLIP_L),
        },
    ),
    "SDXL": (
        StableDiffusionXLPipeline,
        {
            "unet": UNet2DConditionModel(presets.SDXL_UNET),
            "vae": AutoencoderKL(presets.SDXL_VAE),
            "text_encoder": CLIPTextModel(text.CLIP_L),
            "text_encoder_2": CLIPTextModelWithProjection(text.OPENCLIP_BIGG),
        },
    ),
}


class Tokens:
    """A stand-in for the tokenizer: every prompt becomes the same 77 tokens."""

    model_max_length = 77

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def __call__(self, prompts: list[str], **options: Any) -> dict[str, np.ndarray]:
        return {"input_ids": np.ones((len(prompts), 77), np.int64)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="how often each is timed (default: %(default)s)")
    args = parser.parse_args()
    rows = [measured(name, *family, args.rounds) for name, family in FAMILIES.items()]
    for row in rows:
        print(row)
    about = (
        "Host time of a call before its program runs, medians: building the request (without tokenization) and its "
        "sampler's plan, and looking up the compiled program by method, mesh and all shapes."
    )
    print(write("program_lookup", "Finding a compiled program", about, rows, "jax"))


def measured(name: str, kind: type[DiffusionPipeline], networks: dict[str, Any], rounds: int) -> dict[str, Any]:
    """One row, with both times in milliseconds."""
    params = {k: jax.tree.map(lambda _: jnp.zeros(1), network.shapes()) for k, network in networks.items()}
    parts = {**networks, "tokenizer": Tokens(), "tokenizer_2": Tokens(), "scheduler": DDIMScheduler()}
    pipe = kind(parts, params, programs=Programs())
    compose = lambda: pipe.request("a lighthouse", seed=0)
    request = compose()
    rows = jax.device_put(request.rows)

    def lookup() -> None:
        arguments = (rows, request.plan)
        signature = pipe.signature_of(params), signature_of(arguments)
        pipe.programs.get(verbs.sample, request.method, None, (), (params, *arguments), signature)

    pipe.programs._compile = lambda key, args: "program"  # type: ignore[method-assign]
    return {
        "model": name,
        "arrays": len(jax.tree.leaves(params)),
        "request_milliseconds": milliseconds(compose, rounds),
        "lookup_milliseconds": milliseconds(lookup, rounds),
    }


def milliseconds(run: Callable[[], Any], rounds: int) -> float:
    """The median of ``rounds`` runs, after one that is not timed."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(times), 3)


if __name__ == "__main__":
    main()
