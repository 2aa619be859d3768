"""Würstchen: one CLIP text encoder for each stage, whose padding is masked (Pernias et al. 2023, arXiv 2306.00637)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffuse_jax.messages import brief
from diffuse_jax.pipelines.families.clip import ClipFamily, stack_branches
from diffuse_jax.pipelines.families.stable_diffusion import LastStates
from diffuse_jax.pipelines.family import Call, asks_for_guidance, check_output
from diffuse_jax.pipelines.inputs import joined_array
from diffuse_jax.pipelines.method import Method, Net, Part, Rows
from diffuse_jax.pipelines.options import WuerstchenDecoderOptions, WuerstchenOptions
from diffuse_jax.pipelines.parts.decode import Raw
from diffuse_jax.pipelines.parts.guidance import ClassifierFree, is_branches
from diffuse_jax.pipelines.parts.start import FromNoise
from diffuse_jax.pipelines.parts.wuerstchen import SemanticDecoder, SemanticMaps, SemanticPrior, UnitImages
from diffuse_jax.pipelines.prompts import Layout
from diffuse_jax.pipelines.running import Request

SETTINGS = {"latent_mean": 42.0, "latent_std": 1.0, "resolution_multiple": 42.67, "latent_dim_scale": 10.67}
"""Settings of ``model_index.json`` -> their defaults."""


def setting(pipe: Any, name: str) -> float:
    """One of :data:`SETTINGS`, from ``model_index.json``.

    Raises:
      ValueError: it is not a positive number.
    """
    value = pipe.options.get(name, SETTINGS[name])
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} (in model_index.json) must be a positive number, got {brief(value)}")
    return float(value)


@dataclasses.dataclass(frozen=True)
class WuerstchenFamily(ClipFamily):
    """What both stages share."""

    def uses_guidance(self, pipe: Any, call: Call) -> bool:
        """Whether a guidance scale is above 1."""
        return asks_for_guidance(call)

    def layouts(self, pipe: Any) -> dict[str, Layout]:
        """As of other families, with the padding hidden from the encoder."""
        return {name: dataclasses.replace(found, hide_padding=True) for name, found in super().layouts(pipe).items()}

    def guided(self, pipe: Any, call: Call, network: Part) -> Part:
        """The denoiser of a network."""
        return ClassifierFree(network) if self.uses_guidance(pipe, call) else network


class PriorFamily(WuerstchenFamily):
    """The first stage: semantic maps from prompts."""

    def embeds_width(self, pipe: Any) -> int:
        return pipe.components["prior"].config.c_cond

    def method(self, pipe: Any, call: Call, rows: Rows) -> Method:
        """The text encoder, the prior, guidance if the scale is above 1, and the maps' mean and deviation.

        Raises:
          ValueError: ``output_type`` is unknown.
        """
        check_output(call.get("output_type", "pil"))
        net, multiple = Net("prior", pipe.components["prior"]), setting(pipe, "resolution_multiple")
        height, width = (math.ceil(side / multiple) for side in call.size)
        return Method(
            conditions=self.conditions(pipe, call, rows),
            denoiser=self.guided(pipe, call, SemanticPrior(net)),
            start=FromNoise(),
            decode=SemanticMaps(setting(pipe, "latent_mean"), setting(pipe, "latent_std")),
            latent_shape=(height, width, net.config.c_in),
        )


class DecoderFamily(WuerstchenFamily):
    """The second stage: images from semantic maps and prompts; the call's size is that of the images."""

    def embeds_width(self, pipe: Any) -> int:
        return pipe.components["decoder"].config.clip_embd

    def method(self, pipe: Any, call: Call, rows: Rows) -> Method:
        """The text encoder, the decoder, guidance if the scale is above 1, and the autoencoder.

        Raises:
          ValueError: ``output_type`` is unknown.
        """
        net, vqgan = Net("decoder", pipe.components["decoder"]), Net("vqgan", pipe.components["vqgan"])
        output, scale = check_output(call.get("output_type", "pil")), vqgan.config.scale
        return Method(
            conditions=self.conditions(pipe, call, rows),
            denoiser=self.guided(pipe, call, SemanticDecoder(net)),
            start=FromNoise(),
            decode=Raw() if output == "latent" else UnitImages(vqgan, output == "pil"),
            latent_shape=(call.size[0] // scale, call.size[1] // scale, net.config.c_in),
        )


def map_rows(pipe: Any, call: Call, branches: tuple[str, ...]) -> Rows:
    """``effnet``: the maps, and zeros in the branch without them.

    Raises:
      ValueError: the number of prompt embeddings is not that of the maps.
    """
    maps = call.get("image_embeddings")
    if len(maps) != call.prompts:
        raise ValueError(
            f"prompt_embeds has {call.prompts} entries for {len(maps)} image_embeddings; give one for each"
        )
    return {"effnet": stack_branches([np.zeros_like(maps), maps][-len(branches) :])}


def with_maps(request: Request, maps: np.ndarray) -> Request:
    """A request of the second stage with other maps ``[B,k,l,c]``."""
    guided = is_branches(request.rows["effnet"])
    effnet = stack_branches([np.zeros_like(maps), maps] if guided else [maps])
    return request._replace(rows={**request.rows, "effnet": effnet})


def checked_maps(pipe: Any, maps: Any) -> np.ndarray:
    """Semantic maps ``[B,k,l,c]`` float32 on the host.

    Raises:
      ValueError, TypeError: they are missing, have another shape or no finite numbers.
    """
    channels = pipe.components["decoder"].config.effnet_embd
    if maps is None:
        raise ValueError("give image_embeddings, as WuerstchenPriorPipeline returns them")
    maps = joined_array(maps, "image_embeddings")
    if maps.ndim != 4 or maps.shape[-1] != channels or not jnp.issubdtype(maps.dtype, jnp.floating) or not maps.size:
        raise ValueError(
            f"image_embeddings must be floating-point [B,k,l,{channels}] (channel-last), got {maps.dtype} {maps.shape}"
        )
    return maps.astype(np.float32)


def size_of_images(pipe: Any, maps: np.ndarray) -> tuple[int, int]:
    """Height and width of the images of semantic maps.

    Raises:
      ValueError: the decoder cannot halve latents of that size as often as it does.
    """
    config, scale = pipe.components["decoder"].config, pipe.components["vqgan"].config.scale
    factor, multiple = setting(pipe, "latent_dim_scale"), config.patch_size * 2 ** (len(config.c_hidden) - 1)
    height, width = (int(side * factor) for side in maps.shape[1:3])
    if height % multiple or width % multiple or not height or not width:
        raise ValueError(
            f"image_embeddings of {maps.shape[1]}x{maps.shape[2]} give latents of {height}x{width}, and the decoder "
            f"takes multiples of {multiple}; make them with a height and a width that are multiples of "
            f"{multiple * scale}"
        )
    return height * scale, width * scale


SHARED: dict[str, Any] = {
    "encoders": {"text_encoder": "tokenizer"},
    "encode": LastStates,
    "embeds": {"states": "prompt_embeds"},
    "masked": True,
}
WUERSTCHEN_PRIOR = PriorFamily(**SHARED, options=WuerstchenOptions)
WUERSTCHEN_DECODER = DecoderFamily(**SHARED, conditioning=map_rows, options=WuerstchenDecoderOptions)
