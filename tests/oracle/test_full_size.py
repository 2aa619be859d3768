"""Every published network at full size without memory: names, shapes and counts against PyTorch's meta device."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from diffuse_jax.models import AutoencoderKL, UNet2DConditionModel, presets
from diffuse_jax.text import CLIPTextModel, CLIPTextModelWithProjection
from diffuse_jax.text import presets as text_presets
from diffuse_jax.weights import names

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

# Parameters of the published files, as their sizes on the Hub and the model cards give them.
UNETS = {
    "SD15_UNET": 859_520_964,
    "SD15_INPAINT_UNET": 859_535_364,
    "SD15_PIX2PIX_UNET": 859_532_484,
    "SD15_LCM_UNET": 859_602_884,
    "SD20_UNET": 865_910_724,
    "SD21_UNET": 865_910_724,
    "SD20_INPAINT_UNET": 865_925_124,
    "SD20_DEPTH_UNET": 865_913_604,
    "SD21_UNCLIP_UNET": 870_173_124,
    "X4_UPSCALER_UNET": 473_398_020,
    "SDXL_UNET": 2_567_463_684,
    "SDXL_INPAINT_UNET": 2_567_478_084,
    "SDXL_PIX2PIX_UNET": 2_567_475_204,
    "SDXL_LCM_UNET": 2_567_545_604,
    "SDXL_REFINER_UNET": 2_259_526_660,
}
VAES = {"SD_VAE": 83_653_863, "SD21_VAE": 83_653_863, "SDXL_VAE": 83_653_863, "X4_UPSCALER_VAE": 55_325_927}
TEXTS = {
    "CLIP_L": (CLIPTextModel, 123_060_480),
    "OPENCLIP_H": (CLIPTextModel, 340_387_840),
    "OPENCLIP_BIGG": (CLIPTextModelWithProjection, 694_659_840),
}


def pytorch_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """PyTorch key -> PyTorch shape, by our names and axis orders; the arrays are views of one number."""
    flat = names.flatten(model.shapes())
    one = np.float32(0)
    return {
        key: names.to_torch(path, np.broadcast_to(one, flat[path].shape)).shape
        for key, path in names.torch_keys(flat).items()
    }


def check(model: Any, module: Any, count: int) -> None:
    ours = pytorch_shapes(model)
    # transformers 5 keeps the encoder's parts one level higher in memory than in its files
    theirs = {
        (key if key in ours else names.rename(key, names.ALIASES)): tuple(value.shape)
        for key, value in module.named_parameters()
    }
    assert ours == theirs
    assert sum(map(math.prod, ours.values())) == count


def test_every_preset_is_checked() -> None:
    in_modules = {name for name in vars(presets) if name.endswith(("_UNET", "_VAE"))}
    assert in_modules == UNETS.keys() | VAES.keys()
    config = type(text_presets.CLIP_L)
    assert {name for name, value in vars(text_presets).items() if isinstance(value, config)} == TEXTS.keys()


@pytest.mark.parametrize("name", UNETS)
def test_unet(name: str) -> None:
    config = getattr(presets, name)
    with torch.device("meta"):
        module = diffusers.UNet2DConditionModel.from_config(config.to_json())
    check(UNet2DConditionModel(config), module, UNETS[name])


@pytest.mark.parametrize("name", VAES)
def test_autoencoder(name: str) -> None:
    config = getattr(presets, name)
    with torch.device("meta"):
        module = diffusers.AutoencoderKL.from_config(config.to_json())
    check(AutoencoderKL(config), module, VAES[name])


@pytest.mark.parametrize("name", TEXTS)
def test_text_encoder(name: str) -> None:
    kind, count = TEXTS[name]
    config = getattr(text_presets, name)
    with torch.device("meta"):
        module = getattr(transformers, kind.__name__)(transformers.CLIPTextConfig(**config.to_json()))
    check(kind(config), module, count)
