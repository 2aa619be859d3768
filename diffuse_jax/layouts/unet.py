"""Reading a UNet from a single file: alone or in a whole checkpoint, in the original layout or in that of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from diffuse_jax.errors import bad
from diffuse_jax.layouts.configs import Tensors, unet_config
from diffuse_jax.layouts.families import FAMILIES, UNET, V1, V2, XL, Family
from diffuse_jax.layouts.kinds import held
from diffuse_jax.layouts.original import unet_table
from diffuse_jax.layouts.rows import to_diffusers
from diffuse_jax.layouts.single_file import Part
from diffuse_jax.weights.load import Checkpoint, read_checkpoint

MARKERS = ("conv_in.weight", "up_blocks.0.resnets.0.conv1.weight", "conv_out.weight")
"""Keys that every UNet has in diffusers' layout, and no ControlNet or autoencoder has all of them at its top level."""


def read_unet(path: Path | str) -> Part:
    """Open a file that contains a UNet, ignoring any other networks in it.

    Args:
      path: a ``.safetensors``, ``.bin``, ``.ckpt``, ``.pt`` or ``.pth`` file.

    Raises:
      WeightsError: the file is damaged or hostile, or contains no UNet.
    """
    path = Path(path)
    if path.is_dir():
        raise bad(path, "is a folder, but a single file is needed; from_pretrained opens folders")
    tensors = read_checkpoint([path]).tensors
    unet = {key.removeprefix(UNET): array for key, array in tensors.items() if key.startswith(UNET)} or tensors
    try:
        found, config = identified(unet)
    except (KeyError, ValueError, IndexError, StopIteration) as error:
        raise bad(
            path,
            f"contains no UNet whose configuration can be inferred, alone or after {UNET!r}; "
            f"missing or misshapen: {error}.{held(tensors, 'a whole UNet')}",
        ) from error
    return Part("diffusers", "UNet2DConditionModel", config, Checkpoint(found, dict.fromkeys(found, path)))


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
    """The family of a UNet, from its tensors under diffusers' names; it has the number of heads and the size."""
    if "add_embedding.linear_1.weight" in unet:
        return XL
    if "class_embedding.weight" in unet:
        return FAMILIES["x4-upscaler"]
    return V2 if np.ndim(unet["mid_block.attentions.0.proj_in.weight"]) == 2 else V1
