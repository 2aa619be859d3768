"""Depth to image as a change to a request that starts from an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from diffuse_jax.pipelines.editing import check_channels
from diffuse_jax.pipelines.inputs import ImageInput, eight_bit, per_prompt
from diffuse_jax.pipelines.method import Net
from diffuse_jax.pipelines.parts.control import Beside
from diffuse_jax.pipelines.parts.depth import DepthMap
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.tasks import below_guidance, changed, is_latents, vae_of

ESTIMATION = ("depth_estimator", "feature_extractor")
"""The components that find the depth of an image."""


def keeping_depth(request: Request, pipe: Any, image: ImageInput, depth_map: Any) -> Request:
    """Show the depth of an image to the UNet (Rombach et al. 2022; Ranftl et al. 2021).

    Args:
      request: a request that starts from ``image``.
      pipe: the pipeline; its UNet takes the depth as a further channel.
      image: the image, or one per prompt.
      depth_map: as :func:`depth_maps` takes it, one or one per prompt; None estimates the depth of ``image``.

    Raises:
      ValueError: the UNet has other input channels, the depth map is malformed, or there is neither one nor an
        estimator and an image of pixels.
    """
    check_channels(pipe, 1, "the depth map")
    height, width, _ = request.method.latent_shape
    if depth_map is not None:
        part, row, array = DepthMap((height, width)), "depth", depth_maps(depth_map)
    else:
        if missing := [name for name in ESTIMATION if pipe.components.get(name) is None]:
            raise ValueError(f"give depth_map: {type(pipe).__name__} has no {' and no '.join(missing)} to estimate it")
        if is_latents(image, vae_of(pipe)):
            raise ValueError("give depth_map: the depth of an image that is given as latents cannot be estimated")
        part = DepthMap((height, width), Net("depth_estimator", pipe.components["depth_estimator"]))
        prepare = pipe.components["feature_extractor"]
        row, array = "depth_images", prepare(eight_bit(image, "image"))
    rows = {row: per_prompt(array, request.images, request.copies, "image" if depth_map is None else "depth_map")}
    conditions = (*request.method.conditions, part)
    denoiser = below_guidance(request.method.denoiser, lambda inner: Beside(inner, ("depth_map",)))
    return changed(request, rows, conditions=conditions, denoiser=denoiser)


def depth_maps(value: Any) -> np.ndarray:
    """Depth maps as float32 ``[N,H,W]``.

    Args:
      value: an array ``[H,W]``, ``[N,H,W]`` or ``[N,H,W,1]``, a PIL image of one channel, or a list of these.

    Raises:
      ValueError: it is something else, not finite, or the maps differ in size.
    """
    found = [one for item in (value if isinstance(value, Sequence) else [value]) for one in _each(item)]
    if not found or len({one.shape for one in found}) > 1:
        raise ValueError(f"depth_map must be maps of one size, got {sorted({one.shape for one in found})}")
    array = np.stack(found)
    if not np.isfinite(array).all():
        raise ValueError("depth_map must be finite")
    return array


def _each(value: Any) -> list[np.ndarray]:
    """The maps ``[H,W]`` of one image or array."""
    array = np.asarray(value) if isinstance(value, Image.Image | np.ndarray | jax.Array) else np.zeros(())
    array = array[..., 0] if array.ndim == 4 and array.shape[-1] == 1 else array
    number = array.dtype.kind in "uif" or jax.dtypes.issubdtype(array.dtype, np.floating)
    several = array.ndim == 3 and not isinstance(value, Image.Image)
    if not number or not (array.ndim == 2 or several) or 0 in array.shape:
        given = f"an array {array.dtype} {array.shape}" if array.ndim else type(value).__name__
        raise ValueError(f"depth_map must be an array [H,W] or [B,H,W], or a PIL image of one channel, got {given}")
    return list(np.asarray(array, np.float32).reshape(-1, *array.shape[-2:]))
