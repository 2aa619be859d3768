"""The part that gives a pipeline IP-Adapters, against PyTorch's pipeline with the same image embeddings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from diffuse_jax.models import IPAdapter, image_attention
from diffuse_jax.pipelines import Net, StableDiffusionPipeline, run
from diffuse_jax.pipelines.parts import Branches, with_image_prompts
from tests.oracle import folders
from tests.oracle.test_ip_adapter import nested, published, write
from tests.oracle.test_pipelines import MEAN_TOLERANCE, mean_difference, torch_images

torch, diffusers = folders.torch, folders.diffusers


def test_images_as_prompts_give_the_images_of_pytorch(tmp_path: Path, rng: np.random.Generator) -> None:
    """One adapter of embeddings with one image, one of hidden states with two; other scales compile nothing."""
    folder = folders.stable_diffusion(tmp_path / "model")
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    files = [published(form, pipe.components["unet"], seed) for seed, form in enumerate(("plain", "plus"))]
    opened = [IPAdapter.from_single_file(write(tmp_path / f"{i}.bin", tensors)) for i, (_, tensors) in enumerate(files)]
    for net, _ in opened:
        image_attention.check_fits(net.config, pipe.components["unet"].config)

    images = [rng.standard_normal(shape).astype(np.float32) for shape in ((1, 1, 20), (1, 2, 5, 20))]
    both = [np.concatenate([np.zeros_like(x), x]) for x in images]
    latents = rng.standard_normal((2, 16, 16, 4)).astype(np.float32)
    request: dict[str, Any] = {"prompt": ["a cat", "two dogs!"], "num_inference_steps": 4, "guidance_scale": 5.0}
    twin = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    twin.set_progress_bar_config(disable=True)
    states = [nested(tensors) for _, tensors in files]
    twin.load_ip_adapter(states, subfolder=["", ""], weight_name=["", ""], image_encoder_folder=None)

    nets = tuple(Net("ip_adapter", net, index) for index, (net, _) in enumerate(opened))
    pipe = StableDiffusionPipeline(
        pipe.components | {"ip_adapter": tuple(net for net, _ in opened)},
        {**pipe.params, "ip_adapter": tuple(params for _, params in opened)},
    )
    branched = tuple({"images": Branches(np.stack([np.stack([a, b])] * 2))} for a, b in both)
    compiled = None
    for scales in ([0.8, 0.5], [0.0, 1.0]):
        twin.set_ip_adapter_scale(scales)
        theirs = torch_images(twin, latents, ip_adapter_image_embeds=list(map(torch.tensor, both)), **request)
        rows = {
            "image_prompts": branched,
            "image_scale": tuple(np.full(2, scale, np.float32) for scale in scales),
            "image_masks": (None, None),
        }
        plain = pipe.request(latents=latents, output_type="np", **request)
        denoiser = with_image_prompts(plain.method.denoiser, nets)
        method = dataclasses.replace(plain.method, denoiser=denoiser)
        ours = run(pipe, plain._replace(method=method, rows=plain.rows | rows)).images
        assert mean_difference(ours, theirs) < MEAN_TOLERANCE
        compiled = compiled or pipe.programs.compilations
        assert pipe.programs.compilations == compiled
    assert 255 * np.abs(run(pipe, plain).images - ours).mean() > MEAN_TOLERANCE
