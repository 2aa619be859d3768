"""Every published network at full size without memory: names, shapes and counts against PyTorch's meta device."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest

from diffuse_jax.config import Config
from diffuse_jax.models import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    CLIPVisionModelWithProjection,
    ConsistencyDecoderVAE,
    ControlNetModel,
    DPTForDepthEstimation,
    PaellaVQModel,
    PriorTransformer,
    StableDiffusionSafetyChecker,
    T2IAdapter,
    UnCLIPTextProjModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
    WuerstchenDiffNeXt,
    WuerstchenPrior,
    presets,
)
from diffuse_jax.text import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    LDMBertModel,
    MultilingualCLIP,
    T5EncoderModel,
)
from diffuse_jax.text import presets as text_presets
from diffuse_jax.weights import names

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
ldm = pytest.importorskip("diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion")
m_clip = pytest.importorskip("diffusers.pipelines.kandinsky.text_encoder")
transformers = pytest.importorskip("transformers")

from diffuse_jax.torch_backend.networks import torch_class  # noqa: E402

# Parameters of the published files; four bytes each is the size of a float32 file.
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
    "SD21_UNCLIP_L_UNET": 869_517_764,
    "X4_UPSCALER_UNET": 473_398_020,
    "X2_UPSCALER_UNET": 372_560_645,
    "SDXL_UNET": 2_567_463_684,
    "SDXL_INPAINT_UNET": 2_567_478_084,
    "SDXL_PIX2PIX_UNET": 2_567_475_204,
    "LDM_TEXT_UNET": 872_300_484,
    "SDXL_LCM_UNET": 2_567_545_604,
    "SDXL_REFINER_UNET": 2_259_526_660,
    "SSD_1B_UNET": 1_331_334_404,
    "VEGA_UNET": 745_225_604,
    "IF_I_M_UNET": 371_605_830,
    "IF_I_L_UNET": 935_365_830,
    "IF_I_XL_UNET": 4_304_695_110,
    "IF_II_M_UNET": 466_183_686,
    "IF_II_L_UNET": 1_198_017_030,
    "KANDINSKY21_UNET": 1_228_661_768,
    "KANDINSKY21_INPAINT_UNET": 1_228_679_048,
    "KANDINSKY22_UNET": 1_253_057_288,
    "KANDINSKY22_INPAINT_UNET": 1_253_074_568,
    "KANDINSKY22_DEPTH_UNET": 1_253_429_212,
    "KARLO_UNET": 885_439_686,
}
CONTROLNETS = {
    "SD15_CONTROLNET": 361_279_120,
    "SD15_SHUFFLE_CONTROLNET": 361_279_120,
    "SD21_CONTROLNET": 364_228_240,
    "SDXL_CONTROLNET": 1_251_014_160,
}
T2I_ADAPTERS = {
    "SD15_T2I_ADAPTER": 77_369_280,
    "SD15_COLOR_T2I_ADAPTER": 18_689_200,
    "SDXL_T2I_ADAPTER": 79_028_160,
}
PIXEL_UNETS = {
    "DDPM_CIFAR10_UNET": 35_746_307,
    "DDPM_256_UNET": 113_673_219,
    "NCSNPP_256_UNET": 65_574_549,
    "CM_IMAGENET64_UNET": 295_899_267,
    "CM_LSUN256_UNET": 526_304_771,
    "LDM_CELEBAHQ_UNET": 274_056_163,
    "KARLO_SUPER_RESOLUTION_UNET": 691_579_523,
}
VAES = {
    "SD_VAE": 83_653_863,
    "LDM_TEXT_VAE": 83_653_863,
    "SD21_VAE": 83_653_863,
    "SDXL_VAE": 83_653_863,
    "X4_UPSCALER_VAE": 55_325_927,
}
VQS = {"LDM_VQ": 55_322_782, "MOVQ": 67_832_495}
CONSISTENCY_DECODERS = {"CONSISTENCY_DECODER_VAE": 655_441_366}
TEXTS = {
    "CLIP_L": (CLIPTextModel, 123_060_480),
    "OPENCLIP_H": (CLIPTextModel, 340_387_840),
    "OPENCLIP_BIGG": (CLIPTextModelWithProjection, 694_659_840),
}
LDM_BERTS = {"LDM_BERT": 581_994_042}
M_CLIPS = {"M_CLIP": 560_677_632}
T5S = {"T5_XXL": 4_762_310_656}
TINIES = {
    "TINY_VAE": 2_445_063
}  # diffusers has no class for TINY_FLUX2_VAE: test_autoencoder_tiny reads its real weights
ASYMMETRICS = {"ASYMMETRIC_VAE": 194_300_519, "ASYMMETRIC_X2_VAE": 406_130_151}
VISIONS = {
    "CLIP_L_VISION": 303_966_208,
    "OPENCLIP_H_VISION": 632_076_800,
    "OPENCLIP_BIGG_VISION": 1_844_907_264,
}
DEPTHS = {"HYBRID_DEPTH": 122_377_985, "LARGE_DEPTH": 343_030_465}
WUERSTCHEN: dict[str, tuple[type, int]] = {
    "WUERSTCHEN_PRIOR": (WuerstchenPrior, 993_636_896),
    "WUERSTCHEN_DECODER": (WuerstchenDiffNeXt, 1_055_365_280),
    "PAELLA_VQ_VAE": (PaellaVQModel, 18_406_903),
}
PRIORS = {"UNCLIP_PRIOR": 1_022_030_080, "KANDINSKY22_PRIOR": 1_026_225_920}
TEXT_PROJS = {"KARLO_TEXT_PROJ": 7_878_400}
SAFETY_CHECKER = 303_981_588


def pytorch_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """PyTorch key -> PyTorch shape, by our names and axis orders; the arrays are views of one value."""
    flat = names.flatten(model.shapes())
    one = np.float32(0)
    return {
        key: names.to_torch(path, np.broadcast_to(one, flat[path].shape)).shape
        for key, path in names.torch_keys(flat).items()
    }


def module_shapes(module: Any, ours: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The same of the PyTorch module; transformers 5 has an encoder's parts one level up in memory, not in files."""
    saved = {key: value for key, value in module.state_dict().items() if not names.IGNORED.search(key)}
    return {names.known_name(key, ours): tuple(value.shape) for key, value in saved.items()}


def not_initialised(kind: Any, config: dict[str, Any]) -> Any:
    """A module whose initial values, which take a minute even without memory, are not computed."""
    with mock.patch.object(kind, "_init_weights", create=True):
        return kind.from_config(config)


KINDS: tuple[tuple[Any, dict[str, int]], ...] = (
    (AutoencoderTiny, TINIES),
    (AsymmetricAutoencoderKL, ASYMMETRICS),
    (VQModel, VQS),
    (UnCLIPTextProjModel, TEXT_PROJS),
)
"""Networks that both libraries make of the same configuration, in the same way."""


def networks() -> Iterator[tuple[str, Any, Callable[[], Any], int]]:
    """Name, our network, what builds PyTorch's, and the published number of parameters."""
    for name, count in UNETS.items():
        config = getattr(presets, name)
        yield (
            name,
            UNet2DConditionModel(config),
            partial(diffusers.UNet2DConditionModel.from_config, config.to_json()),
            count,
        )
    for name, count in CONTROLNETS.items():
        config = getattr(presets, name)
        yield name, ControlNetModel(config), partial(diffusers.ControlNetModel.from_config, config.to_json()), count
    for name, count in T2I_ADAPTERS.items():
        config = getattr(presets, name)
        yield name, T2IAdapter(config), partial(diffusers.T2IAdapter.from_config, config.to_json()), count
    for name, count in PIXEL_UNETS.items():
        config = getattr(presets, name)
        yield name, UNet2DModel(config), partial(diffusers.UNet2DModel.from_config, config.to_json()), count
    for name, count in VAES.items():
        config = getattr(presets, name)
        yield name, AutoencoderKL(config), partial(diffusers.AutoencoderKL.from_config, config.to_json()), count
    for kind, table in KINDS:
        for name, count in table.items():
            config = getattr(presets, name)
            yield name, kind(config), partial(torch_class(kind).from_config, config.to_json()), count
    for name, count in VISIONS.items():
        config = getattr(presets, name)
        theirs = transformers.CLIPVisionConfig(**config.to_json())
        yield (
            name,
            CLIPVisionModelWithProjection(config),
            partial(transformers.CLIPVisionModelWithProjection, theirs),
            count,
        )
    for name, count in DEPTHS.items():
        model = DPTForDepthEstimation(getattr(presets, name))
        theirs = transformers.DPTConfig(**model.config.to_json())
        yield name, model, partial(transformers.DPTForDepthEstimation, theirs), count
    for name, (kind, count) in WUERSTCHEN.items():
        config = getattr(presets, name)
        yield name, kind(config), partial(not_initialised, torch_class(kind), config.to_json()), count
    checker = StableDiffusionSafetyChecker(presets.CLIP_L_VISION)
    theirs = transformers.CLIPConfig(**{k: v for k, v in checker.config_json().items() if k != "architectures"})
    yield "safety checker", checker, partial(torch_class(StableDiffusionSafetyChecker), theirs), SAFETY_CHECKER
    for name, count in PRIORS.items():
        config = getattr(presets, name)
        yield name, PriorTransformer(config), partial(diffusers.PriorTransformer.from_config, config.to_json()), count
    for name, count in CONSISTENCY_DECODERS.items():
        config = getattr(presets, name)
        build = partial(diffusers.ConsistencyDecoderVAE.from_config, config.to_json())
        yield name, ConsistencyDecoderVAE(config), build, count
    for name, count in T5S.items():
        model = T5EncoderModel(getattr(text_presets, name))
        yield name, model, partial(transformers.T5EncoderModel, transformers.T5Config(**model.config.to_json())), count
    for name, count in LDM_BERTS.items():
        model = LDMBertModel(getattr(text_presets, name))
        yield name, model, partial(ldm.LDMBertModel, ldm.LDMBertConfig(**model.config.to_json())), count
    for name, count in M_CLIPS.items():
        model = MultilingualCLIP(getattr(text_presets, name))
        yield name, model, partial(m_clip.MultilingualCLIP, m_clip.MCLIPConfig(**model.config.to_json())), count
    for name, (kind, count) in TEXTS.items():
        config = getattr(text_presets, name)
        theirs = transformers.CLIPTextConfig(**config.to_json())
        yield name, kind(config), partial(getattr(transformers, kind.__name__), theirs), count


def rows(known: Container[str] = ()) -> Iterator[dict[str, Any]]:
    """What the documentation shows of :func:`test_names_shapes_and_count`, of presets that are not ``known``."""
    for name, model, build, _ in networks():
        if name in known:
            continue
        ours = pytorch_shapes(model)
        with torch.device("meta"):
            theirs = module_shapes(build(), ours)
        count = lambda shapes: f"{sum(map(math.prod, shapes.values())):,}"
        row = {"preset": name, "network": type(model).__name__, "tensors": len(ours), "parameters": count(ours)}
        yield row | {"in_PyTorch": count(theirs), "same_names_and_shapes": ours == theirs}


def test_every_preset_is_checked() -> None:
    ends = ("_UNET", "_CONTROLNET", "_T2I_ADAPTER", "_VAE", "VQ", "_VISION", "_DEPTH", "_PRIOR", "_DECODER", "_PROJ")
    in_modules = {name for name in vars(presets) if name.endswith(ends)}
    tables = (UNETS, CONTROLNETS, T2I_ADAPTERS, PIXEL_UNETS, VAES, TINIES, ASYMMETRICS, VQS, CONSISTENCY_DECODERS)
    tables = (*tables, VISIONS, DEPTHS, PRIORS, WUERSTCHEN, TEXT_PROJS)
    assert in_modules - {"TINY_FLUX2_VAE"} == {name for table in tables for name in table}
    found = {name for name, value in vars(text_presets).items() if isinstance(value, Config)}
    assert found == TEXTS.keys() | T5S.keys() | LDM_BERTS.keys() | M_CLIPS.keys()


# Tracing a large UNet takes seconds, and these differ from another one by one layer.
VARIANTS = {
    *("SDXL_INPAINT_UNET", "SDXL_PIX2PIX_UNET", "SDXL_LCM_UNET"),
    *("KANDINSKY21_INPAINT_UNET", "KANDINSKY22_INPAINT_UNET"),
}
CASES = [pytest.param(*row, id=row[0], marks=[pytest.mark.slow] * (row[0] in VARIANTS)) for row in networks()]


@pytest.mark.parametrize(("name", "model", "build", "count"), CASES)
def test_names_shapes_and_count(name: str, model: Any, build: Callable[[], Any], count: int) -> None:
    ours = pytorch_shapes(model)
    with torch.device("meta"):
        theirs = module_shapes(build(), ours)
    assert ours == theirs
    assert sum(map(math.prod, ours.values())) == count
