"""The images of a call for IP-Adapters, as rows and parts of its method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffuse_jax.pipelines.family import Call
from diffuse_jax.pipelines.image_adapters import scale_of_each, scale_row
from diffuse_jax.pipelines.inputs import eight_bit, image_list, mask_pixels, per_prompt
from diffuse_jax.pipelines.method import Net, Params, Rows
from diffuse_jax.pipelines.parts.guidance import Branches, is_branches
from diffuse_jax.pipelines.parts.ip_adapter import COMPONENT, EncodeImages, ImagePrompted, encoded
from diffuse_jax.pipelines.running import apply

ARGUMENTS = ("ip_adapter_image", "ip_adapter_image_embeds", "ip_adapter_scale", "ip_adapter_masks")


def image_prompt_rows(pipe: Any, call: Call, guided: bool) -> Rows:
    """The rows of a pipeline's IP-Adapters; none without adapters.

    Raises:
      ValueError: images are missing or given twice, or their number, their masks or their scales do not fit.
    """
    nets = pipe.image_adapters.nets
    given = [name for name in ARGUMENTS if call.get(name) is not None]
    if not nets:
        if given:
            raise ValueError(f"{given[0]} needs an IP-Adapter; call load_ip_adapter first")
        return {}
    sources = [name for name in ARGUMENTS[:2] if name in given]
    if len(sources) != 1:
        raise ValueError(
            f"give either {' or '.join(ARGUMENTS[:2])}: the pipeline has {len(nets)} IP-Adapter{'s' * (len(nets) > 1)}"
            " (unload_ip_adapter removes them)"
        )
    if sources == ["ip_adapter_image"]:
        rows = rows_of_images(pipe, call, guided)
        counts = [array.shape[1] for array in rows["prompt_pixels"]]
    else:
        rows = rows_of_embeds(pipe, call, guided)
        counts = [number_of_images(prompt["images"]) for prompt in rows["image_prompts"]]
    masks = mask_rows(call, counts)
    scales = pipe.image_adapters.scales
    if call.get("ip_adapter_scale") is not None:
        scales = scale_of_each(pipe, call.get("ip_adapter_scale"))
    config = pipe.components["unet"].config
    each = [
        scale_row(scale, config, None if mask is None else count)
        for scale, mask, count in zip(scales, masks, counts, strict=True)
    ]
    return rows | {"image_scale": tuple(repeated(scale, call.images) for scale in each), "image_masks": masks}


def with_image_prompts(pipe: Any, rows: Rows, unet: Any) -> Any:
    """The UNet, with the pipeline's IP-Adapters if the rows have images for them."""
    if "image_scale" not in rows:
        return unet
    nets = tuple(Net(COMPONENT, net, i) for i, net in enumerate(pipe.image_adapters.nets))
    return ImagePrompted(unet, nets, masked=any(mask is not None for mask in rows["image_masks"]))


def image_encoders(pipe: Any, rows: Rows) -> tuple[EncodeImages, ...]:
    """The part that encodes the images of a call, if they are not given as embeddings."""
    if "prompt_pixels" not in rows:
        return ()
    states = tuple(takes_hidden_states(net) for net in pipe.image_adapters.nets)
    return (EncodeImages(Net("image_encoder", pipe.components["image_encoder"]), states),)


def takes_hidden_states(net: Any) -> bool:
    """Whether an adapter takes the hidden states of the image encoder, not its embedding."""
    return net.config.takes_states or net.config.takes_faces


# Images


def rows_of_images(pipe: Any, call: Call, guided: bool) -> Rows:
    """``prompt_pixels`` and ``prompted``."""
    if any(net.config.takes_faces for net in pipe.image_adapters.nets):
        raise ValueError("an IP-Adapter for face ID takes embeddings of faces too: give ip_adapter_image_embeds")
    arrays = adapter_pixels(pipe, call.get("ip_adapter_image"))
    found = tuple(repeated(array, call.images) for array in arrays)
    return {"prompt_pixels": found, "prompted": prompted(call.images, guided)}


def prompted(images: int, guided: bool) -> Any:
    """Which branches of guidance see the images: the last one, or the only one."""
    return Branches(np.tile([False, True], (images, 1))) if guided else np.ones(images, bool)


def adapter_pixels(pipe: Any, images: Any) -> list[np.ndarray]:
    """The images for each adapter as pixel values ``[N,h,w,3]`` of the image encoder.

    Raises:
      ValueError: there is no image encoder, its outputs do not fit an adapter, or there are not images for each.
    """
    encoder, nets = pipe.components.get("image_encoder"), pipe.image_adapters.nets
    if encoder is None or pipe.components.get("feature_extractor") is None:
        raise ValueError(
            "ip_adapter_image needs an image_encoder and a feature_extractor; load them with load_ip_adapter"
            "(image_encoder_folder=...) or replace, or give ip_adapter_image_embeds"
        )
    each = by_adapter(images, len(nets), "ip_adapter_image")
    for net in nets:
        states = takes_hidden_states(net)
        if net.config.projection == "face":
            raise ValueError("an IP-Adapter for face ID takes embeddings of faces: give ip_adapter_image_embeds")
        width = encoder.config.hidden_size if states else encoder.config.projection_dim
        if width != net.config.image_width:
            what = "hidden states" if states else "embeddings"
            raise ValueError(
                f"this IP-Adapter takes {what} of width {net.config.image_width}, and the image encoder's are {width}; "
                "it was made for another image_encoder"
            )
    return [encoder_pixels(pipe, value, "ip_adapter_image") for value in each]


def encoder_pixels(pipe: Any, images: Any, name: str, processor: str = "feature_extractor") -> np.ndarray:
    """Images as the pipeline's image encoder takes them, ``[N,h,w,3]`` float32.

    Raises:
      ValueError, TypeError: something is not an image, or the feature extractor makes another size than the encoder's.
    """
    found = pipe.components[processor](eight_bit(images, name))
    edge = pipe.components["image_encoder"].config.image_size
    if found.shape[1:3] != (edge, edge):
        raise ValueError(f"the {processor} makes {found.shape[1:3]} pixels, and the image_encoder takes {edge}")
    return found


def by_adapter(value: Any, count: int, name: str) -> list[Any]:
    """One entry for each adapter.

    Raises:
      ValueError: there is another number.
    """
    values = [*value] if isinstance(value, list | tuple) else [value]
    if len(values) != count:
        more = "; several images for one adapter are a list of their own, [[a, b]]" if name != ARGUMENTS[1] else ""
        raise ValueError(f"{name} has {len(values)} entries for {count} IP-Adapters; give one for each{more}")
    return values


# Embeddings


def rows_of_embeds(pipe: Any, call: Call, guided: bool) -> Rows:
    """``image_prompts`` from the embeddings that the caller gave."""
    given, name = call.get("ip_adapter_image_embeds"), "ip_adapter_image_embeds"
    if not isinstance(given, list | tuple):
        raise ValueError(f"{name} must be a list with an entry for each IP-Adapter, got {type(given).__name__}")
    nets = pipe.image_adapters.nets
    prompts = []
    for net, value in zip(nets, by_adapter(given, len(nets), name), strict=True):
        wanted = embed_axes(net.config)
        found = dict(value) if isinstance(value, Mapping) else {"images": value}
        if found.keys() != wanted.keys():
            shown = " and ".join(map(repr, wanted))
            raise ValueError(f"this IP-Adapter takes a dict with {shown} in {name}, got {' and '.join(found)}")
        arrays = {key: embed_row(np.asarray(x), wanted[key], call, guided) for key, x in found.items()}
        counts = {number_of_images(x) for x in arrays.values()}
        if len(counts) > 1:
            raise ValueError(f"{name} has {' and '.join(map(str, sorted(counts)))} images in one entry")
        prompts.append(arrays)
    return {"image_prompts": tuple(prompts)}


def embed_axes(config: Any) -> dict[str, tuple[int, int]]:
    """What an adapter takes -> the number of axes and the width of its embeddings."""
    if config.takes_faces:
        return {"images": (3, config.face_width), "states": (4, config.image_width)}
    return {"images": (4 if config.takes_states else 3, config.image_width)}


def embed_row(array: np.ndarray, wanted: tuple[int, int], call: Call, guided: bool) -> Any:
    """Embeddings of all images of a request, from ``[1,N,...]`` or one row per prompt; with guidance after as many of
    its first branch."""
    name, (axes, width) = "ip_adapter_image_embeds", wanted
    floating = jax.dtypes.issubdtype(array.dtype, np.floating)
    if not floating or array.ndim != axes or array.shape[-1] != width or not array.size:
        shape = f"R,N,{'T,' * (axes == 4)}{width}"
        raise ValueError(f"{name} must be floating-point [{shape}], got {array.dtype} {list(array.shape)}")
    if guided and len(array) % 2:
        raise ValueError(
            f"with guidance {name} has the embeddings of the negative branch and then those of the images, so [2,N,...]"
            f" and not {list(array.shape)}; prepare_ip_adapter_image_embeds makes them"
        )
    halves = np.split(np.asarray(array, np.float32), 2 if guided else 1)
    rows = [per_prompt(half, call.images, call.copies, name) for half in halves]
    return Branches(np.stack(rows, 1)) if guided else rows[0]


def number_of_images(row: Any) -> int:
    """The number of images in a row of embeddings."""
    return row.values.shape[2] if is_branches(row) else row.shape[1]


def prepare_embeds(pipe: Any, images: Any, guided: bool) -> list[np.ndarray]:
    """See ``DiffusionPipeline.prepare_ip_adapter_image_embeds``."""
    if not pipe.image_adapters.nets:
        raise ValueError("no IP-Adapter is loaded; call load_ip_adapter first")
    net, results = Net("image_encoder", pipe.components.get("image_encoder")), []
    arrays = adapter_pixels(pipe, images)
    for adapter, array in zip(pipe.image_adapters.nets, arrays, strict=True):
        part = EncodeImages(net, (takes_hidden_states(adapter),))
        found, without = apply(pipe, encode_pixels, part, {"prompt_pixels": array[:, None]})
        pair = [np.asarray(without), np.asarray(found)] if guided else [np.asarray(found)]
        results.append(np.stack([x[:, 0] for x in pair]))
    return results


def encode_pixels(part: EncodeImages, params: Params, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Images ``[N,1,h,w,3]`` encoded outside a run, ``[N,1,...]``, and as much of what stands for none."""
    found, without = encoded(part.net, params, rows["prompt_pixels"], part.states[0])
    return found, jax.numpy.broadcast_to(without, found.shape)


# Masks


def mask_rows(call: Call, counts: Sequence[int]) -> tuple[np.ndarray | None, ...]:
    """Masks of each adapter's images, ``[B,N,H,W]`` of 0 and 1, or None.

    Raises:
      ValueError: there is not a mask for each image.
    """
    given, name = call.get("ip_adapter_masks"), "ip_adapter_masks"
    if given is None:
        return (None,) * len(counts)
    found: list[np.ndarray | None] = []
    for value, count in zip(by_adapter(given, len(counts), name), counts, strict=True):
        if value is None:
            found.append(None)
            continue
        masks = mask_pixels(flat_masks(value, name), call.size, name)[..., 0]
        if len(masks) != count:
            raise ValueError(f"{name} has {len(masks)} masks for {count} images of an IP-Adapter; give one for each")
        found.append(repeated(masks, call.images))
    return tuple(found)


def flat_masks(value: Any, name: str) -> list[Any]:
    """The masks of one adapter; arrays may be ``[H,W]``, ``[N,H,W]`` or ``[1,N,H,W]``, as diffusers prepares them."""
    if hasattr(value, "ndim"):
        array = np.asarray(value)
        array = array[0] if array.ndim == 4 and array.shape[-1] != 1 else array
        return [*array] if array.ndim > 2 else [array]
    return image_list(value, name)


def repeated(array: np.ndarray, images: int) -> np.ndarray:
    """The same row for every image, ``[B, ...]``."""
    return np.repeat(array[None], images, axis=0)
