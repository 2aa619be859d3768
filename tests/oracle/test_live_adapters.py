"""Live adapters of SDXL, with both of its text encoders, mixed and scaled as by PEFT in PyTorch diffusers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.pipelines.programs import Programs

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
pytest.importorskip("peft")
torch, diffusers = folders.torch, folders.diffusers

LAYERS = {
    "unet": ("attn1.to_q", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "resnets.0.conv1"),
    "text_encoder": ("self_attn.q_proj", "mlp.fc1"),
    "text_encoder_2": ("self_attn.v_proj", "self_attn.out_proj", "mlp.fc2"),
}
"""Ends of the names of the layers that the files change."""

PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def write(file: Path, twin: Any, rank: int, seed: int) -> Path:
    """A file as kohya's scripts write it."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    random = lambda *shape: torch.randn(shape, generator=generator) * 0.1
    for network, ends in LAYERS.items():
        for name, module in getattr(twin, network).named_modules():
            if not name.endswith(ends):
                continue
            out, inner, *window = module.weight.shape
            name = name if network == "unet" or name.startswith("text_model.") else f"text_model.{name}"
            stem = PREFIXES[network] + name.replace(".", "_")
            tensors[f"{stem}.lora_down.weight"] = random(rank, inner, *window)
            tensors[f"{stem}.lora_up.weight"] = random(out, rank, *[1] * len(window))
            tensors[f"{stem}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, file)
    return file


def test_both_text_encoders_of_sdxl(tmp_path: Path) -> None:
    folder = folders.stable_diffusion_xl(tmp_path / "xl")
    twin = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    twin.set_progress_bar_config(disable=True)
    files = {name: write(tmp_path / f"{name}.safetensors", twin, rank, rank) for name, rank in (("a", 4), ("b", 2))}
    pipe: Any = DiffusionPipeline.from_pretrained(folder).replace(programs=Programs())
    for name, file in files.items():
        twin.load_lora_weights(str(file), adapter_name=name)
        pipe = pipe.load_lora_weights(file, adapter_name=name, max_rank=8)
    assert pipe.get_list_adapters() == twin.get_list_adapters() == {network: ["a", "b"] for network in LAYERS}
    call = {"prompt": "a cat", "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
    latents = np.random.default_rng(0).standard_normal((1, 16, 16, 4)).astype(np.float32)
    by_network = {"unet": 0.3, "text_encoder": 1.0, "text_encoder_2": 0.2}
    found = []
    for names, weights in ((["a"], [1.0]), (["a", "b"], [0.7, -0.5]), (["b"], [by_network])):
        twin.set_adapters(names, copy.deepcopy(weights))  # theirs empties the dict
        with torch.no_grad():
            wanted = twin(latents=torch.tensor(latents.transpose(0, 3, 1, 2)), **call).images
        ours = pipe.set_adapters(names, weights)(latents=latents, **call).images
        assert 255 * np.abs(ours - wanted).mean() < 0.02, names
        found.append(ours)
    assert all(np.abs(a - b).mean() > 1e-3 for i, a in enumerate(found) for b in found[:i])
    assert pipe.programs.compilations == 1
