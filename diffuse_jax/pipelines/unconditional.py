"""Unconditional generation in pixel space: DDPM (Ho et al. 2020) and DDIM (Song et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Unpack

import numpy as np

from diffuse_jax.models.unet_2d import UNet2DConfig
from diffuse_jax.pipelines.family import check_output, make_plan
from diffuse_jax.pipelines.inputs import noise_rows
from diffuse_jax.pipelines.method import Method, Net, Rows
from diffuse_jax.pipelines.options import CallOptions, check_names
from diffuse_jax.pipelines.parts.decode import Raw, ToPixels
from diffuse_jax.pipelines.parts.network import PixelUNet
from diffuse_jax.pipelines.parts.start import FromNoise
from diffuse_jax.pipelines.pipeline import DiffusionPipeline
from diffuse_jax.pipelines.running import Request
from diffuse_jax.schedulers import DDIMScheduler


class DDPMPipeline(DiffusionPipeline):
    """Unconditional images from the folder's sampler, by default with one step per training timestep (at most 1000)."""

    required: ClassVar[tuple[str, ...]] = ("unet", "scheduler")
    default_steps: ClassVar[int] = 1000

    def compose(
        self,
        batch_size: int = 1,
        *,
        class_labels: int | Sequence[int] | None = None,
        use_clipped_model_output: bool | None = None,
        **options: Unpack[CallOptions],
    ) -> Request:
        """Generate ``batch_size`` images.

        Args:
          batch_size: number of images.
          class_labels: for class-conditional networks, one label or one per image.
          use_clipped_model_output: an option of DDIM, like ``eta``; other samplers refuse it.
          **options: see :class:`~diffuse_jax.pipelines.options.CallOptions`. ``num_inference_steps`` is 1000 by default
            (:class:`DDIMPipeline`: 50), ``output_type="latent"`` gives pixels in [-1, 1], not clipped.

        Raises:
          ValueError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        check_names(type(self), options, CallOptions)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        network, output = self.components["unet"], check_output(options.get("output_type", "pil"))
        method = Method(
            denoiser=PixelUNet(Net("unet", network)),
            start=FromNoise(),
            decode=Raw() if output == "latent" else ToPixels(output == "pil"),
            latent_shape=sample_shape(network.config),
        )
        noise, seeds = noise_rows(batch_size, options, method.latent_shape, self.mesh)
        steps = min(self.default_steps, self.scheduler.num_train_timesteps)
        plan = make_plan(self.scheduler, options, steps, use_clipped_model_output=use_clipped_model_output)
        return Request(method, noise | label_rows(class_labels, network.config, batch_size), plan, output, seeds)


class DDIMPipeline(DDPMPipeline):
    """Unconditional images from DDIM, whatever sampler the folder names."""

    default_steps: ClassVar[int] = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.scheduler, DDIMScheduler):
            components = {**self.components, "scheduler": DDIMScheduler.from_config(self.scheduler)}
            object.__setattr__(self, "components", components)


def sample_shape(config: UNet2DConfig) -> tuple[int, int, int]:
    """Height, width and channels of the network's images.

    Raises:
      ValueError: the config has no ``sample_size``.
    """
    size = config.sample_size
    if size is None:
        raise ValueError("the network's config has no sample_size; set it to a size in pixels or (height, width)")
    return (*((size, size) if isinstance(size, int) else size), config.in_channels)


def label_rows(labels: int | Sequence[int] | None, config: UNet2DConfig, images: int) -> Rows:
    """``class_labels`` int32, one per image; empty for a network without classes.

    Raises:
      ValueError: labels are missing or unexpected, out of range, or not one per image.
    """
    if (labels is None) == config.has_classes:
        wants = "needs class_labels" if config.has_classes else "takes no class_labels"
        raise ValueError(f"this network {wants} (num_class_embeds={config.num_class_embeds})")
    if labels is None:
        return {}
    array = np.asarray(labels, np.int32)
    if array.shape not in ((), (images,)):
        raise ValueError(f"class_labels has shape {array.shape} for {images} images; give one label or one per image")
    classes = config.num_class_embeds
    if classes is not None and not np.all((array >= 0) & (array < classes)):
        raise ValueError(f"class_labels must be from 0 to {classes - 1}, got {labels}")
    return {"class_labels": np.broadcast_to(array, (images,))}
