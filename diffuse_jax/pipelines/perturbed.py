"""Pipelines with perturbed-attention guidance (Ahn et al. 2024, arXiv 2403.17377): each task with ``pag_scale``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypedDict, Unpack, get_args, get_type_hints

from diffuse_jax.pipelines.modifiers.perturbation import PerturbedAttention
from diffuse_jax.pipelines.options import split_options
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion import StableDiffusionPipeline
from diffuse_jax.pipelines.stable_diffusion_controlnet import StableDiffusionControlNetPipeline
from diffuse_jax.pipelines.stable_diffusion_controlnet_inpaint import StableDiffusionControlNetInpaintPipeline
from diffuse_jax.pipelines.stable_diffusion_img2img import StableDiffusionImg2ImgPipeline
from diffuse_jax.pipelines.stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffuse_jax.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline
from diffuse_jax.pipelines.stable_diffusion_xl_controlnet import StableDiffusionXLControlNetPipeline
from diffuse_jax.pipelines.stable_diffusion_xl_controlnet_img2img import StableDiffusionXLControlNetImg2ImgPipeline
from diffuse_jax.pipelines.stable_diffusion_xl_img2img import StableDiffusionXLImg2ImgPipeline
from diffuse_jax.pipelines.stable_diffusion_xl_inpaint import StableDiffusionXLInpaintPipeline

LAYERS = "pag_applied_layers"


class PerturbedOptions(TypedDict, total=False):
    """Arguments of every call with perturbed-attention guidance.

    Attributes:
      pag_scale: strength, 3 by default, one value or one per image.
      pag_adaptive_scale: how much of it each timestep below 1000 takes away; 0 by default.
    """

    pag_scale: float | Sequence[float]
    pag_adaptive_scale: float | Sequence[float]


class Perturbed:
    """Base of the classes below: their task with ``pag_scale`` and ``pag_adaptive_scale``. The layers are those of the
    setting ``pag_applied_layers`` ("mid" if there is none), which ``from_pretrained``, ``from_pipe`` and ``replace``
    take; see :class:`~diffuse_jax.pipelines.modifiers.PerturbedAttention`."""

    own_defaults: ClassVar[Mapping[str, Any]] = {}
    """Arguments whose default is not that of the task."""

    def __init_subclass__(cls, **options: Any) -> None:
        if Perturbed in cls.__bases__:
            task: Any = super()
            cls.compose = with_perturbed_attention(task.compose, cls.own_defaults)  # type: ignore[attr-defined]
            cls.settings = {**task.settings, LAYERS: "honoured"}  # type: ignore[attr-defined]
        super().__init_subclass__(**options)


def with_perturbed_attention(compose: Callable[..., Request], defaults: Mapping[str, Any]) -> Callable[..., Request]:
    """A pipeline's ``compose`` that also takes :class:`PerturbedOptions`, and has other defaults."""

    @functools.wraps(compose)
    def guided(self: Any, *args: Any, **options: Any) -> Request:
        own, others = split_options(options, PerturbedOptions)
        request = compose(self, *args, **{**defaults, **others})
        scale, adaptive = own.get("pag_scale", 3.0), own.get("pag_adaptive_scale", 0.0)
        return PerturbedAttention(scale, self.options.get(LAYERS, "mid"), adaptive)(request, self)

    (known,) = get_args(get_type_hints(compose)["options"])
    every: Any = TypedDict("every", known.__annotations__ | PerturbedOptions.__annotations__)  # type: ignore[misc]
    guided.__annotations__ = {**compose.__annotations__, "options": Unpack[every]}
    own = "**options: see :class:`~diffuse_jax.pipelines.perturbed.PerturbedOptions`,"
    guided.__doc__ = (compose.__doc__ or "").replace("**options: see", own, 1)
    return guided


class StableDiffusionPAGPipeline(Perturbed, StableDiffusionPipeline):
    """Text to image."""


class StableDiffusionPAGImg2ImgPipeline(Perturbed, StableDiffusionImg2ImgPipeline):
    """Image to image."""


class StableDiffusionPAGInpaintPipeline(Perturbed, StableDiffusionInpaintPipeline):
    """Inpainting."""

    own_defaults: ClassVar[Mapping[str, Any]] = {"strength": 0.9999}
    sampler_settings: ClassVar[Mapping[str, Any]] = StableDiffusionPipeline.sampler_settings


class StableDiffusionControlNetPAGPipeline(Perturbed, StableDiffusionControlNetPipeline):
    """Text to image with ControlNets."""


class StableDiffusionControlNetPAGInpaintPipeline(Perturbed, StableDiffusionControlNetInpaintPipeline):
    """Inpainting with ControlNets."""


class StableDiffusionXLPAGPipeline(Perturbed, StableDiffusionXLPipeline):
    """SDXL: text to image."""


class StableDiffusionXLPAGImg2ImgPipeline(Perturbed, StableDiffusionXLImg2ImgPipeline):
    """SDXL: image to image."""


class StableDiffusionXLPAGInpaintPipeline(Perturbed, StableDiffusionXLInpaintPipeline):
    """SDXL: inpainting."""


class StableDiffusionXLControlNetPAGPipeline(Perturbed, StableDiffusionXLControlNetPipeline):
    """SDXL: text to image with ControlNets."""


class StableDiffusionXLControlNetPAGImg2ImgPipeline(Perturbed, StableDiffusionXLControlNetImg2ImgPipeline):
    """SDXL: image to image with ControlNets."""
