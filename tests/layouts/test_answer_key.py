"""Our names against maps that somebody else wrote: those that the package ``imaginairy`` 15.0.0 (MIT) ships.

``pip download --no-deps imaginairy==15.0.0 -d FOLDER`` fetches them, and DIFFUSE_JAX_SHARED_DATA=FOLDER says where they
are. Some lead from the original layout to that of folders, key by key; others lead from that of folders to a third
library's, and their left sides are all names that a network has. docs/conversion.md reports the numbers.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from diffuse_jax.layouts.original import TABLES
from diffuse_jax.layouts.rows import to_original
from diffuse_jax.models import (
    AutoencoderKL,
    CLIPVisionModelWithProjection,
    ControlNetModel,
    IPAdapter,
    T2IAdapter,
    UNet2DConditionModel,
    presets,
)
from diffuse_jax.models.base import Model
from diffuse_jax.models.ip_adapter import IPAdapterConfig
from diffuse_jax.text import CLIPTextModel, CLIPTextModelWithProjection
from diffuse_jax.text.presets import CLIP_L, OPENCLIP_BIGG, OPENCLIP_H
from diffuse_jax.weights.names import flatten, torch_key

FOLDER = "imaginairy/weight_management/weight_maps/"
Pairs = set[tuple[str, str | None]]

SD15, SDXL = UNet2DConditionModel(presets.SD15_UNET), UNet2DConditionModel(presets.SDXL_UNET)
VAE, TEXT, TEXT_H = AutoencoderKL(presets.SD_VAE), CLIPTextModel(CLIP_L), CLIPTextModel(OPENCLIP_H)
TEXT_G = CLIPTextModelWithProjection(OPENCLIP_BIGG)
CONTROL = ControlNetModel(presets.SD15_CONTROLNET)

ORIGINAL = {
    "stable-diffusion-1-5_unet_compvis_TO_diffusers.json": (SD15, "unet", "diffusion_model.", 391),
    "stable-diffusion-1-5_vae_compvis_TO_diffusers.json": (VAE, "vae", "", 124),
    "stable-diffusion-1-5_text_compvis_TO_diffusers.json": (TEXT, "clip", "transformer.", 99),
    "Compvis-UNet-SDXL-to-Diffusers.weightmap.json": (SDXL, "unet", "model.diffusion_model.", 1680),
    "Compvis-Autoencoder-SDXL-to-Diffusers.weightmap.json": (VAE, "vae", "first_stage_model.", 248),
    "Compvis-TextEncoder-SDXL-to-Diffusers.weightmap.json": (
        TEXT,
        "clip",
        "conditioner.embedders.0.transformer.",
        196,
    ),
    "Compvis-OpenClipTextEncoder-SDXL-to-Diffusers.weightmap.json": (
        TEXT_G,
        "openclip",
        "conditioner.embedders.1.model.",
        517,
    ),
}
"""Map -> network, table, prefix of the original's names, and the number of names that agree."""

NOT_PARAMETERS: Pairs = {
    # position_ids, a buffer, without its last word as all names of that map
    ("transformer.text_model.embeddings", "text_model.embeddings"),
    ("conditioner.embedders.0.transformer.text_model.embeddings.position_ids", None),
    # parts of the whole CLIP that text encoders of SDXL do not use
    ("conditioner.embedders.0.text_projection", "text_projection.weight"),
    ("conditioner.embedders.1.model.logit_scale", None),
    # a second spelling of text_projection, which both have
    ("conditioner.embedders.1.model.text_projection.weight", "text_projection.weight"),
}
"""What their maps have beyond the parameters of the networks."""

FOLDERS = {
    "Diffusers-UNet-SD15.weightmap.json": (SD15, 391),
    "stable-diffusion-1-5_unet_diffusers_TO_refiners.json": (SD15, 391),
    "Diffusers-UNet-SDXL.weightmap.json": (SDXL, 1050),
    "Diffusers-AutoencoderKL-SD.weightmap.json": (VAE, 124),
    "stable-diffusion-1-5_vae_diffusers_TO_refiners.json": (VAE, 124),
    "stable-diffusion-1-5_text_diffusers_TO_refiners.json": (TEXT, 99),
    "stable-diffusion-1-5_clipencoderH_diffusers_TO_refiners.json": (TEXT_H, 187),
    "Transformers-ClipTextEncoder.weightmap.json": (TEXT_G, 260),
    "Transformers-ClipImageEncoder-SD21.weightmap.json": (
        CLIPVisionModelWithProjection(presets.OPENCLIP_H_VISION),
        262,
    ),
    "Diffusers-Controlnet-SD15.weightmap.json": (CONTROL, 191),
    "controlnet-1-1_all_diffusers_TO_refiners.json": (CONTROL, 191),
    "Diffusers-T2IAdapter-SD15.weightmap.json": (T2IAdapter(presets.SD15_T2I_ADAPTER), 19),
    "Diffusers-T2IAdapter-SDXL.weightmap.json": (T2IAdapter(presets.SDXL_T2I_ADAPTER), 19),
}
"""Map -> network, and the number of layers whose names agree."""

WITHOUT_PARAMETERS = re.compile(r"adapter\.body\.\d\.downsample|(text|vision)_model\.embeddings\.position_ids")
"""Layers of their maps that have none: average pooling, and a buffer."""


@pytest.fixture(scope="module")
def maps(shared_data: Path) -> Callable[[str], dict[str, Any]]:
    """Name of a map -> its content."""
    wheels = [path for path in shared_data.glob("*.whl") if path.name.lower().startswith("imaginairy-15.0.0-")]
    if not wheels:
        pytest.skip(f"no wheel of imaginairy 15.0.0 in {shared_data}; the head of this file says how to fetch it")
    archive = zipfile.ZipFile(wheels[0])
    return lambda name: json.loads(archive.read(FOLDER + name))


def keys(model: Model) -> list[str]:
    return [torch_key(path) for path in flatten(model.shapes())]


def layers(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


@pytest.mark.parametrize("name", ORIGINAL)
def test_names_of_the_original(name: str, maps: Callable[[str], dict[str, Any]]) -> None:
    model, table, prefix, agreeing = ORIGINAL[name]
    content = maps(name)
    theirs: Pairs = set((content.get("mapping") or content["name_map"]).items())
    groups = to_original(own := keys(model), TABLES[table](own))
    ours: Pairs = {(prefix + old, new) for old, parts in groups.items() for new, _ in parts}
    if "mapping" in content:  # by layer
        ours = {(old.rpartition(".")[0], str(new).rpartition(".")[0]) for old, new in ours}
        back = maps(name.replace("compvis_TO_diffusers", "diffusers_TO_compvis"))["mapping"]
        assert {(old, new) for new, old in back.items()} == theirs
    if table == "openclip":  # they number the parts of what is one tensor in files
        parts = {(f"{prefix}{old}.{op[-1]}", new) for old, all in groups.items() for new, op in all if op[:4] == "part"}
        ours = {(old, new) for old, new in ours if ".in_proj_" not in old} | parts
    assert ours - theirs == set()
    assert theirs - ours <= NOT_PARAMETERS
    assert len(ours & theirs) == agreeing


@pytest.mark.parametrize("name", FOLDERS)
def test_names_of_folders(name: str, maps: Callable[[str], dict[str, Any]]) -> None:
    model, agreeing = FOLDERS[name]
    content = maps(name)
    theirs = {*(content.get("mapping") or content["name_map"])}
    own = {*keys(model)}
    ours = layers(own)
    ours |= theirs & own  # parameters that are no layer's, as the class token
    patterns = [re.compile(pattern) for pattern in content.get("regex_map") or {}]
    matched = {layer for layer in ours if any(pattern.fullmatch(layer) for pattern in patterns)}
    odd = {layer for layer in theirs - ours if not WITHOUT_PARAMETERS.fullmatch(layer)}
    assert odd == set()
    assert len(ours & (theirs | matched)) == agreeing
    assert {layer for layer in ours - theirs - matched if layer not in layers(theirs)} == set()


LARGE = IPAdapterConfig(layer_widths=(1280,) * 70, cross_attention_dim=2048)
ADAPTERS = {
    "Diffusers-IPAdapter-SD15.weightmap.json": (IPAdapterConfig(), 36),
    "Diffusers-IPAdapter-SDXL.weightmap.json": (LARGE, 144),
    "Diffusers-IPAdapterPlus-SD15.weightmap.json": (IPAdapterConfig(projection="resampler", tokens=16), 83),
    "Diffusers-IPAdapterPlus-SDXL.weightmap.json": (LARGE.replace(projection="resampler", tokens=16), 191),
}
"""Map -> network, and the number of its names."""


@pytest.mark.parametrize("name", ADAPTERS)
def test_names_of_ip_adapters(name: str, maps: Callable[[str], dict[str, Any]]) -> None:
    config, count = ADAPTERS[name]
    theirs = {*maps(name)["name_map"]}
    assert {*keys(IPAdapter(config))} == theirs
    assert len(theirs) == count
