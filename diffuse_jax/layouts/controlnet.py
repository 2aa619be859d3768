"""Reading a ControlNet from one file, in the layout of the originals (Zhang et al. 2023) or in that of diffusers."""

from __future__ import annotations

from pathlib import Path

from diffuse_jax.errors import bad
from diffuse_jax.layouts.configs import controlnet_config
from diffuse_jax.layouts.original import controlnet_table
from diffuse_jax.layouts.rows import to_diffusers
from diffuse_jax.layouts.single_file import Part
from diffuse_jax.weights.load import Checkpoint, read_checkpoint

PREFIX = "control_model."
"""Before the names of a ControlNet in files that hold its UNet, autoencoder and text encoder too."""

MARKS = ("input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight")
"""What embeds the control image, in the original layout and in diffusers'; no other network has it."""


def read_controlnet(path: Path | str) -> Part:
    """Open a file that holds a ControlNet, alone or beside other networks, which are left alone.

    Raises:
      WeightsError: a damaged or hostile file, or there is no ControlNet in it.
    """
    path = Path(path)
    if path.is_dir():
        raise bad(path, "is a folder, and a checkpoint of one file is wanted; from_pretrained opens folders")
    tensors = read_checkpoint([path]).tensors
    own = {key.removeprefix(PREFIX): array for key, array in tensors.items() if key.startswith(PREFIX)} or tensors
    if not any(mark in own for mark in MARKS):
        raise bad(path, f"holds no ControlNet: there is neither {' nor '.join(map(repr, MARKS))} (after {PREFIX!r})")
    try:
        found = to_diffusers(own, controlnet_table(own))
        config = controlnet_config(found)
    except (KeyError, ValueError, IndexError, StopIteration) as error:
        raise bad(
            path, f"cannot read a ControlNet's configuration off its tensors; missing or misshapen: {error}"
        ) from error
    return Part("diffusers", "ControlNetModel", config, Checkpoint(found, dict.fromkeys(found, path)))
