"""LoRA files as diffusers and PEFT write them change the kernels by as much as they do there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffuse_jax.adapters import lora
from diffuse_jax.adapters.lora_file import load_lora
from diffuse_jax.models import UNet2DConditionModel
from diffuse_jax.weights.names import torch_key
from tests.pipelines import tiny

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 16},
        {"lora_alpha": 16, "use_rslora": True},
        {"lora_alpha": 2, "alpha_pattern": {"attn1.to_out.0": 8}, "rank_pattern": {"to_q": 2}},
    ],
)
@pytest.mark.parametrize("saved_by", ["network", "pipeline"])
def test_a_pair_is_as_strong_as_in_peft(settings: dict[str, Any], saved_by: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel.from_config(tiny.UNET.to_json())
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **settings))
    if saved_by == "network":
        unet.save_lora_adapter(tmp_path)
    else:
        diffusers.StableDiffusionPipeline.save_lora_weights(
            tmp_path,
            unet_lora_layers=peft.get_peft_model_state_dict(unet),
            unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        )
    read = lora.pairs_of(load_lora(tmp_path, {"unet": UNet2DConditionModel(tiny.UNET).shapes()})["unet"])
    layers = {name: layer for name, layer in unet.named_modules() if hasattr(layer, "get_delta_weight")}
    assert len(read) == len(layers) > 0
    for path, pair in read.items():
        theirs = layers[torch_key((*path, "kernel")).removesuffix(".weight")].get_delta_weight("default")
        np.testing.assert_allclose(pair["down"] @ pair["up"], theirs.detach().numpy().T, rtol=1e-5, atol=1e-7)
