"""Unconditional generation with networks of the variance-exploding SDE (Song et al. 2021, arXiv 2011.13456)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, TypeVar, Unpack

from diffuse_jax.pipelines.method import Net
from diffuse_jax.pipelines.options import CallOptions
from diffuse_jax.pipelines.parts.decode import UnitPixels
from diffuse_jax.pipelines.parts.network import HalvedUNet
from diffuse_jax.pipelines.parts.step import Langevin
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.unconditional import DDPMPipeline, unconditional
from diffuse_jax.schedulers import KarrasVeScheduler, Scheduler, ScoreSdeVeScheduler


class ScoreSdeVePipeline(DDPMPipeline):
    """Unconditional images of a network that predicts the score, by predictor and corrector, in 2000 steps.

    The network's images are in [0, 1].
    """

    default_steps: ClassVar[int] = 2000

    def compose(  # type: ignore[override]  # without the option of DDIM
        self,
        batch_size: int = 1,
        *,
        class_labels: int | Sequence[int] | None = None,
        **options: Unpack[CallOptions],
    ) -> Request:
        """Generate ``batch_size`` images; arguments as for :class:`DDPMPipeline`. ``output_type="latent"`` gives pixels
        in [0, 1], not clipped.

        Raises:
          ValueError: an argument is invalid, or the sampler is not a ``ScoreSdeVeScheduler``.
        """
        scheduler = sampler_of(self, ScoreSdeVeScheduler)
        request = unconditional(self, batch_size, class_labels, options)
        method = dataclasses.replace(request.method, advance=Langevin(scheduler))
        if request.output_type != "latent":
            method = dataclasses.replace(method, decode=UnitPixels(request.output_type == "pil"))
        return request._replace(method=method)


class KarrasVePipeline(DDPMPipeline):
    """Unconditional images by the stochastic sampler of Karras et al. 2022 (arXiv 2206.00364, alg. 2), in 50 steps.

    The network is one of the variance-exploding SDE, for images in [0, 1].
    """

    default_steps: ClassVar[int] = 50

    def compose(  # type: ignore[override]  # without the option of DDIM
        self,
        batch_size: int = 1,
        *,
        class_labels: int | Sequence[int] | None = None,
        **options: Unpack[CallOptions],
    ) -> Request:
        """Generate ``batch_size`` images; arguments as for :class:`DDPMPipeline`.

        Raises:
          ValueError: an argument is invalid, or the sampler is not a ``KarrasVeScheduler``.
        """
        sampler_of(self, KarrasVeScheduler)
        request = unconditional(self, batch_size, class_labels, options)
        denoiser = HalvedUNet(Net("unet", self.components["unet"]))
        return request._replace(method=dataclasses.replace(request.method, denoiser=denoiser))


Sampler = TypeVar("Sampler", bound=Scheduler)


def sampler_of(pipe: DDPMPipeline, wanted: type[Sampler]) -> Sampler:
    """The pipeline's sampler, or ``ValueError`` if it is not of the class that its networks were trained for."""
    if not isinstance(pipe.scheduler, wanted):
        name, found = type(pipe).__name__, type(pipe.scheduler).__name__
        raise ValueError(f"{name} needs a {wanted.__name__}, got a {found}; give scheduler={wanted.__name__}(...)")
    return pipe.scheduler
