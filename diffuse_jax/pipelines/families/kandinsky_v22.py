"""The decoders of Kandinsky 2.2: from embeddings of images to images, without a text encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffuse_jax.pipelines.families.clip import NEGATIVE, POSITIVE, guidance_rows, repeat_rows, stack_branches
from diffuse_jax.pipelines.family import Call, asks_for_guidance, check_output
from diffuse_jax.pipelines.inputs import embeddings
from diffuse_jax.pipelines.method import Method, Net, Part, Rows
from diffuse_jax.pipelines.options import EmbeddingOptions
from diffuse_jax.pipelines.parts.decode import Raw, ToImages, autoencoder
from diffuse_jax.pipelines.parts.guidance import ClassifierFree
from diffuse_jax.pipelines.parts.movq import EmbeddingUNet, Unquantised
from diffuse_jax.pipelines.parts.start import FromNoise


@dataclasses.dataclass(frozen=True)
class KandinskyV22Family:
    """A family whose UNet takes an image embedding in the place of a prompt."""

    options: type = EmbeddingOptions
    plan_options: tuple[str, ...] = ()

    def rows(self, pipe: Any, call: Call) -> Rows:
        """``image_embeds`` of all branches, and guidance, one row per image.

        Raises:
          ValueError: embeddings are missing, or their shapes are wrong.
        """
        guided = asks_for_guidance(call)
        rows = embedding_rows(pipe, call, (NEGATIVE, POSITIVE) if guided else (POSITIVE,))
        return {name: repeat_rows(value, call.copies) for name, value in rows.items()} | guidance_rows(call, guided)

    def method(self, pipe: Any, call: Call, rows: Rows) -> Method:
        """The UNet, guidance if the scale is above 1, and the decoder.

        Raises:
          ValueError: ``output_type`` is unknown.
        """
        return decoder_method(pipe, call, EmbeddingUNet(Net("unet", pipe.components["unet"])))


def decoder_method(pipe: Any, call: Call, unet: Part, conditions: tuple[Part, ...] = ()) -> Method:
    """The method of a decoder with a UNet, and guidance if the scale is above 1.

    Args:
      pipe: the pipeline.
      call: the call.
      unet: the UNet as a denoiser.
      conditions: the parts that encode what it is conditioned on besides image embeddings.

    Raises:
      ValueError: ``output_type`` is unknown.
    """
    movq, output = movq_of(pipe), check_output(call.get("output_type", "pil"))
    height, width = (side // movq.config.scale for side in call.size)
    return Method(
        conditions=conditions,
        denoiser=ClassifierFree(unet) if asks_for_guidance(call) else unet,
        start=FromNoise(),
        decode=Raw() if output == "latent" else ToImages(movq, output == "pil", pipe.vae_tiling, pipe.vae_slicing),
        latent_shape=(height, width, movq.config.latent_channels),
    )


def embedding_rows(pipe: Any, call: Call, branches: tuple[str, ...]) -> Rows:
    """``image_embeds`` of the branches of guidance, one row per embedding.

    Raises:
      ValueError: embeddings are missing, or their shapes are wrong.
    """
    embeds = [given_embeds(pipe, call.options, f"{branch}image_embeds") for branch in branches]
    if len({len(each) for each in embeds}) > 1:
        raise ValueError(f"there are {len(embeds[1])} image_embeds, but {len(embeds[0])} negative_image_embeds")
    return {"image_embeds": stack_branches(embeds)}


def movq_of(pipe: Any) -> Unquantised:
    """The pipeline's autoencoder."""
    return Unquantised("movq", autoencoder(pipe.components["movq"]))


def given_embeds(pipe: Any, options: Mapping[str, Any], name: str) -> np.ndarray:
    """The embeddings that a call has for an argument, ``[N,E]`` float32; lists of ``[n,E]`` are joined.

    Raises:
      ValueError: there are none, or they are not floating-point of the width that the UNet takes.
      TypeError: they are no arrays of numbers.
    """
    given, width = options.get(name), pipe.components["unet"].config.image_width
    if given is None:
        raise ValueError(f"give {name} [N,{width}], as the prior returns them")
    return embeddings(given, width, name)


KANDINSKY_V22 = KandinskyV22Family()
