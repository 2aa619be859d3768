"""Reading an IP-Adapter from its file: what projects image embeddings, and keys and values for a UNet's layers.

Published files (``.safetensors``, or ``.bin`` with two nested dicts) have ``image_proj.*`` and ``ip_adapter.{n}.*``.
``n`` counts the attentions of a UNet in PyTorch's order (downward path, upward path, middle block; self-attention and
cross-attention of a block alternate), so cross-attentions have odd numbers. The names of :class:`~diffuse_jax.models.
IPAdapter` are those of these files; other spellings become them here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffuse_jax.errors import bad
from diffuse_jax.layouts.single_file import Part, open_file
from diffuse_jax.weights.load import Checkpoint
from diffuse_jax.weights.names import Renames, rename

SPELLINGS: Renames = (
    (r"^image_proj\.image_embeds\.", "image_proj.proj."),
    (r"\.layers\.(\d+)\.attn\.(.*)$", r".layers.\1.0.\2"),
    (r"\.layers\.(\d+)\.ln0\.", r".layers.\1.0.norm1."),
    (r"\.layers\.(\d+)\.ln1\.", r".layers.\1.0.norm2."),
    (r"\.layers\.(\d+)\.ff\.0\.", r".layers.\1.1.0."),
    (r"\.layers\.(\d+)\.ff\.1\.net\.0\.proj\.", r".layers.\1.1.1."),
    (r"\.layers\.(\d+)\.ff\.1\.net\.2\.", r".layers.\1.1.3."),
    (r"\.to_out\.0\.", ".to_out."),
)
"""Names as PyTorch diffusers has them in memory, which some files have too -> those of most published files."""

HALVES = ("image_proj.", "ip_adapter.")
"""How the names of an adapter's tensors begin."""

HEAD_WIDTH = 64
"""Of a resampler's attention; no published one has another."""

LORA = re.compile(r"ip_adapter\.(\d+)\.(to_[qkv]|to_out)_lora\.(down|up)\.weight")


@dataclasses.dataclass(frozen=True)
class IPAdapterFile:
    """What a file holds: the adapter, and for faces a LoRA of the UNet that it was trained with.

    Attributes:
      part: configuration and tensors of the network.
      lora: ``(number of the attention, layer, "down" or "up") -> tensor``, empty in most files; the number counts
        self-attentions and cross-attentions.
    """

    part: Part
    lora: Mapping[tuple[int, str, str], np.ndarray]


def read_ip_adapter(path: Path | str) -> IPAdapterFile:
    """Open a published file.

    Raises:
      WeightsError: a damaged or hostile file, or there is no IP-Adapter in it.
    """
    path, tensors = open_file(path)
    try:
        own, config = read_tensors(tensors)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise bad(
            path, f"holds no IP-Adapter whose configuration its tensors show; missing or misshapen: {error}"
        ) from error
    lora = {(int(m[1]), m[2], m[3]): array for key, array in tensors.items() if (m := LORA.fullmatch(key))}
    return IPAdapterFile(Part("diffuse_jax", "IPAdapter", config, Checkpoint(own, dict.fromkeys(own, path))), lora)


def read_tensors(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of an adapter under the names of published files, and its ``config.json``.

    Raises:
      KeyError, ValueError, IndexError, ZeroDivisionError: they are not those of an IP-Adapter.
    """
    if missing := [name for name in HALVES if not any(key.startswith(name) for key in tensors)]:
        raise KeyError(f"{missing[0]}*")
    own = _fused({rename(key, SPELLINGS): array for key, array in tensors.items() if not LORA.fullmatch(key)})
    return own, ip_adapter_config(own)


def _fused(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With keys and values of a resampler as one tensor, as published files have them."""
    result = dict(tensors)
    for key in tensors:
        if key.startswith("image_proj.") and key.endswith(".to_k.weight"):
            other = key.replace(".to_k.", ".to_v.")
            result[key.replace(".to_k.", ".to_kv.")] = np.concatenate([result.pop(key), result.pop(other)])
    return result


def ip_adapter_config(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The fields of an ``IPAdapterConfig`` that the shapes of a file's tensors show."""
    image = {key.removeprefix("image_proj."): array.shape for key, array in tensors.items() if "image_proj." in key}
    numbers = sorted(int(m[1]) for key in tensors if (m := re.fullmatch(r"ip_adapter\.(\d+)\.to_k_ip\.weight", key)))
    layers = [tensors[f"ip_adapter.{n}.to_k_ip.weight"].shape for n in numbers]
    common = {"layer_widths": [width for width, _ in layers], "cross_attention_dim": layers[0][1]}
    if "proj.weight" in image:
        width = image["norm.weight"][0]
        tokens, image_width = image["proj.weight"][0] // width, image["proj.weight"][1]
        return common | {"projection": "linear", "image_width": image_width, "tokens": tokens}
    if "proj.3.weight" in image:
        hidden, image_width = image["proj.0.weight"]
        return common | {"projection": "mlp", "image_width": image_width, "hidden_width": hidden}
    if "perceiver_resampler.proj_in.weight" in image:
        resampler = _resampler(image, "perceiver_resampler.")
        tokens = image["proj.2.weight"][0] // resampler["hidden_width"]
        faces = {"face_hidden_width": image["proj.0.weight"][0], "face_width": image["proj.0.weight"][1]}
        return common | resampler | faces | {"projection": "face_resampler", "tokens": tokens}
    if "norm.weight" in image:
        hidden, image_width = image["proj.0.weight"]
        tokens = image["proj.2.weight"][0] // image["norm.weight"][0]
        sizes = {"image_width": image_width, "hidden_width": hidden, "tokens": tokens}
        return common | sizes | {"projection": "face"}
    return common | _resampler(image, "") | {"projection": "resampler", "tokens": image["latents"][1]}


def _resampler(image: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, Any]:
    """The sizes of a resampler whose tensors have this prefix."""
    hidden, image_width = image[f"{prefix}proj_in.weight"]
    layers = {key.split("layers.")[1].split(".")[0] for key in image if key.startswith(f"{prefix}layers.")}
    heads = image[f"{prefix}layers.0.0.to_q.weight"][0] // HEAD_WIDTH
    mlp = image[f"{prefix}layers.0.1.1.weight"][0]
    return {
        "image_width": image_width,
        "hidden_width": hidden,
        "heads": heads,
        "depth": len(layers),
        "mlp_width": mlp,
    }
