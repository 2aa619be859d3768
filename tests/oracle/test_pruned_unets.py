"""Whole pipelines on UNets with depths of their own per block, as SSD-1B, Vega and KOALA have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from diffuse_jax import ControlNetModel, UNet2DConditionModel, pipelines
from tests.oracle.agreement import require_same

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
torch, diffusers = folders.torch, folders.diffusers

from tests.oracle.test_ip_adapter_pipeline import opened, written  # noqa: E402

REQUEST = {"prompt": "a cat", "num_inference_steps": 3, "guidance_scale": 5.0, "height": 32, "width": 32}
PRUNED = {
    "ssd-1b": {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": (1, (2, 1)),
        "reverse_transformer_layers_per_block": ((3, 1, 2), 1),
        "layers_per_block": 2,
    },
    "koala": {"mid_block_type": None, "transformer_layers_per_block": (1, 3)},
}


@pytest.fixture(scope="module", params=["ssd-1b", pytest.param("koala", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = folders.stable_diffusion_xl(tmp_path_factory.mktemp("pruned") / "model")
    torch.manual_seed(1)
    unet = folders.lively(diffusers.UNet2DConditionModel(**folders.UNET_XL | PRUNED[request.param]))
    unet.save_pretrained(path / "unet")
    return path


def agree(pipe: Any, twin: Any, **request: Any) -> None:
    """Both sides give the same image, with PyTorch's noise."""
    with torch.no_grad():
        wanted = twin(generator=torch.Generator().manual_seed(3), output_type="np", **REQUEST | request).images
    require_same(pipe, pipe(seed=3, noise="torch", output_type="np", **REQUEST | request).images, wanted)


def test_text_to_image_and_an_ip_adapter(folder: Path, tmp_path: Path) -> None:
    unet, _ = UNet2DConditionModel.from_pretrained(folder / "unet")
    adapters = written(tmp_path / "adapters", unet, {"plain": ".safetensors"})
    pipe, twin = opened("StableDiffusionXLPipeline", folder, adapters, "plain.safetensors")
    agree(pipe, twin, ip_adapter_image=folders.images(1, 24)[0])
    twin.unload_ip_adapter()
    agree(pipe.unload_ip_adapter(), twin)


@pytest.mark.slow
def test_controlnets_made_from_them(folder: Path, tmp_path: Path) -> None:
    """Those without a middle block have none in diffusers either."""
    unet, params = UNet2DConditionModel.from_pretrained(folder / "unet")
    make = lambda: ControlNetModel.from_unet(unet, params, conditioning_embedding_out_channels=(8, 16))
    if unet.config.mid_block_type is None:
        with pytest.raises(ValueError, match="mid_block_type=None"):
            make()
        return
    _, copied = make()
    jax.tree.map(np.testing.assert_array_equal, copied["down_blocks_1"], params["down_blocks_1"])
    net = folders.control_net(0, diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"))
    twin = diffusers.StableDiffusionXLControlNetPipeline.from_pretrained(folder, controlnet=net, add_watermarker=False)
    twin.set_progress_bar_config(disable=True)
    twin.save_pretrained(tmp_path)
    pipe = pipelines.StableDiffusionXLControlNetPipeline.from_pretrained(tmp_path)
    agree(pipe, twin, image=folders.images(1, 32)[0])
