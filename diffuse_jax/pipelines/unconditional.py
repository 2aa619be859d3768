"""Unconditional and class-conditional generation in pixel space, one thin class for each published sampler.

DDPM (Ho et al. 2020), DDIM (Song et al. 2020), PNDM (Liu et al. 2022), consistency models (Song et al. 2023) and EDM
(Karras et al. 2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

import jax
import numpy as np

from diffuse_jax.messages import brief
from diffuse_jax.models.adm_unet import ADMUNetConfig
from diffuse_jax.models.unet_2d import UNet2DConfig
from diffuse_jax.pipelines.family import check_output, make_plan
from diffuse_jax.pipelines.inputs import noise_rows, number_array
from diffuse_jax.pipelines.method import Method, Net, Rows, image_keys, keys_for
from diffuse_jax.pipelines.options import CallOptions, check_names
from diffuse_jax.pipelines.parts.decode import Raw, ToPixels
from diffuse_jax.pipelines.parts.network import PixelUNet
from diffuse_jax.pipelines.parts.start import FromNoise
from diffuse_jax.pipelines.pipeline import DiffusionPipeline
from diffuse_jax.pipelines.running import Request
from diffuse_jax.schedulers import DDIMScheduler, PNDMScheduler, Scheduler


class DDPMPipeline(DiffusionPipeline):
    """Unconditional images from the folder's sampler, by default with one step per training timestep (at most 1000)."""

    required: ClassVar[tuple[str, ...]] = ("unet", "scheduler")
    default_steps: ClassVar[int] = 1000
    sampler: ClassVar[type[Scheduler] | None] = None
    """The sampler that takes the place of the folder's; None keeps the folder's."""
    random_classes: ClassVar[bool] = False
    """Whether images get random classes where the call gives none, as a class-conditional network needs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler is not None and not isinstance(self.scheduler, self.sampler):
            components = {**self.components, "scheduler": self.sampler.from_config(self.scheduler)}
            object.__setattr__(self, "components", components)

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
          class_labels: for class-conditional networks, one label or one per image. If None, the pipelines of
            consistency models and of EDM choose them at random, from the seeds.
          use_clipped_model_output: an option of DDIM, like ``eta``; other samplers refuse it.
          **options: see :class:`~diffuse_jax.pipelines.options.CallOptions`. The default of
            ``num_inference_steps`` is the class's ``default_steps``; ``output_type="latent"`` gives pixels in [-1, 1],
            not clipped.

        Raises:
          ValueError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        return unconditional(self, batch_size, class_labels, options, use_clipped_model_output=use_clipped_model_output)


def unconditional(
    pipe: DDPMPipeline,
    images: int,
    class_labels: int | Sequence[int] | None,
    options: Mapping[str, Any],
    *,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    scheduler: Scheduler | None = None,
    **plan_options: Any,
) -> Request:
    """The request for images from noise; other tasks modify it.

    Args:
      pipe: a pipeline with a pixel-space ``unet``.
      images: number of images.
      class_labels: one label, one per image, or None.
      options: the other arguments of the call, see :class:`~diffuse_jax.pipelines.options.CallOptions`.
      size: (height, width) of the samples; the network's if None.
      channels: of the samples, with a size; those that the network takes if None.
      scheduler: the sampler; the pipeline's if None.
      **plan_options: further arguments of the sampler's plan.

    Raises:
      ValueError, TypeError: an argument is invalid or contradicts another one.
    """
    check_names(type(pipe), options, CallOptions)
    if images < 1:
        raise ValueError(f"batch_size must be at least 1, got {images}")
    network, output = pipe.components["unet"], check_output(options.get("output_type", "pil"))
    method = Method(
        denoiser=PixelUNet(Net("unet", network)),
        start=FromNoise(),
        decode=Raw() if output == "latent" else ToPixels(output == "pil"),
        latent_shape=sample_shape(network.config) if size is None else (*size, channels or network.config.in_channels),
    )
    noise, seeds = noise_rows(images, options, method.latent_shape, pipe.mesh)
    labels = label_rows(class_labels, network.config, images, noise if pipe.random_classes else None)
    sampler = scheduler or pipe.scheduler
    steps = min(pipe.default_steps, getattr(sampler, "num_train_timesteps", pipe.default_steps))
    return Request(method, noise | labels, make_plan(sampler, options, steps, **plan_options), output, seeds)


class DDIMPipeline(DDPMPipeline):
    """Unconditional images from DDIM, whatever sampler the folder names."""

    default_steps: ClassVar[int] = 50
    sampler: ClassVar[type[Scheduler] | None] = DDIMScheduler


class PNDMPipeline(DDPMPipeline):
    """Unconditional images from pseudo linear multistep sampling (arXiv 2202.09778), whatever sampler the folder
    names."""

    default_steps: ClassVar[int] = 50
    sampler: ClassVar[type[Scheduler] | None] = PNDMScheduler


class ConsistencyModelPipeline(DDPMPipeline):
    """Images of a consistency model (arXiv 2303.01469): one evaluation by default, or one for each of ``timesteps``."""

    default_steps: ClassVar[int] = 1
    random_classes: ClassVar[bool] = True


class KarrasEDMPipeline(ConsistencyModelPipeline):
    """Images of a network trained as in EDM (arXiv 2206.00364); each step but the last evaluates it twice."""


def sample_shape(config: UNet2DConfig | ADMUNetConfig) -> tuple[int, int, int]:
    """Height, width and channels of the network's images.

    Raises:
      ValueError: the config has no ``sample_size``.
    """
    size = config.sample_size
    if size is None:
        raise ValueError("the network's config has no sample_size; set it to a size in pixels or (height, width)")
    return (*((size, size) if isinstance(size, int) else size), config.in_channels)


def label_rows(
    labels: int | Sequence[int] | None, config: UNet2DConfig | ADMUNetConfig, images: int, noise: Rows | None = None
) -> Rows:
    """``class_labels``, one per image; empty for a network without classes.

    They are int32 where the network has a table of classes; float32 where it embeds any number
    (``class_embed_type="timestep"``) or takes vectors (``"identity"``, or ``label_channels`` of an
    :class:`~diffuse_jax.models.ADMUNet`).

    With ``noise``, the rows that determine the noise, missing labels are random: each depends on its image's seed.

    Raises:
      ValueError: labels are missing or unexpected, out of range, or not one per image.
      TypeError: they are no numbers.
    """
    classes, shape = config.class_count, config.label_shape
    if labels is None and noise is not None and classes is not None:
        draw = lambda key: jax.random.randint(key, (), 0, classes, np.int32)
        return {"class_labels": np.asarray(jax.vmap(draw)(keys_for(image_keys(noise), "class label")))}
    if (labels is None) == config.has_classes:
        raise ValueError(f"this network {'needs' if config.has_classes else 'takes no'} class_labels")
    if labels is None:
        return {}
    array = number_array(labels, "class_labels")
    if array.shape not in (shape, (images, *shape)):
        raise ValueError(f"class_labels has shape {array.shape} for {images} images; give one label or one per image")
    if classes is not None and not (array.dtype.kind in "iu" and np.all((array >= 0) & (array < classes))):
        raise ValueError(f"class_labels must be integers from 0 to {classes - 1}, got {brief(labels)}")
    dtype = np.float32 if classes is None else np.int32
    return {"class_labels": np.broadcast_to(array.astype(dtype), (images, *shape))}
