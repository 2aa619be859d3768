"""Families of checkpoints as the trainers see them; add one as a file here, and to :data:`OTHERS`."""

from __future__ import annotations

from typing import Any

from diffuse_jax.pipelines import (
    PIPELINES,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)
from diffuse_jax.pipelines.families import DEEPFLOYD_IF, WUERSTCHEN_DECODER, WUERSTCHEN_PRIOR, ClipFamily
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
from diffuse_jax.training.families.kandinsky import KANDINSKY_DECODER, KANDINSKY_PRIOR
from diffuse_jax.training.families.stable_diffusion import LatentFamily
from diffuse_jax.training.families.wuerstchen import WUERSTCHEN_TRAINED

__all__ = [
    "LatentFamily",
    "TrainedFamily",
    "Words",
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
    *((family, None) for family in (WUERSTCHEN_DECODER, KANDINSKY, STABLE_UNCLIP, LATENT_DIFFUSION)),
)
"""Families of pipelines that are not trained as Stable Diffusion is -> how they are trained; None if not at all."""

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
    return found


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
        raise ValueError(f"{source} is a {class_name}; this trainer supports {', '.join(known)}")
    return known[class_name]
