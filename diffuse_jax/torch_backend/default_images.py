"""Default images for comparisons of pipelines that take images: smooth and deterministic."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from diffuse_jax.pipelines import DiffusionPipeline


def default_images(pipe: DiffusionPipeline) -> dict[str, Any]:
    """``image``, ``mask_image`` and ``control_image`` in the checkpoint's default size, with one control image per
    ControlNet; empty for a pipeline without an autoencoder."""
    if pipe.components.get("vae") is None:
        return {}
    size = pipe.components["unet"].config.sample_size
    height, width = (
        edge * pipe.components["vae"].config.scale for edge in ((size, size) if isinstance(size, int) else size)
    )
    nets = pipe.components.get("controlnet")
    count = len(nets) if isinstance(nets, tuple) else 1
    control = [waves(height, width, k + 1) for k in range(count)]
    control_image = control if isinstance(nets, tuple) else control[0]
    takes = inspect.signature(pipe.compose).parameters
    first = nets is not None and "control_image" not in takes  # there, "image" is the control image
    return {
        "image": control_image if first else waves(height, width, 0),
        "mask_image": disc(height, width),
        "control_image": control_image,
    }


def waves(height: int, width: int, kind: int) -> np.ndarray:
    """An image of coloured waves, float32 ``[height,width,3]`` in [0, 1]."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j][..., None]
    colours = np.arange(1, 4)
    return (0.5 + 0.5 * np.sin(5 * (x * colours + y * (kind + 1)) + kind)).astype(np.float32)


def disc(height: int, width: int) -> np.ndarray:
    """A mask that is 1 inside a disc in the middle, float32 ``[height,width]``."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return (x**2 + y**2 < 0.4).astype(np.float32)
