"""MiDaS' depth network (a hybrid DPT), as the files of Stable Diffusion 2's depth model hold it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from diffuse_jax.errors import WeightsError
from diffuse_jax.layouts.rows import Table

BACKBONE = ("pretrained.model.patch_embed.backbone", "dpt.embeddings.backbone.bit")
FIXED: Table = [
    ("pretrained.model.cls_token", "dpt.embeddings.cls_token", "same"),
    ("pretrained.model.pos_embed", "dpt.embeddings.position_embeddings", "same"),
    ("pretrained.model.patch_embed.proj", "dpt.embeddings.projection", "same"),
    (f"{BACKBONE[0]}.stem.conv", f"{BACKBONE[1]}.embedder.convolution", "same"),
    (f"{BACKBONE[0]}.stem.norm", f"{BACKBONE[1]}.embedder.norm", "same"),
    ("pretrained.model.norm", "dpt.layernorm", "same"),
    ("scratch.output_conv", "head.head", "same"),
    *[(f"scratch.layer{i + 1}_rn", f"neck.convs.{i}", "same") for i in range(4)],
]
LAYER = [
    ("norm1", "layernorm_before", "same"),
    ("norm2", "layernorm_after", "same"),
    ("attn.proj", "attention.output.dense", "same"),
    ("mlp.fc1", "intermediate.dense", "same"),
    ("mlp.fc2", "output.dense", "same"),
    *[
        (f"attn.qkv.{kind}", f"attention.attention.{name}.{kind}", f"part{i}")
        for kind in ("weight", "bias")
        for i, name in enumerate(("query", "key", "value"))
    ],
]
REASSEMBLE = [("0.project", "readout_projects.{}"), ("3", "layers.{}.projection"), ("4", "layers.{}.resize")]
FUSION = [("out_conv", "projection")] + [
    (f"resConfUnit{i}.conv{j}", f"residual_layer{i}.convolution{j}") for i in (1, 2) for j in (1, 2)
]


def midas_table(keys: Iterable[str]) -> Table:
    """The table of a depth network, from its keys under either naming scheme."""
    keys = set(keys)
    table = list(FIXED)
    for i in range(_count(keys, r"(?:pretrained\.model\.blocks|dpt\.encoder\.layer)\.(\d+)\.")):
        old, new = f"pretrained.model.blocks.{i}", f"dpt.encoder.layer.{i}"
        table += [(f"{old}.{a}", f"{new}.{b}", operation) for a, b, operation in LAYER]
    for i in range(4):
        old, new = f"pretrained.act_postprocess{i + 1}", "neck.reassemble_stage"
        table += [(f"{old}.{a}", f"{new}.{b.format(i)}", "same") for a, b in REASSEMBLE]
        old, new = f"scratch.refinenet{4 - i}", f"neck.fusion_stage.layers.{i}"  # MiDaS counts from the finest
        table += [(f"{old}.{a}", f"{new}.{b}", "same") for a, b in FUSION]
    for stage, count in enumerate(_depths(keys)):
        old, new = f"{BACKBONE[0]}.stages.{stage}.blocks", f"{BACKBONE[1]}.encoder.stages.{stage}.layers"
        table += [(f"{old}.{i}", f"{new}.{i}", "same") for i in range(count)]
    return table


def depth_config(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """``config.json`` of a hybrid DPT from its tensors under transformers' names.

    What tensors do not imply is that of the published network: heads of 64 channels, the layers that are read.
    """
    _, tokens, width = tensors["dpt.embeddings.position_embeddings"].shape
    depths, encoder = _depths(set(tensors)), f"{BACKBONE[1]}.encoder.stages"
    return {
        "architectures": ["DPTForDepthEstimation"],
        "model_type": "dpt",
        "hidden_size": width,
        "num_hidden_layers": _count(set(tensors), r"dpt\.encoder\.layer\.(\d+)\."),
        "num_attention_heads": max(1, width // 64),
        "intermediate_size": tensors["dpt.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "image_size": 16 * round((tokens - 1) ** 0.5),
        "is_hybrid": True,
        "readout_type": "project",
        "reassemble_factors": [1, 1, 1, 0.5],
        "neck_hidden_sizes": [tensors[f"neck.convs.{i}.weight"].shape[1] for i in range(4)],
        "neck_ignore_stages": [0, 1],
        "fusion_hidden_size": tensors["neck.convs.0.weight"].shape[0],
        "backbone_config": {
            "model_type": "bit",
            "global_padding": "same",
            "layer_type": "bottleneck",
            "depths": depths,
            "embedding_size": tensors[f"{BACKBONE[1]}.embedder.convolution.weight"].shape[0],
            "hidden_sizes": [tensors[f"{encoder}.{i}.layers.0.conv3.weight"].shape[0] for i in range(len(depths))],
            "out_features": [f"stage{i + 1}" for i in range(len(depths))],
            "embedding_dynamic_padding": True,
        },
    }


def _depths(keys: set[str]) -> list[int]:
    """The number of blocks of each of the backbone's stages."""
    either = r"(?:pretrained\.model\.patch_embed\.backbone|dpt\.embeddings\.backbone\.bit\.encoder)\.stages\."
    return [_count(keys, rf"{either}{i}\.(?:blocks|layers)\.(\d+)\.") for i in range(_count(keys, rf"{either}(\d+)\."))]


def _count(keys: set[str], pattern: str) -> int:
    """One more than the largest number that a pattern finds at the start of keys.

    Raises:
      WeightsError: numbers in between are missing.
    """
    found = {int(m[1]) for m in (re.match(pattern, key) for key in keys) if m}
    if found and max(found) >= len(found):
        raise WeightsError(f"the depth network numbers its layers up to {max(found)}, but some in between are missing")
    return len(found)
