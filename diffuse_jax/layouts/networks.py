"""Single networks in one file: alone or in a whole checkpoint, in the original layout or in that of a folder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffuse_jax.errors import bad
from diffuse_jax.layouts import ip_adapter, t2i_adapter, unet
from diffuse_jax.layouts.configs import Tensors, controlnet_config, text_config, vae_config
from diffuse_jax.layouts.families import CLASS_LABELS, FAMILIES, SIZE_LABELS, UNET, V1, VAE, XL, Family
from diffuse_jax.layouts.kinds import held
from diffuse_jax.layouts.markers import LATENTS_MEAN, read_markers
from diffuse_jax.layouts.midas import depth_config
from diffuse_jax.layouts.original import (
    clip_table,
    controlnet_table,
    midas_table,
    openclip_table,
    unet_table,
    vae_table,
)
from diffuse_jax.layouts.record import make_record, read_record
from diffuse_jax.layouts.rows import Table, to_diffusers
from diffuse_jax.layouts.single_file import Part, is_unused, open_file, without_last_layer
from diffuse_jax.layouts.single_file_writer import original_names, write_tensors
from diffuse_jax.messages import warn
from diffuse_jax.weights.load import Checkpoint

Found = tuple[dict[str, np.ndarray], dict[str, Any]]
"""Tensors under the names of diffusers or transformers, and ``config.json``."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """A file that is being read: its tensors, the prefix of the network's, and the settings that the caller gives."""

    path: Path
    tensors: Tensors
    prefix: str
    given: Collection[str]


@dataclasses.dataclass(frozen=True)
class NetworkLayout:
    """How files hold the networks of one class.

    Attributes:
      what: the network in error messages.
      places: prefix of its names -> component of a whole checkpoint. The first that a file has is read; the last, "",
        is a file of this network alone.
      markers: names of which at least one must be in the file, after the prefix.
      read: (its tensors without the prefix, the file) -> its tensors and configuration.
      table: (its names, its configuration) -> the table of the original layout.
      written: the prefix of published files.
      library: the library of its class.
      beside: pattern of keys that files of this network alone may have besides it -> what they are part of; a warning
        says that they are left out.
    """

    what: str
    places: Mapping[str, str]
    markers: tuple[str, ...]
    read: Callable[[dict[str, np.ndarray], Opened], Found]
    table: Callable[[Collection[str], Mapping[str, Any]], Table]
    written: str = ""
    library: str = "diffusers"
    beside: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read_network(path: Path | str, kind: str, given: Collection[str] = (), *, tensors: Tensors | None = None) -> Part:
    """Open a file that contains a network, ignoring any other networks in it.

    Args:
      path: a ``.safetensors``, ``.bin``, ``.ckpt``, ``.pt`` or ``.pth`` file.
      tensors: those of the file, if it is open already (:func:`~diffuse_jax.layouts.single_file.open_file`).
      kind: the network's class, one of :data:`NETWORKS`.
      given: names of the settings that the caller knows, so that they need not be guessed.

    Raises:
      WeightsError: the file is damaged or hostile, or contains no such network.
    """
    layout = NETWORKS[kind]
    noun = layout.what.split(" ", 1)[1]
    path, tensors = open_file(path) if tensors is None else (Path(path), tensors)
    prefix = next((prefix for prefix in layout.places if _is_there(tensors, prefix, layout)), None)
    if prefix is None:
        after = " or ".join(repr(prefix) for prefix in layout.places if prefix)
        raise bad(
            path,
            f"contains no {noun}: there is no {' or '.join(map(repr, layout.markers))}, alone or after {after}."
            f"{held(tensors, f'{layout.what},')}",
        )
    try:
        found, config = layout.read(_below(tensors, prefix), Opened(path, tensors, prefix, given))
    except (KeyError, ValueError, IndexError, ZeroDivisionError, StopIteration) as error:
        raise bad(
            path,
            f"cannot infer the configuration of its {noun} from its tensors; missing or misshapen: {error}."
            f"{held(tensors, f'{layout.what},')}",
        ) from error
    for pattern, what in layout.beside.items():
        if not prefix and any(re.search(pattern, key) for key in tensors):
            warn(f"{path} also holds {what}; it is left out, because a {kind} has no place for it")
    config |= read_record(path).get("configs", {}).get(layout.places[prefix], {})
    return Part(layout.library, kind, config, Checkpoint(found, dict.fromkeys(found, path)))


def write_network(
    path: Path | str,
    kind: str,
    tensors: Tensors,
    config: Mapping[str, Any],
    cast: Any = lambda array: array.dtype,
    *,
    prefix: str | None = None,
) -> None:
    """Write a network to one ``.safetensors`` file in the original layout, with its configuration in the metadata.

    Args:
      path: the file to write.
      kind: the network's class, one of :data:`NETWORKS`.
      tensors: its tensors under the names of diffusers or transformers.
      config: its ``config.json``.
      cast: array -> the dtype to write it in.
      prefix: what the names begin with; None is the prefix of published files.

    Raises:
      WeightsError: the layout has no name for one of the tensors.
    """
    layout = NETWORKS[kind]
    start = layout.written if prefix is None else prefix
    sources = original_names(tensors, layout.table(tensors, config), start)
    write_tensors(path, sources, cast, make_record({layout.places.get(start, ""): config}, None))


def network_in(tensors: Tensors) -> str | None:
    """The class of the network that a file of these tensors consists of; None if it holds none, several or others."""
    found: dict[str, str] = {}
    for kind, layout in NETWORKS.items():
        for prefix in layout.places:
            if prefix not in found and _is_there(tensors, prefix, layout):
                found[prefix] = kind
    if len(found) != 1:
        return None
    ((prefix, kind),) = found.items()
    others = (key for key in tensors if not key.startswith(prefix) and not is_unused(key))
    return kind if next(others, None) is None else None


def _below(tensors: Tensors, prefix: str) -> dict[str, np.ndarray]:
    """The tensors whose names begin with a prefix, without it."""
    return {key.removeprefix(prefix): array for key, array in tensors.items() if key.startswith(prefix)}


def _is_there(tensors: Tensors, prefix: str, layout: NetworkLayout) -> bool:
    return any(prefix + marker in tensors for marker in layout.markers)


def _controlnet(own: dict[str, np.ndarray], file: Opened) -> Found:
    found = to_diffusers(own, controlnet_table(own))
    return found, controlnet_config(found)


def _t2i_adapter(own: dict[str, np.ndarray], file: Opened) -> Found:
    return t2i_adapter.read_tensors(own)


def _ip_adapter(own: dict[str, np.ndarray], file: Opened) -> Found:
    return ip_adapter.read_tensors(own)


def _depth(own: dict[str, np.ndarray], file: Opened) -> Found:
    own = {key: array for key, array in own.items() if not key.startswith("pretrained.model.head.")}
    found = to_diffusers(own, midas_table(own))
    return found, depth_config(found)


def _vae(own: dict[str, np.ndarray], file: Opened) -> Found:
    own = {key: array for key, array in own.items() if not key.startswith(("loss.", "model_ema."))}
    found = to_diffusers(own, vae_table(own))
    config = vae_config(found, family := _vae_family(found, file))
    if LATENTS_MEAN in file.tensors:
        config |= read_markers(file.path, file.tensors, family, None, "epsilon").vae
    return found, config


def _vae_family(vae: Tensors, file: Opened) -> Family:
    """The family whose ``scaling_factor`` is an autoencoder's, from the UNet beside it or its own shape.

    Raises:
      WeightsError: it is none of these families'.
    """
    labels = {SIZE_LABELS: XL, CLASS_LABELS: FAMILIES["x4-upscaler"]}
    beside = next((family for key, family in labels.items() if key in file.tensors), None)
    if beside or any(key.startswith(UNET) for key in file.tensors):
        return beside or V1
    channels = vae["decoder.conv_in.weight"].shape[1]
    if "encoder.down_blocks.3.resnets.0.conv1.weight" not in vae and channels == 4:
        return FAMILIES["x4-upscaler"]
    known = "scaling_factor" in file.given or "" in read_record(file.path).get("configs", {})
    if not known and channels != 4:
        raise bad(file.path, f"has {channels} latent channels; pass config={{'scaling_factor': ...}}, which it lacks")
    if not known:
        warn(
            f"{file.path} does not say what its latents are scaled by; {V1.vae_scale} of Stable Diffusion 1 and 2 is "
            f"taken. For SDXL pass config={{'scaling_factor': {XL.vae_scale}}}"
        )
    return V1


NOT_TEXT = ("visual.", "vision_model.", "visual_projection.", "logit_scale", "attn_mask")
"""What files of a whole CLIP hold besides the text encoder."""

IMAGE_ENCODER = {r"^(visual|vision_model|visual_projection)\.": "CLIP's image encoder"}


def _text(projects: bool) -> Callable[[dict[str, np.ndarray], Opened], Found]:
    """How a text encoder with or without a projection is read."""

    def read(own: dict[str, np.ndarray], file: Opened) -> Found:
        own = {key: array for key, array in own.items() if not key.startswith(NOT_TEXT)}
        layout = "openclip" if "positional_embedding" in own else "clip"
        if layout == "openclip" and not projects and file.prefix:  # Stable Diffusion 2
            own = without_last_layer(own)
        found = to_diffusers(own, openclip_table(own) if layout == "openclip" else clip_table(own))
        if not projects:
            found.pop("text_projection.weight", None)
        width = found["text_model.embeddings.token_embedding.weight"].shape[1]
        return found, text_config(found, "clip" if layout == "clip" and width not in OPENCLIP_WIDTHS else "openclip")

    return read


OPENCLIP_WIDTHS = (1024, 1280)
"""Widths of the OpenCLIP encoders of Stable Diffusion, which some files hold under the names of transformers."""


def _text_table(keys: Collection[str], config: Mapping[str, Any]) -> Table:
    return clip_table(keys) if config.get("hidden_act") == "quick_gelu" else openclip_table(keys)


CLIP_MARKERS = (
    "text_model.embeddings.token_embedding.weight",
    "embeddings.token_embedding.weight",
    "token_embedding.weight",
)

NETWORKS: dict[str, NetworkLayout] = {
    "UNet2DConditionModel": NetworkLayout(
        "a whole UNet",
        {UNET: "unet", "": ""},
        ("output_blocks.0.0.in_layers.0.weight", "up_blocks.0.resnets.0.conv1.weight"),
        lambda own, file: unet.identified(own),
        lambda keys, config: unet_table(keys),
        UNET,
    ),
    "AutoencoderKL": NetworkLayout(
        "an autoencoder",
        {VAE: "vae", "": ""},
        ("decoder.conv_in.weight",),
        _vae,
        lambda keys, config: vae_table(keys),
    ),
    "ControlNetModel": NetworkLayout(
        "a ControlNet",
        {"control_model.": "controlnet", "": ""},
        ("input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight"),
        _controlnet,
        lambda keys, config: controlnet_table(keys),
        "control_model.",
    ),
    "T2IAdapter": NetworkLayout(
        "a T2I-Adapter",
        {t2i_adapter.HEAD: "adapter", "": ""},
        ("body.0.block1.weight", "body.0.body.0.block1.weight", "body.0.resnets.0.block1.weight"),
        _t2i_adapter,
        lambda keys, config: t2i_adapter.t2i_adapter_table(keys),
    ),
    "IPAdapter": NetworkLayout(
        "an IP-Adapter",
        {"": ""},
        ("ip_adapter.1.to_k_ip.weight",),
        _ip_adapter,
        lambda keys, config: [(key, key, "same") for key in keys],
        library="diffuse_jax",
        beside={ip_adapter.LORA.pattern: "a LoRA of the UNet, which load_ip_adapter of a pipeline reads"},
    ),
    "CLIPTextModelWithProjection": NetworkLayout(
        "a text encoder with a projection",
        {
            "conditioner.embedders.1.model.": "text_encoder_2",
            "conditioner.embedders.0.model.": "text_encoder_2",
            "": "",
        },
        ("text_projection", "text_projection.weight"),
        _text(projects=True),
        _text_table,
        library="transformers",
        beside=IMAGE_ENCODER,
    ),
    "CLIPTextModel": NetworkLayout(
        "a text encoder",
        {
            **dict.fromkeys(("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."), "text_encoder"),
            **dict.fromkeys(("cond_stage_model.model.", "conditioner.embedders.0.model."), "text_encoder"),
            "": "",
        },
        CLIP_MARKERS,
        _text(projects=False),
        _text_table,
        library="transformers",
        beside=IMAGE_ENCODER,
    ),
    "DPTForDepthEstimation": NetworkLayout(
        "a depth network",
        {"depth_model.model.": "depth_estimator", "": ""},
        ("pretrained.model.cls_token", "dpt.embeddings.cls_token"),
        _depth,
        lambda keys, config: midas_table(keys),
        library="transformers",
    ),
}
"""Class of a network -> how single files hold it."""
