"""The table of the settings of files, from the configuration classes themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import results

from diffuse_jax import models, pipelines, processors, schedulers
from diffuse_jax.config import Config
from diffuse_jax.schedulers.configuration import setting_names
from diffuse_jax.text import CLIPTextConfig, LDMBertConfig, MultilingualCLIPConfig

CONFIGS: dict[str, type[Config]] = {
    "UNet2DConditionModel": models.UNet2DConditionConfig,
    "ControlNetModel": models.ControlNetConfig,
    "IPAdapter": models.IPAdapterConfig,
    "T2IAdapter": models.T2IAdapterConfig,
    "UNet2DModel": models.UNet2DConfig,
    "AutoencoderKL": models.AutoencoderKLConfig,
    "AutoencoderTiny": models.AutoencoderTinyConfig,
    "AsymmetricAutoencoderKL": models.AsymmetricAutoencoderKLConfig,
    "VQModel": models.VQConfig,
    "ConsistencyDecoderVAE": models.ConsistencyDecoderVAEConfig,
    "PaellaVQModel": models.PaellaVQConfig,
    "WuerstchenPrior": models.WuerstchenPriorConfig,
    "WuerstchenDiffNeXt": models.WuerstchenDiffNeXtConfig,
    "PriorTransformer": models.PriorTransformerConfig,
    "UnCLIPTextProjModel": models.UnCLIPTextProjConfig,
    "StableUnCLIPImageNormalizer": models.StableUnCLIPImageNormalizerConfig,
    "CLIPTextModel": CLIPTextConfig,
    "LDMBertModel": LDMBertConfig,
    "MultilingualCLIP": MultilingualCLIPConfig,
    "CLIPVisionModel": models.CLIPVisionConfig,
    "DPTForDepthEstimation": models.DPTConfig,
    "DPTImageProcessor": processors.DPTImageProcessor,
    "CLIPImageProcessor": processors.CLIPImageProcessor,
}


def rows() -> Iterator[Mapping[str, Any]]:
    """One row for each class of networks, for the samplers with a setting of no influence, and for the pipelines."""
    for name, config in CONFIGS.items():
        fields = {f.name for f in dataclasses.fields(config)} - {"extra", *config.harmless}
        fixed = [f"`{key}` = {value!r}" for key, value in config.fixed.items()]
        yield {
            "class": f"`{name}`",
            "honoured": code(fields),
            "one value, others are refused": fixed,
            "no influence": harmless(config),
        }
    for name in schedulers.__all__:
        cls = getattr(schedulers, name)
        if isinstance(cls, type) and issubclass(cls, schedulers.Scheduler) and cls.harmless:
            fields = {*setting_names(cls)} - {*cls.harmless}
            yield {"class": f"`{name}`", "honoured": code(fields), "no influence": harmless(cls)}
    for name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        settings = getattr(pipelines, name).settings
        honoured = {key for key, effect in settings.items() if effect == "honoured"}
        other = [f"`{key}`: {effect}" for key, effect in settings.items() if key not in honoured]
        yield {"class": f"`{name}` (`model_index.json`)", "honoured": code(honoured), "no influence": other}


def code(names: set[str]) -> list[str]:
    return [f"`{name}`" for name in sorted(names)]


def harmless(config: type[Config]) -> list[str]:
    """The keys for each reason."""
    reasons: dict[str, list[str]] = {}
    for key, reason in config.harmless.items():
        reasons.setdefault(reason, []).append(f"`{key}`")
    return [f"{', '.join(keys)}: {reason}" for reason, keys in reasons.items()]


def write_page(target: Path) -> None:
    """``config_fields.md`` to include."""
    target.mkdir(exist_ok=True)
    shown = [{key: ("; ".join(v) if key == "no influence" else v) or None for key, v in row.items()} for row in rows()]
    (target / "config_fields.md").write_text(results.table(shown) + "\n", encoding="utf-8")
