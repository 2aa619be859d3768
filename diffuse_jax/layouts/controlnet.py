"""Reading a ControlNet from a single file in the original layout (Zhang et al. 2023) or in that of diffusers."""

from __future__ import annotations

from pathlib import Path

from diffuse_jax.errors import bad
from diffuse_jax.layouts.configs import controlnet_config
from diffuse_jax.layouts.kinds import held
from diffuse_jax.layouts.original import controlnet_table
from diffuse_jax.layouts.rows import to_diffusers
from diffuse_jax.layouts.single_file import Part
from diffuse_jax.weights.load import Checkpoint, read_checkpoint

PREFIX = "control_model."
"""Prefix of a ControlNet's keys in files that also contain the UNet, autoencoder and text encoder."""

MARKERS = ("input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight")
"""The embedding of the control image, in the original layout and in diffusers'; no other network has these keys."""


def read_controlnet(path: Path | str) -> Part:
    """Open a file that contains a ControlNet, ignoring any other networks in it.

    Args:
      path: a ``.safetensors``, ``.ckpt`` or ``.pth`` file.

    Raises:
      WeightsError: the file is damaged or hostile, or contains no ControlNet.
    """
    path = Path(path)
    if path.is_dir():
        raise bad(path, "is a folder, but a single-file checkpoint is needed; from_pretrained opens folders")
    tensors = read_checkpoint([path]).tensors
    controlnet = {
        key.removeprefix(PREFIX): array for key, array in tensors.items() if key.startswith(PREFIX)
    } or tensors
    if not any(marker in controlnet for marker in MARKERS):
        raise bad(
            path,
            f"contains no ControlNet: it has neither {' nor '.join(map(repr, MARKERS))} (after {PREFIX!r})."
            f"{held(tensors)}",
        )
    try:
        found = to_diffusers(controlnet, controlnet_table(controlnet))
        config = controlnet_config(found)
    except (KeyError, ValueError, IndexError, StopIteration) as error:
        raise bad(
            path, f"cannot infer the ControlNet's configuration from its tensors; missing or misshapen: {error}"
        ) from error
    return Part("diffusers", "ControlNetModel", config, Checkpoint(found, dict.fromkeys(found, path)))
