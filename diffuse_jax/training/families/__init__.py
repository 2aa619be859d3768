"""Families of checkpoints as the trainers see them; add one as a file here, and to :data:`OTHERS`."""

from __future__ import annotations

import re
from typing import Any

from diffuse_jax.pipelines import (
    PIPELINES,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)
from diffuse_jax.pipelines.families import (
    DEEPFLOYD_IF,
    LATENT_UPSCALER,
    WUERSTCHEN_DECODER,
    WUERSTCHEN_PRIOR,
    ClipFamily,
)
from diffuse_jax.pipelines.families.kandinsky import KANDINSKY
from diffuse_jax.pipelines.families.kandinsky_v22 import KANDINSKY_V22
from diffuse_jax.pipelines.families.latent_diffusion import LATENT_DIFFUSION
from diffuse_jax.pipelines.families.prior import KANDINSKY21_PRIOR, PRIOR
from diffuse_jax.pipelines.families.stable_unclip import STABLE_UNCLIP
from diffuse_jax.training.families.base import (
    TrainedFamily,
    Words,
    mask_name,
    normalised,
    refuse_settings,
    tokens_of,
)
from diffuse_jax.training.families.deepfloyd_if import DEEPFLOYD_IF_TRAINED
from diffuse_jax.training.families.editing import EditingFamily
from diffuse_jax.training.families.inpainting import InpaintingFamily
from diffuse_jax.training.families.kandinsky import KANDINSKY_DECODER, KANDINSKY_PRIOR
from diffuse_jax.training.families.stable_diffusion import LatentFamily
from diffuse_jax.training.families.wuerstchen import WUERSTCHEN_TRAINED

__all__ = [
    "LatentFamily",
    "TrainedFamily",
    "Words",
    "check_method",
    "family_of",
    "mask_name",
    "normalised",
    "refuse_settings",
    "tokens_of",
    "trained_family",
]

OTHERS: tuple[tuple[Any, TrainedFamily | None], ...] = (
    (DEEPFLOYD_IF, DEEPFLOYD_IF_TRAINED),
    (KANDINSKY_V22, KANDINSKY_DECODER),
    (PRIOR, KANDINSKY_PRIOR),
    (KANDINSKY21_PRIOR, KANDINSKY_PRIOR),
    (WUERSTCHEN_PRIOR, WUERSTCHEN_TRAINED),
    *((f, None) for f in (WUERSTCHEN_DECODER, KANDINSKY, STABLE_UNCLIP, LATENT_DIFFUSION, LATENT_UPSCALER)),
)
"""Families of pipelines that are not trained as Stable Diffusion is -> how they are trained; None if not at all."""

ADVICE: tuple[tuple[str, str], ...] = (
    (r"Kandinsky(V22)?.*Combined", "it joins two models; train its prior and its decoder, each from its own folder"),
    (r"Kandinsky(?!V22|Prior)", "the decoder of Kandinsky 2.1 is not trained, only its prior; Kandinsky 2.2's is"),
    (r"Wuerstchen(?!Prior)", "of Würstchen, only the prior is trained, from its own folder"),
    (r"StableUnCLIP", "its UNet reads noised embeddings of images; train the Stable Diffusion 2.1 it was made from"),
    (r"UnCLIP", "the stages of unCLIP are not trained; Kandinsky 2.2, which has a prior and a decoder too, is"),
    (r"StableDiffusionImageVariation", "its UNet reads embeddings of images, not prompts; train a Stable Diffusion"),
    (r".*(LatentUpscale|LDMSuperResolution)", "to enlarge images, train the second stage of DeepFloyd IF"),
    (r"LDMTextToImage", "train its successor, Stable Diffusion"),
    (r"(DDPM|DDIM|PNDM|ConsistencyModel|KarrasEDM|KarrasVe|ScoreSdeVe|RePaint|LDM)Pipeline",
     "it has no prompts; train/unconditional.py trains such networks on pixels"),
)  # fmt: skip
"""Beginnings of the names of pipelines that no trainer of text-to-image models is for -> what to do instead."""

EDITING = (StableDiffusionInstructPix2PixPipeline, StableDiffusionXLInstructPix2PixPipeline)
"""Pipelines of Stable Diffusion's families whose UNet reads images before an edit."""


def trained(family: Any) -> TrainedFamily | None:
    """How checkpoints of a family of pipelines are trained; None if they cannot be."""
    for known, found in OTHERS:
        if known is family:
            return found
    if isinstance(family, ClipFamily) and family.encoders:
        return LatentFamily(text=family, encoders=family.encoders)
    return None


def trained_family(pipe: Any) -> TrainedFamily:
    """How a pipeline is trained.

    Raises:
      TypeError: there is no trainer for it.
    """
    found = trained(getattr(pipe, "family", None))
    if found is None:
        raise TypeError(f"there is no trainer for a {type(pipe).__name__}")
    if isinstance(found, LatentFamily) and isinstance(pipe, EDITING):
        return EditingFamily(text=found.text, encoders=found.encoders)
    if isinstance(found, LatentFamily) and inpaints(pipe):
        return InpaintingFamily(text=found.text, encoders=found.encoders)
    return found


def inpaints(pipe: Any) -> bool:
    """Whether the UNet of a Stable Diffusion also reads a mask and the latents of the image around it."""
    unet, vae = (pipe.components.get(name) for name in ("unet", "vae"))
    return unet is not None and vae is not None and unet.config.in_channels == 2 * vae.config.latent_channels + 1


def family_of(class_name: str, source: Any, method: str | None = None) -> TrainedFamily:
    """How a pipeline class is trained.

    Args:
      class_name: the class that a checkpoint names.
      source: the checkpoint, for the message.
      method: one of :data:`~diffuse_jax.training.families.base.METHODS` that is to support it.

    Raises:
      ValueError: the trainer does not support the class.
    """
    found = {kind.__name__: trained(getattr(kind, "family", None)) for kind in PIPELINES.classes()}
    known = {name: family for name, family in found.items() if family and (method is None or method in family.methods)}
    if class_name not in known:
        advice = next((f"; {text}" for name, text in ADVICE if re.match(name, class_name)), "")
        raise ValueError(f"{source} is a {class_name}{advice}; this trainer supports {', '.join(known)}")
    return known[class_name]


def check_method(pipe: Any, source: Any, method: str) -> None:
    """Check that a trainer supports a pipeline, beyond what :func:`family_of` can tell from its class.

    Raises:
      ValueError: it does not.
    """
    if method not in (methods := trained_family(pipe).methods):
        raise ValueError(
            f"{source} has a UNet for inpainting, which is trained by {' and '.join(methods)} alone; give a checkpoint "
            "for text to image"
        )
