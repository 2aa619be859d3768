"""unCLIP (Karlo): a decoder over pixels of an image embedding and a prompt, and its super-resolution."""

from __future__ import annotations

import dataclasses
from typing import Any

from diffuse_jax.pipelines.families.prior import PriorFamily, PriorStage
from diffuse_jax.pipelines.family import Call, asks_for_guidance, check_output
from diffuse_jax.pipelines.method import Method, Net, Rows
from diffuse_jax.pipelines.options import UnCLIPOptions
from diffuse_jax.pipelines.parts.control import Beside
from diffuse_jax.pipelines.parts.decode import Raw, ToPixels
from diffuse_jax.pipelines.parts.guidance import ClassifierFree
from diffuse_jax.pipelines.parts.network import PixelUNet, UNet
from diffuse_jax.pipelines.parts.start import FromNoise
from diffuse_jax.pipelines.parts.unclip import DecoderContext, Enlarged, ToSmallImage, WithLast


def edges(config: Any) -> tuple[int, int]:
    """(height, width) of a network's samples."""
    size = config.sample_size
    return (size, size) if isinstance(size, int) else size


class UnCLIPDecoder(PriorFamily):
    """The stage that makes a small image; its rows are those of a prior's prompts, and a task adds ``image_embeds``."""

    @property
    def widths(self) -> dict[str, str]:
        return {"text_proj": "clip_embeddings_dim", **super().widths}

    def method(self, pipe: Any, call: Call, rows: Rows) -> Method:
        """Text encoder, the projection of embeddings, the UNet, and guidance if the scale is above 1."""
        net = lambda name: Net(name, pipe.components[name])
        decoder = net("decoder")
        unet = UNet(decoder)
        return Method(
            conditions=(self.text_part(pipe, rows), DecoderContext(net("text_proj"), self.encoder)),
            denoiser=ClassifierFree(unet) if asks_for_guidance(call) else unet,
            start=FromNoise(),
            decode=ToSmallImage(),
            latent_shape=(*edges(decoder.config), decoder.config.in_channels),
        )


@dataclasses.dataclass(frozen=True)
class UnCLIPSuperResolution:
    """The stage that enlarges an image; another network takes the last step."""

    options: type = UnCLIPOptions
    plan_options: tuple[str, ...] = ()

    def rows(self, pipe: Any, call: Call) -> Rows:
        """None: ``small_image`` is added when it has been made."""
        return {}

    def method(self, pipe: Any, call: Call, rows: Rows) -> Method:
        """The two networks, which see the enlarged image beside the sample.

        Raises:
          ValueError: ``output_type`` is unknown.
        """
        first, last = (PixelUNet(Net(name, pipe.components[name])) for name in ("super_res_first", "super_res_last"))
        config, output = first.net.config, check_output(call.get("output_type", "pil"))
        return Method(
            conditions=(Enlarged(edges(config)),),
            denoiser=Beside(WithLast(first, last), ("enlarged_image",)),
            start=FromNoise(),
            decode=Raw() if output == "latent" else ToPixels(output == "pil"),
            latent_shape=(*edges(config), config.in_channels // 2),
        )


UNCLIP_PRIOR = PriorStage()
UNCLIP_DECODER = UnCLIPDecoder()
UNCLIP_SUPER_RESOLUTION = UnCLIPSuperResolution()
