"""Tables from the names of the original (CompVis, Stability) checkpoints to those of diffusers and transformers.

A table (see :mod:`diffuse_jax.layouts.rows`) is built from the keys, which show the number of levels and layers under
either naming scheme, so no configuration is needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable

from diffuse_jax.errors import WeightsError
from diffuse_jax.layouts.midas import midas_table
from diffuse_jax.layouts.rows import Table
from diffuse_jax.weights.names import ALIASES, rename

UNET_FIXED: Table = [
    ("time_embed.0", "time_embedding.linear_1", "same"),
    ("time_embed.2", "time_embedding.linear_2", "same"),
    ("input_blocks.0.0", "conv_in", "same"),
    ("middle_block.1", "mid_block.attentions.0", "same"),
    ("out.0", "conv_norm_out", "same"),
    ("out.2", "conv_out", "same"),
]
UNET_RESNET = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
]
UNET_LABELS = {
    "text_time": [("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2")],
    "projection": [("label_emb.0.0", "class_embedding.linear_1"), ("label_emb.0.2", "class_embedding.linear_2")],
    "classes": [("label_emb", "class_embedding")],
}
"""What ``label_emb`` is: SDXL's micro-conditioning and pooled prompt embedding, an image embedding, or a class
label."""

VAE_FIXED: Table = [
    ("quant_conv", "quant_conv", "same"),
    ("post_quant_conv", "post_quant_conv", "same"),
    *[
        (f"{side}.{old}", f"{side}.{new}", "same")
        for side in ("encoder", "decoder")
        for old, new in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out"))
    ],
    *[
        (f"{side}.mid.attn_1.{old}", f"{side}.mid_block.attentions.0.{new}", operation)
        for side in ("encoder", "decoder")
        for old, new, operation in (
            ("norm", "group_norm", "same"),
            ("q", "to_q", "pointwise"),
            ("k", "to_k", "pointwise"),
            ("v", "to_v", "pointwise"),
            ("proj_out", "to_out.0", "pointwise"),
        )
    ],
]
VAE_RESNET = [(same, same) for same in ("norm1", "conv1", "norm2", "conv2")] + [("nin_shortcut", "conv_shortcut")]

OPENCLIP_FIXED: Table = [
    ("token_embedding", "text_model.embeddings.token_embedding", "same"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight", "same"),
    ("ln_final", "text_model.final_layer_norm", "same"),
    ("text_projection", "text_projection.weight", "transpose"),
]
OPENCLIP_LAYER = [
    ("ln_1", "layer_norm1", "same"),
    ("ln_2", "layer_norm2", "same"),
    ("mlp.c_fc", "mlp.fc1", "same"),
    ("mlp.c_proj", "mlp.fc2", "same"),
    ("attn.out_proj", "self_attn.out_proj", "same"),
    *[
        (f"attn.in_proj_{kind}", f"self_attn.{name}_proj.{kind}", f"part{i}")
        for kind in ("weight", "bias")
        for i, name in enumerate("qkv")
    ],
]


def unet_table(keys: Iterable[str]) -> Table:
    """The table of a UNet, from its keys under either naming scheme.

    Raises:
      WeightsError: the keys do not form regular levels and layers.
    """
    keys = set(keys)
    down = _indices(keys, r"down_blocks\.(\d+)\.resnets\.(\d+)\.")
    if down:
        levels, layers = 1 + max(b for b, _ in down), 1 + max(i for _, i in down)
        attends = {int(b) for (b,) in _indices(keys, r"up_blocks\.(\d+)\.attentions\.")}
    else:
        strides = sorted(i for (i,) in _indices(keys, r"input_blocks\.(\d+)\.0\.op\."))
        blocks = max((i for (i,) in _indices(keys, r"input_blocks\.(\d+)\.0\.")), default=0)
        levels, layers = len(strides) + 1, (strides[0] - 1 if strides else blocks)
        if layers < 1 or (layers + 1) * levels - 1 != blocks:
            raise WeightsError(f"its input_blocks (0 to {blocks}, downsampling at {strides}) do not form a UNet")
        attends = {i // (layers + 1) for (i,) in _indices(keys, r"output_blocks\.(\d+)\.1\.transformer_blocks\.")}
    table = UNET_FIXED + [(old, new, "same") for old, new in UNET_LABELS[label_kind(keys)]]
    table += _resnet("middle_block.0", "mid_block.resnets.0", UNET_RESNET)
    table += _resnet("middle_block.2", "mid_block.resnets.1", UNET_RESNET)
    for level in range(levels):
        table += _unet_level(level, layers, level in attends)
    return table


def controlnet_table(keys: Iterable[str]) -> Table:
    """The table of a ControlNet, from its keys in either spelling: that of its UNet's encoder, and what it adds."""
    keys = set(keys)
    table = [*unet_table(keys), ("middle_block_out.0", "controlnet_mid_block", "same")]
    exits = _indices(keys, r"(?:zero_convs|controlnet_down_blocks)\.(\d+)\.")
    table += [(f"zero_convs.{i}.0", f"controlnet_down_blocks.{i}", "same") for (i,) in exits]
    inner = _indices(keys, r"controlnet_cond_embedding\.blocks\.(\d+)\.")
    last = 2 * len(inner) + 2 if inner else max((i for (i,) in _indices(keys, r"input_hint_block\.(\d+)\.")), default=2)
    table.append(("input_hint_block.0", "controlnet_cond_embedding.conv_in", "same"))
    between = range(2, last, 2)  # activations have odd numbers
    table += [(f"input_hint_block.{i}", f"controlnet_cond_embedding.blocks.{i // 2 - 1}", "same") for i in between]
    return [*table, (f"input_hint_block.{last}", "controlnet_cond_embedding.conv_out", "same")]


def _unet_level(level: int, layers: int, up_attends: bool) -> Table:
    """The rows of one level of the down path and of the up path."""
    down, up = 1 + level * (layers + 1), level * (layers + 1)
    table = [(f"input_blocks.{down + layers}.0.op", f"down_blocks.{level}.downsamplers.0.conv", "same")]
    for i in range(layers):
        table += _resnet(f"input_blocks.{down + i}.0", f"down_blocks.{level}.resnets.{i}", UNET_RESNET)
        table.append((f"input_blocks.{down + i}.1", f"down_blocks.{level}.attentions.{i}", "same"))
    for i in range(layers + 1):
        table += _resnet(f"output_blocks.{up + i}.0", f"up_blocks.{level}.resnets.{i}", UNET_RESNET)
        if up_attends:
            table.append((f"output_blocks.{up + i}.1", f"up_blocks.{level}.attentions.{i}", "same"))
    sampler = f"output_blocks.{up + layers}.{2 if up_attends else 1}.conv"
    return [*table, (sampler, f"up_blocks.{level}.upsamplers.0.conv", "same")]


def label_kind(keys: Iterable[str]) -> str:
    """Which of :data:`UNET_LABELS` a UNet has.

    Both kinds of MLP are ``label_emb.0`` in the original. Only SDXL's UNets have no attention at full resolution, and
    all of them are conditioned on pooled text and sizes.
    """
    keys = set(keys)
    if keys & {"label_emb.weight", "class_embedding.weight"}:
        return "classes"
    if "class_embedding.linear_1.weight" in keys:
        return "projection"
    if "add_embedding.linear_1.weight" in keys:
        return "text_time"
    return "projection" if any(key.startswith("input_blocks.1.1.") for key in keys) else "text_time"


def vae_table(keys: Iterable[str]) -> Table:
    """The table of an autoencoder, from its keys under either naming scheme."""
    found = _indices(set(keys), r"encoder\.(?:down|down_blocks)\.(\d+)\.(?:block|resnets)\.(\d+)\.")
    if not found:
        raise WeightsError("its keys contain no autoencoder")
    levels, layers = 1 + max(b for b, _ in found), 1 + max(i for _, i in found)
    table = list(VAE_FIXED)
    for side in ("encoder", "decoder"):
        for i in range(2):
            table += _resnet(f"{side}.mid.block_{i + 1}", f"{side}.mid_block.resnets.{i}", VAE_RESNET)
    for level in range(levels):
        up = levels - 1 - level  # the original numbers both paths from the finest level
        for i in range(layers):
            table += _resnet(f"encoder.down.{level}.block.{i}", f"encoder.down_blocks.{level}.resnets.{i}", VAE_RESNET)
        for i in range(layers + 1):
            table += _resnet(f"decoder.up.{level}.block.{i}", f"decoder.up_blocks.{up}.resnets.{i}", VAE_RESNET)
        down_name, up_name = f"encoder.down_blocks.{level}.downsamplers.0", f"decoder.up_blocks.{up}.upsamplers.0"
        table.append((f"encoder.down.{level}.downsample", down_name, "same"))
        table.append((f"decoder.up.{level}.upsample", up_name, "same"))
    return table


def openclip_table(keys: Iterable[str]) -> Table:
    """The table of an OpenCLIP text encoder, from its keys under either naming scheme."""
    found = _indices(set(keys), r"(?:transformer\.resblocks|text_model\.encoder\.layers)\.(\d+)\.")
    table = list(OPENCLIP_FIXED)
    for (i,) in sorted(found):
        old, new = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        table += [(f"{old}.{a}", f"{new}.{b}", operation) for a, b, operation in OPENCLIP_LAYER]
    return table


def clip_table(keys: Iterable[str]) -> Table:
    """The table of a CLIP text encoder, which original files store under transformers' names, old or new."""
    return [(key, rename(key, ALIASES), "same") for key in keys]


def _resnet(old: str, new: str, parts: list[tuple[str, str]]) -> Table:
    return [(f"{old}.{a}", f"{new}.{b}", "same") for a, b in parts]


def _indices(keys: Collection[str], pattern: str) -> set[tuple[int, ...]]:
    """The indices that a pattern matches at the start of keys.

    Raises:
      WeightsError: an index is too large for the number of keys, so the table would be unboundedly long.
    """
    found = {tuple(map(int, m.groups())) for m in (re.match(pattern, key) for key in keys) if m}
    most = math.prod(1 + max(column) for column in zip(*found, strict=True))
    if most > max(len(keys), 1):
        raise WeightsError(f"{len(keys)} keys number blocks up to {max(found)}; some in between are missing")
    return found


TABLES: dict[str, Callable[[Iterable[str]], Table]] = {
    "unet": unet_table,
    "vae": vae_table,
    "clip": clip_table,
    "openclip": openclip_table,
    "controlnet": controlnet_table,
    "midas": midas_table,
}
"""Kind of network -> the function that builds its table from its keys."""
