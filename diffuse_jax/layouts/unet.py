"""A UNet of unknown family, by its tensors in the original layout or in that of diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffuse_jax.layouts.configs import Tensors, linear_projection, unet_config
from diffuse_jax.layouts.families import FAMILIES, V1, V2, V2_EPSILON, XL, Family
from diffuse_jax.layouts.original import unet_table
from diffuse_jax.layouts.rows import to_diffusers

MARKERS = ("conv_in.weight", "up_blocks.0.resnets.0.conv1.weight", "conv_out.weight")
"""Keys that every UNet has in diffusers' layout, and no ControlNet or autoencoder has all of them at its top level."""


def identified(tensors: Tensors) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A UNet's tensors under diffusers' names, from those in either layout, and its ``config.json``.

    Raises:
      KeyError, ValueError, IndexError, StopIteration: they are not those of a UNet.
    """
    found = to_diffusers(tensors, unet_table(tensors))
    if missing := [key for key in MARKERS if key not in found]:
        raise KeyError(missing[0])
    return found, unet_config(found, family_of(found))


def family_of(unet: Tensors) -> Family:
    """The family of a UNet, from its tensors under diffusers' names; it has the number of heads and the size.

    Raises:
      ValueError: it is a UNet that was published in diffusers folders alone.
    """
    if any(".add_k_proj." in key for key in unet):
        raise ValueError("config.json, which UNets of DeepFloyd IF and Kandinsky 2 need; open their folder")
    if "add_embedding.linear_1.weight" in unet:
        return XL
    if "class_embedding.weight" in unet:
        return FAMILIES["x4-upscaler"]
    if not linear_projection(unet):
        return V1
    return V2 if unet["conv_in.weight"].shape[1] == 4 else V2_EPSILON  # depth and inpainting
