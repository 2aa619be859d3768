"""Live adapters of SDXL, with both of its text encoders: what PyTorch makes with their products added to its weights.

They are added by hand, because diffusers with transformers 5 loses what kohya's files have for text encoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.pipelines.programs import Programs
from tests.oracle.agreement import require_same

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
torch, diffusers = folders.torch, folders.diffusers

LAYERS = {
    "unet": ("attn1.to_q", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "resnets.0.conv1"),
    "text_encoder": ("self_attn.q_proj", "mlp.fc1"),
    "text_encoder_2": ("self_attn.v_proj", "self_attn.out_proj", "mlp.fc2"),
}
"""Ends of the names of the layers that the files change."""

PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def adapted_layers(twin: Any) -> dict[tuple[str, str], Any]:
    """(network, name of a layer in kohya's files) -> PyTorch's layer."""
    found = {}
    for network, ends in LAYERS.items():
        inside = "" if network == "unet" else "text_model."
        for name, module in getattr(twin, network).named_modules():
            if name.endswith(ends):
                found[network, PREFIXES[network] + (inside + name.removeprefix(inside)).replace(".", "_")] = module
    return found


def write(file: Path, layers: Mapping[tuple[str, str], Any], rank: int) -> Path:
    """A file as kohya's scripts write it, with an alpha of half the rank."""
    generator, tensors = torch.Generator().manual_seed(rank), {}
    random = lambda *shape: torch.randn(shape, generator=generator) * 0.1
    for (_, name), layer in layers.items():
        out, inner, *window = layer.weight.shape
        tensors[f"{name}.lora_down.weight"] = random(rank, inner, *window)
        tensors[f"{name}.lora_up.weight"] = random(out, rank, *[1] * len(window))
        tensors[f"{name}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors, file)
    return file


def product(tensors: Mapping[str, Any], name: str) -> Any:
    """What a pair adds to the weight of its layer."""
    down, up = (tensors[f"{name}.lora_{half}.weight"] for half in ("down", "up"))
    return 0.5 * (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


@pytest.mark.slow
def test_both_text_encoders_of_sdxl(tmp_path: Path) -> None:
    folder = folders.stable_diffusion_xl(tmp_path / "xl")
    twin = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    twin.set_progress_bar_config(disable=True)
    layers = adapted_layers(twin)
    plain = {place: layer.weight.detach().clone() for place, layer in layers.items()}
    files = {name: write(tmp_path / f"{name}.safetensors", layers, rank) for name, rank in (("a", 4), ("b", 2))}
    pairs = {name: load_file(file) for name, file in files.items()}
    pipe: Any = DiffusionPipeline.from_pretrained(folder).replace(programs=Programs())
    for name, file in files.items():
        pipe = pipe.load_lora_weights(file, adapter_name=name, max_rank=8)
    assert pipe.get_list_adapters() == {network: ["a", "b"] for network in LAYERS}

    call = {"prompt": "a cat", "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
    latents = np.random.default_rng(0).standard_normal((1, 16, 16, 4)).astype(np.float32)
    found = []
    for weights in (
        {"a": 1.0},
        {"a": 0.7, "b": -0.5},
        {"b": {"unet": 0.3, "text_encoder": 1.0, "text_encoder_2": 0.2}},
    ):
        with torch.no_grad():
            for (network, layer), module in layers.items():
                each = {name: w if isinstance(w, float) else w[network] for name, w in weights.items()}
                change = sum(weight * product(pairs[name], layer) for name, weight in each.items())
                module.weight.copy_(plain[network, layer] + change)
            wanted = twin(latents=torch.tensor(latents.transpose(0, 3, 1, 2)), **call).images
        ours = pipe.set_adapters([*weights], [*weights.values()])(latents=latents, **call).images
        require_same(pipe, ours, wanted)
        found.append(ours)
    assert all(np.abs(a - b).mean() > 1e-3 for i, a in enumerate(found) for b in found[:i])
    assert pipe.programs.compilations == 1
