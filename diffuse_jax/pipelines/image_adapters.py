"""IP-Adapters of a pipeline: loading them, their image encoder and the LoRA of a face's, and their scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffuse_jax import weights
from diffuse_jax.adapters import named
from diffuse_jax.adapters.changes import Change, problem
from diffuse_jax.adapters.lora_file import Adapter, stem_of, torch_shape
from diffuse_jax.adapters.named import plain
from diffuse_jax.errors import bad
from diffuse_jax.layouts import IPAdapterFile, read_ip_adapter
from diffuse_jax.messages import brief
from diffuse_jax.models import CLIPVisionModelWithProjection, IPAdapter, UNet2DConditionModel
from diffuse_jax.models.image_attention import check_fits, cross_attentions
from diffuse_jax.models.one_file import open_part
from diffuse_jax.models.unet_2d_condition import UNet2DConditionConfig
from diffuse_jax.pipelines.adapting import with_adapters
from diffuse_jax.pipelines.parts.ip_adapter import COMPONENT
from diffuse_jax.processors import CLIPImageProcessor
from diffuse_jax.weights.names import flatten

Scale = float | Sequence[float] | Mapping[str, Any]
"""The strength of an IP-Adapter: one number; with masks also one for each image; or numbers by block,
``{"down": {"block_2": [0.0, 1.0]}, "mid": 0.5, "up": {"block_0": [0.0, 1.0, 0.0]}}``, for all layers of a block or for
each. What a mapping does not name has 0."""


@dataclasses.dataclass(frozen=True)
class ImageAdapters:
    """The IP-Adapters of a pipeline; immutable, as the pipeline is.

    Attributes:
      nets: the networks, whose parameters are ``pipe.params["ip_adapter"]``.
      scales: the strength of each.
      components: the components that loading added to the pipeline.
      loras: the live adapters that loading added.
    """

    nets: tuple[IPAdapter, ...] = ()
    scales: tuple[Scale, ...] = ()
    components: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()


# Loading


def with_ip_adapters(
    pipe: Any,
    source: Any,
    subfolder: Any,
    weight_name: Any,
    image_encoder_folder: str | None,
    config: Mapping[str, Any] | None,
    hub: Mapping[str, Any],
) -> Any:
    """The pipeline with the adapters of some files; see ``DiffusionPipeline.load_ip_adapter``."""
    if pipe.family is not None and "ip_adapter_image" not in pipe.family.options.__annotations__:
        raise ValueError(f"{type(pipe).__name__} takes no IP-Adapters: its calls have no ip_adapter_image")
    unet = pipe.components.get("unet")
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"IP-Adapters need a UNet2DConditionModel; {type(pipe).__name__} has {type(unet).__name__}")
    places = one_for_each(source, subfolder, weight_name)
    nets, trees, loras = [], [], []
    for where, folder, name in places:
        file = weights.resolve_file(where, Path(folder or "", name).as_posix(), **hub)
        settings = own_config(file) | dict(config or {})
        found = read_ip_adapter(file)
        options = {"config": settings, "dtype": unet.dtype, "param_dtype": None, "mesh": pipe.mesh}
        net, params = open_part(IPAdapter, found.part, file, **options)
        check_fits(net.config, unet.config)
        nets.append(net)
        trees.append(params)
        loras.append(face_lora(found, file, unet))
    pipe = without_ip_adapters(pipe)
    added = encoder_parts(pipe, *places[0][:2], image_encoder_folder, hub)
    pipe = pipe.replace(**added) if added else pipe
    params = {**pipe.params, COMPONENT: tuple(trees)}
    state = ImageAdapters(tuple(nets), (1.0,) * len(nets), tuple(added))
    return with_loras(dataclasses.replace(pipe, params=params, image_adapters=state), loras)


def one_for_each(source: Any, subfolder: Any, weight_name: Any) -> list[tuple[Any, str | None, str]]:
    """Source, subfolder and file of each adapter; a single one holds for all.

    Raises:
      ValueError: lists of different lengths.
    """
    given = {"weight_name": weight_name, "source": source, "subfolder": subfolder}
    lists = {name: [*x] if isinstance(x, list | tuple) else [x] for name, x in given.items()}
    count = len(lists["weight_name"])
    if not count or any(len(x) not in (1, count) for x in lists.values()):
        shown = ", ".join(f"{len(x)} for {name}" for name, x in lists.items())
        raise ValueError(f"give a source and a subfolder for each weight_name, or one for all; got {shown}")
    full = {name: x * (count if len(x) == 1 else 1) for name, x in lists.items()}
    return list(zip(full["source"], full["subfolder"], full["weight_name"], strict=True))


def own_config(file: Path) -> dict[str, Any]:
    """What ``IPAdapter.save_pretrained`` wrote beside a file; empty for published files."""
    beside = file.parent / "config.json"
    data = weights.read_json(beside) if beside.is_file() else {}
    return {name: data[name] for name in ("shortcut",) if data.get("_class_name") == "IPAdapter" and name in data}


def encoder_parts(
    pipe: Any, source: Any, subfolder: str | None, folder: str | None, hub: Mapping[str, Any]
) -> dict[str, Any]:
    """The image encoder and the feature extractor, those that the pipeline lacks."""
    added: dict[str, Any] = {}
    encoder = pipe.components.get("image_encoder")
    if encoder is None and folder is not None:
        inside = folder if "/" in folder else Path(subfolder or "", folder).as_posix()
        try:
            encoder, params = CLIPVisionModelWithProjection.from_pretrained(
                source, subfolder=inside, dtype=pipe.components["unet"].dtype, mesh=pipe.mesh, **hub
            )
        except weights.WeightsError as error:
            raise weights.WeightsError(
                f"{error}; image_encoder_folder= says where the image encoder is, and None leaves it out "
                "(ip_adapter_image_embeds then takes the place of images)"
            ) from error
        added["image_encoder"] = (encoder, params)
    if pipe.components.get("feature_extractor") is None and encoder is not None:
        edge = encoder.config.image_size
        added["feature_extractor"] = CLIPImageProcessor(size=edge, crop_size=(edge, edge))
    return added


def without_ip_adapters(pipe: Any) -> Any:
    """The pipeline without its adapters and without what loading them added to it."""
    state = pipe.image_adapters
    if not state.nets:
        return pipe
    loras = [name for name in state.loras if name in pipe.adapters.named]
    params = {name: tree for name, tree in pipe.params.items() if name != COMPONENT}
    pipe = dataclasses.replace(pipe, params=params, image_adapters=ImageAdapters())
    pipe = with_adapters(pipe, pipe.adapters.without(loras)) if loras else pipe
    return pipe.replace(**dict.fromkeys(state.components)) if state.components else pipe


# The LoRA of face ID


def face_lora(opened: IPAdapterFile, file: Path, unet: Any) -> Adapter:
    """The LoRA of a UNet in a face adapter's file; empty in most.

    Raises:
      WeightsError: it does not fit the UNet.
    """
    tensors = opened.lora
    crossing, kernels = [*cross_attentions(unet.config)], flatten(unet.shapes()) if tensors else {}
    found: dict[tuple[str, ...], dict[str, np.ndarray]] = {}
    for (number, layer, half), array in tensors.items():
        if number >= 2 * len(crossing):
            raise bad(file, f"has a LoRA for attention {number}; the UNet has {2 * len(crossing)}")
        block = (*crossing[number // 2][:-1], "attn2" if number % 2 else "attn1")
        found.setdefault((*block, "to_out_0" if layer == "to_out" else layer), {})[half] = array
    changes = {}
    for path, parts in found.items():
        shape = torch_shape(kernels[(*path, "kernel")].shape)
        if wrong := problem(parts, shape):
            raise bad(file, f"{stem_of('unet', path)}: {wrong}")
        changes[path] = Change(parts, shape)
    return {"unet": changes} if changes else {}


def with_loras(pipe: Any, loras: Sequence[Adapter]) -> Any:
    """The pipeline with the LoRAs of its adapters live as ``faceid_0`` ..., active beside those that are.

    Raises:
      ValueError: a name is taken.
    """
    adapters, names = pipe.adapters, []
    for i, lora in enumerate(loras):
        if lora:
            names.append(f"faceid_{i}")
            active = {**adapters.weights, names[-1]: 1.0}
            adapters = dataclasses.replace(adapters.loaded(names[-1], lora), weights=active).with_slots()
    if not names:
        return pipe
    state = dataclasses.replace(pipe.image_adapters, loras=tuple(names))
    return with_adapters(dataclasses.replace(pipe, image_adapters=state), adapters)


# Scales


def with_scales(pipe: Any, scale: Any) -> Any:
    """The pipeline whose adapters act at a strength; see ``DiffusionPipeline.set_ip_adapter_scale``."""
    return dataclasses.replace(
        pipe, image_adapters=dataclasses.replace(pipe.image_adapters, scales=scale_of_each(pipe, scale))
    )


def scale_of_each(pipe: Any, scale: Any) -> tuple[Scale, ...]:
    """One scale for each adapter, from one or a list.

    Raises:
      ValueError: no adapter is loaded, the list has another length, or a scale does not fit the UNet.
    """
    count = len(pipe.image_adapters.nets)
    if not count:
        raise ValueError("no IP-Adapter is loaded; call load_ip_adapter first")
    scale = plain(scale)
    given = [*scale] if isinstance(scale, list | tuple) else [scale] * count
    if len(given) != count:
        raise ValueError(f"{count} IP-Adapters have {len(given)} scales, {brief(given)}; give one, or one for each")
    for one in given:
        at_layers(one, pipe.components["unet"].config)
    return tuple(given)


def scale_row(scale: Scale, config: UNet2DConditionConfig, images: int | None) -> np.ndarray:
    """The strength at each of ``L`` layers, float32 ``[L]``, or of each of ``images`` with masks, ``[images,L]``.

    Raises:
      ValueError: there are scales by image and no masks, or another number of them.
    """
    values = at_layers(scale, config)
    lists = [value for value in values if isinstance(value, list | tuple)]
    if lists and images is None:
        raise ValueError(f"a scale for each image, {brief(lists[0])}, needs ip_adapter_masks")
    if wrong := [value for value in lists if len(value) != images]:
        raise ValueError(f"there are {images} images and {len(wrong[0])} scales, {brief(wrong[0])}")
    if images is None:
        return np.asarray(values, np.float32)
    columns = [value if isinstance(value, list | tuple) else [value] * images for value in values]
    return np.asarray(columns, np.float32).T


def at_layers(scale: Scale, config: UNet2DConditionConfig) -> list[Any]:
    """The scale of each cross-attention, in their order: a number, or a list of one for each image.

    Raises:
      ValueError: it names a block that the UNet does not have or whose layers are others, or is not a number.
    """
    paths = [*cross_attentions(config)]
    if not isinstance(scale, Mapping):
        return [checked(scale)] * len(paths)
    if unknown := [name for name in scale if name not in ("down", "mid", "up")]:
        raise ValueError(f"the scale of an IP-Adapter names {brief(unknown[0])}; expected down, mid or up")
    places = dict.fromkeys(path[:2] for path in paths)  # a block and a group of layers in it
    found: dict[tuple[str, ...], Any] = dict.fromkeys(places, 0.0)
    for side, of_side in scale.items():
        blocks: dict[str, list[tuple[str, ...]]] = {}
        for place in places:
            if place[0].startswith(side):
                blocks.setdefault("mid" if side == "mid" else f"block_{place[0].rpartition('_')[2]}", []).append(place)
        each = of_side if isinstance(of_side, Mapping) else dict.fromkeys(blocks, of_side)
        if unknown := [name for name in each if name not in blocks]:
            have = f"has attention in {', '.join(blocks)}" if blocks else "has no attention there"
            raise ValueError(f"the scale of an IP-Adapter names {brief(unknown[0])} of {side}; the UNet {have}")
        for name, of_block in each.items():
            layers = blocks[name]
            values = of_block if isinstance(of_block, list | tuple) else [of_block]
            if len(values) not in (1, len(layers)):
                raise ValueError(f"{side} {name} has {len(layers)} layers, and its scales are {brief(of_block)}")
            found |= dict(zip(layers, map(checked, [*values] * (len(layers) // len(values))), strict=True))
    return [found[path[:2]] for path in paths]


def checked(scale: Any) -> Any:
    """A finite number, or a list of such.

    Raises:
      ValueError: it is none.
    """
    if isinstance(scale, list | tuple) and scale and not any(isinstance(one, list | tuple) for one in scale):
        return [checked(one) for one in scale]
    return named.checked(scale, "the scale of an IP-Adapter")
