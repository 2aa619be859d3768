"""Stable Diffusion Image Variations: the embedding of an image in the place of a prompt's (Justin Pinkney, 2022)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from diffuse_jax.pipelines.families.clip import ClipFamily
from diffuse_jax.pipelines.family import Call
from diffuse_jax.pipelines.image_prompts import encoder_pixels, prompted
from diffuse_jax.pipelines.method import Net, Params, Part, Rows
from diffuse_jax.pipelines.options import ImageVariationOptions
from diffuse_jax.pipelines.parts.ip_adapter import encoded, for_branches
from diffuse_jax.pipelines.parts.text import EncodeText


@dataclasses.dataclass(frozen=True)
class EncodeVariation(Part):
    """The image's embedding as the only hidden state of the UNet, zeros in the branches without it.

    Reads ``image_pixels [B,1,h,w,3]`` and ``prompted``, bool ``[B]`` or :class:`Branches` of it; adds ``states``.
    """

    net: Net

    @property
    def reads(self) -> tuple[str, ...]:
        return "image_pixels", "prompted"

    @property
    def adds(self) -> tuple[str, ...]:
        return ("states",)

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        found, without = encoded(self.net, params, rows["image_pixels"], states=False)
        return rows | {"states": for_branches(found, without, rows["prompted"])}


class ImageVariationFamily(ClipFamily):
    """A family whose prompts are images."""

    def text_rows(self, pipe: Any, call: Call, branches: tuple[str, ...], checked: tuple[str, ...] = ()) -> Rows:
        """The image of each row, in the place of its prompt.

        Raises:
          ValueError: the image encoder is for another UNet, or something is not an image.
        """
        encoder, unet = pipe.components["image_encoder"].config, pipe.components["unet"].config
        if encoder.projection_dim != unet.cross_attention_dim:
            raise ValueError(
                f"the image_encoder has embeddings of width {encoder.projection_dim}, and the UNet attends to "
                f"{unet.cross_attention_dim}; it was made for another UNet"
            )
        array = encoder_pixels(pipe, call.get("image"), "image")[:, None]
        return {"image_pixels": array, "prompted": prompted(call.prompts, len(branches) > 1)}

    def conditions(self, pipe: Any, call: Call, rows: Rows) -> tuple[Part, ...]:
        return (EncodeVariation(Net("image_encoder", pipe.components["image_encoder"])),)


IMAGE_VARIATION = ImageVariationFamily(encoders={}, encode=EncodeText, embeds={}, options=ImageVariationOptions)
