"""``config.json`` of the networks in a single file, inferred from their tensors and completed with family constants."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffuse_jax.layouts.families import Family
from diffuse_jax.layouts.original import label_kind

Tensors = Mapping[str, np.ndarray]


def unet_config(unet: Tensors, family: Family) -> dict[str, Any]:
    """``config.json`` of a UNet from its tensors under diffusers' names."""
    encoder = encoder_config(unet, family.heads)
    up = [_depths(unet, f"up_blocks.{i}") for i in range(_levels(unet, "up_blocks"))]
    distilled = unet.get("time_embedding.cond_proj.weight")
    return (
        encoder
        | ({} if distilled is None else {"time_cond_proj_dim": distilled.shape[1]})
        | {
            "_class_name": "UNet2DConditionModel",
            "sample_size": family.latent_size,
            "out_channels": _outputs(unet, "conv_out.weight"),
            "up_block_types": ["CrossAttnUpBlock2D" if depths else "UpBlock2D" for depths in up],
        }
        | _reversed(encoder["transformer_layers_per_block"], up)
    )


def _reversed(down: Any, up: list[list[int]]) -> dict[str, Any]:
    """The part of the config for attention in the upward path, where it does not mirror the downward path."""
    mirrored = [down] * len(up) if isinstance(down, int) else down[::-1]
    own = [_shortest(depths) if depths else depth for depths, depth in zip(up, mirrored, strict=True)]
    nested = any(isinstance(depth, list) for depth in mirrored)
    return {"reverse_transformer_layers_per_block": own} if nested or own != mirrored else {}


def controlnet_config(net: Tensors) -> dict[str, Any]:
    """``config.json`` of a ControlNet from its tensors under diffusers' names.

    Like Stable Diffusion 1, networks whose attention projections are convolutions have 8 heads at every level.
    """
    hint = "controlnet_cond_embedding"
    encoder = encoder_config(net, None if linear_projection(net) else 8)
    inner = range(1, _levels(net, f"{hint}.blocks"), 2) if f"{hint}.blocks.0.weight" in net else ()
    return encoder | {
        "_class_name": "ControlNetModel",
        "conditioning_channels": net[f"{hint}.conv_in.weight"].shape[1],
        "conditioning_embedding_out_channels": [
            _outputs(net, f"{hint}.{name}.weight") for name in ("conv_in", *(f"blocks.{i}" for i in inner))
        ],
    }


def encoder_config(unet: Tensors, heads: int | None) -> dict[str, Any]:
    """The part of ``config.json`` for the encoder of a UNet, which a ControlNet shares."""
    levels = _levels(unet, "down_blocks")
    channels = [_outputs(unet, f"down_blocks.{i}.resnets.0.conv1.weight") for i in range(levels)]
    depths = [_depths(unet, f"down_blocks.{i}") for i in range(levels)]
    mid = _depths(unet, "mid_block")
    # A level without attention needs a value too; the last level's is also the middle block's.
    each = [_shortest(level or (mid if i + 1 == levels else []) or [1]) for i, level in enumerate(depths)]
    used = [depth for depth, level in zip(each, (*depths[:-1], depths[-1] or mid)) if level]
    attention = next(key for key in unet if key.endswith("attn2.to_k.weight"))
    context = unet[attention].shape[1]
    config = {
        "in_channels": unet["conv_in.weight"].shape[1],
        "block_out_channels": channels,
        "layers_per_block": _layers(unet, "down_blocks"),
        "down_block_types": ["CrossAttnDownBlock2D" if level else "DownBlock2D" for level in depths],
        "mid_block_type": _middle(unet, mid),
        "attention_head_dim": heads or [max(1, width // 64) for width in channels],
        "cross_attention_dim": context,
        "use_linear_projection": linear_projection(unet),
        "transformer_layers_per_block": used[0] if isinstance(used[0], int) and used == used[:1] * len(used) else each,
        "only_cross_attention": _only_cross(unet, levels, context),
    }
    return config | _label_config(unet)


def _label_config(unet: Tensors) -> dict[str, Any]:
    """The part of the config for conditioning other than text and time."""
    kind = label_kind(unet) if any(key.startswith(("class_embedding.", "add_embedding.")) for key in unet) else None
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
    """Which levels attend to the text in both attentions (the upscaler)."""
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
        "sample_size": family.image_size,
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
        # The ids of the published files; they select the older rule for finding the end of the text.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _outputs(tensors: Tensors, key: str) -> int:
    return tensors[key].shape[0]


def _levels(tensors: Tensors, prefix: str) -> int:
    """The number of list items after a prefix: the largest index plus one."""
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in tensors)
    levels = 1 + max(int(match[1]) for match in found if match)
    if levels > len(tensors):
        raise ValueError(f"{prefix} has index {levels - 1} in a file of {len(tensors)} tensors")
    return levels


def _layers(tensors: Tensors, prefix: str) -> int:
    return _levels(tensors, f"{prefix}.0.resnets")


def _depths(tensors: Tensors, block: str) -> list[int]:
    """The number of transformer blocks of each attention of a block; empty if it has no attention."""
    attentions = (f"{block}.attentions.{i}" for i in itertools.count())
    present = itertools.takewhile(lambda attention: f"{attention}.norm.weight" in tensors, attentions)
    has_blocks = lambda attention: any(key.startswith(f"{attention}.transformer_blocks.") for key in tensors)
    return [_levels(tensors, f"{each}.transformer_blocks") if has_blocks(each) else 0 for each in present]


def _shortest(depths: list[int]) -> int | list[int]:
    """One number if all are the same."""
    return depths[0] if len(set(depths)) == 1 else depths


def _middle(tensors: Tensors, depths: list[int]) -> str | None:
    """The kind of the middle block; it is absent from a few distilled networks."""
    if "mid_block.resnets.0.conv1.weight" not in tensors:
        return None
    return "UNetMidBlock2DCrossAttn" if depths else "UNetMidBlock2D"


def linear_projection(tensors: Tensors) -> bool:
    """Whether the projections around attention are linear rather than convolutions."""
    return tensors[next(key for key in tensors if key.endswith(".proj_in.weight"))].ndim == 2
