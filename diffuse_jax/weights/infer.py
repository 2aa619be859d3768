"""Configurations of single-file checkpoints, read off their tensors.

Sizes are in the tensors. What is not (number of heads, schedule, size of pictures) is a constant of the family: a row
of :data:`FAMILIES`, with the values of the configurations that were published beside the checkpoints.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffuse_jax.weights.original import label_kind

Tensors = Mapping[str, np.ndarray]

SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COMMON = {"num_train_timesteps": 1000, "trained_betas": None, "steps_offset": 1, "timestep_spacing": "leading"}
PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False, **COMMON, **SCALED_LINEAR}
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False, **COMMON, **SCALED_LINEAR}
EULER = {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", **COMMON, **SCALED_LINEAR}
X4_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}
LOW_RES = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": True,
    "variance_type": "fixed_small",
    **X4_BETAS,
}
"""What adds noise to the picture that the upscaler enlarges."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family of checkpoints has in common and its tensors do not say.

    Attributes:
      text: component name -> (prefix in the file, layout of :data:`diffuse_jax.weights.original.TABLES`).
      pipelines: number of the UNet's input channels -> pipeline class.
      heads: number of attention heads at every level, or None for one for each 64 channels.
      prediction_type: unless the file or the caller says otherwise.
      latent_size: ``sample_size`` of the UNet.
      vae_scale: ``scaling_factor`` of the autoencoder.
      scheduler: the scheduler's configuration, without ``prediction_type``.
      options: further values of ``model_index.json``.
    """

    text: Mapping[str, tuple[str, str]]
    pipelines: Mapping[int, str]
    heads: int | None
    prediction_type: str
    latent_size: int
    vae_scale: float
    scheduler: Mapping[str, Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


FAMILIES = {
    "xl": Family(
        text={
            "text_encoder": ("conditioner.embedders.0.transformer.", "clip"),
            "text_encoder_2": ("conditioner.embedders.1.model.", "openclip"),
        },
        pipelines={
            4: "StableDiffusionXLPipeline",
            8: "StableDiffusionXLInstructPix2PixPipeline",
            9: "StableDiffusionXLInpaintPipeline",
        },
        heads=None,
        prediction_type="epsilon",
        latent_size=128,
        vae_scale=0.13025,
        scheduler=EULER,
        options={"force_zeros_for_empty_prompt": True},
    ),
    "xl-refiner": Family(
        text={"text_encoder_2": ("conditioner.embedders.0.model.", "openclip")},
        pipelines={4: "StableDiffusionXLImg2ImgPipeline"},
        heads=None,
        prediction_type="epsilon",
        latent_size=128,
        vae_scale=0.13025,
        scheduler=EULER,
        options={"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
    ),
    "x4-upscaler": Family(
        text={"text_encoder": ("cond_stage_model.model.", "openclip")},
        pipelines={7: "StableDiffusionUpscalePipeline"},
        heads=8,
        prediction_type="v_prediction",
        latent_size=128,
        vae_scale=0.08333,
        scheduler=DDIM | X4_BETAS,
        options={"max_noise_level": 350},
    ),
    "v2": Family(
        text={"text_encoder": ("cond_stage_model.model.", "openclip")},
        pipelines={
            4: "StableDiffusionPipeline",
            5: "StableDiffusionDepth2ImgPipeline",
            9: "StableDiffusionInpaintPipeline",
        },
        heads=None,
        prediction_type="v_prediction",
        latent_size=96,
        vae_scale=0.18215,
        scheduler=DDIM,
    ),
    "v1": Family(
        text={"text_encoder": ("cond_stage_model.transformer.", "clip")},
        pipelines={
            4: "StableDiffusionPipeline",
            8: "StableDiffusionInstructPix2PixPipeline",
            9: "StableDiffusionInpaintPipeline",
        },
        heads=8,
        prediction_type="epsilon",
        latent_size=64,
        vae_scale=0.18215,
        scheduler=PNDM,
    ),
}
"""Families by name, in the order in which they are tried; see :func:`family_of`."""

EPSILON_STEPS = {875000}
"""``global_step`` of Stable Diffusion 2 files that predict noise at 512 pixels (``2-base``)."""


def family_of(keys: Tensors) -> str | None:
    """The family of a single file, by the places of its text encoders and of the class embedding."""
    for name, family in FAMILIES.items():
        if name == "x4-upscaler" and "model.diffusion_model.label_emb.weight" not in keys:
            continue
        if all(any(key.startswith(prefix) for key in keys) for prefix, _ in family.text.values()):
            return name
    return None


def unet_config(unet: Tensors, family: Family) -> dict[str, Any]:
    """``config.json`` of a UNet from its tensors under diffusers' names."""
    levels = _levels(unet, "down_blocks")
    channels = [_outputs(unet, f"down_blocks.{i}.resnets.0.conv1.weight") for i in range(levels)]
    depths = [_depth(unet, f"down_blocks.{i}.attentions.0") for i in range(levels)]
    mid = _depth(unet, "mid_block.attentions.0")
    known = {depth for depth in (*depths, mid) if depth}
    attention = next(key for key in unet if key.endswith("attn2.to_k.weight"))
    context = unet[attention].shape[1]
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": family.latent_size,
        "in_channels": unet["conv_in.weight"].shape[1],
        "out_channels": _outputs(unet, "conv_out.weight"),
        "block_out_channels": channels,
        "layers_per_block": _layers(unet, "down_blocks"),
        "down_block_types": [("CrossAttnDownBlock2D" if depth else "DownBlock2D") for depth in depths],
        "up_block_types": [("CrossAttnUpBlock2D" if depth else "UpBlock2D") for depth in reversed(depths)],
        "attention_head_dim": family.heads or [max(1, width // 64) for width in channels],
        "cross_attention_dim": context,
        "use_linear_projection": unet["mid_block.attentions.0.proj_in.weight"].ndim == 2,
        # A level without attention needs a value too; the last one's is also that of the middle.
        "transformer_layers_per_block": known.pop() if len(known) == 1 else [*(d or 1 for d in depths[:-1]), mid],
        "only_cross_attention": _only_cross(unet, levels, context),
    }
    return config | _label_config(unet)


def _label_config(unet: Tensors) -> dict[str, Any]:
    """What the condition beside text and time is."""
    kind = label_kind(unet) if any("_embedding." in key and "time" not in key for key in unet) else None
    if kind == "classes":
        return {"num_class_embeds": unet["class_embedding.weight"].shape[0]}
    if kind == "projection":
        width = unet["class_embedding.linear_1.weight"].shape[1]
        return {"class_embed_type": "projection", "projection_class_embeddings_input_dim": width}
    if kind == "text_time":
        width = unet["add_embedding.linear_1.weight"].shape[1]
        return {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": width,
        }
    return {}


def _only_cross(unet: Tensors, levels: int, context: int) -> bool | list[bool]:
    """Levels whose first attention looks at the text too (the upscaler)."""
    found = []
    for level in range(levels):
        block = f"down_blocks.{level}.attentions.0.transformer_blocks.0"
        width = unet[f"{block}.attn1.to_k.weight"].shape[1] if f"{block}.attn1.to_k.weight" in unet else None
        found.append(width == context and _outputs(unet, f"{block}.attn1.to_k.weight") != context)
    if not any(found):
        return False
    plain = [i for i in range(levels) if f"down_blocks.{i}.attentions.0.norm.weight" not in unet]
    return [found[i] or i in plain for i in range(levels - 1)] + [False]


def vae_config(vae: Tensors, family: Family) -> dict[str, Any]:
    """``config.json`` of an autoencoder from its tensors under diffusers' names."""
    levels = _levels(vae, "encoder.down_blocks")
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": family.latent_size * 8 if family.vae_scale != 0.08333 else 256,
        "in_channels": vae["encoder.conv_in.weight"].shape[1],
        "out_channels": _outputs(vae, "decoder.conv_out.weight"),
        "latent_channels": vae["decoder.conv_in.weight"].shape[1],
        "block_out_channels": [_outputs(vae, f"encoder.down_blocks.{i}.resnets.0.conv1.weight") for i in range(levels)],
        "layers_per_block": _layers(vae, "encoder.down_blocks"),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": family.vae_scale,
    }


def text_config(text: Tensors, layout: str) -> dict[str, Any]:
    """``config.json`` of a CLIP text encoder from its tensors under transformers' names."""
    vocabulary, width = text["text_model.embeddings.token_embedding.weight"].shape
    projection = text["text_projection.weight"].shape[0] if "text_projection.weight" in text else None
    return {
        "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _outputs(text, "text_model.encoder.layers.0.mlp.fc1.weight"),
        "projection_dim": projection or (width if layout == "clip" else 512),
        "num_hidden_layers": _levels(text, "text_model.encoder.layers"),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": text["text_model.embeddings.position_embedding.weight"].shape[0],
        "hidden_act": "quick_gelu" if layout == "clip" else "gelu",
        # The ids of the published files, which mark the older rule for the end of the text.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _outputs(tensors: Tensors, key: str) -> int:
    return tensors[key].shape[0]


def _levels(tensors: Tensors, prefix: str) -> int:
    """One more than the largest list index after a prefix."""
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in tensors)
    return 1 + max(int(match[1]) for match in found if match)


def _layers(tensors: Tensors, prefix: str) -> int:
    return _levels(tensors, f"{prefix}.0.resnets")


def _depth(tensors: Tensors, attention: str) -> int | None:
    """Number of transformer blocks of an attention, None if it is not there."""
    present = any(key.startswith(f"{attention}.transformer_blocks.") for key in tensors)
    return _levels(tensors, f"{attention}.transformer_blocks") if present else None
