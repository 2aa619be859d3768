"""Latent diffusion without prompts: images from noise, and super-resolution (Rombach et al. 2022, arXiv 2112.10752)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Unpack

from PIL import Image

from diffuse_jax.pipelines.inputs import ImageInput, image_size, per_prompt, pixels, signed, whole_images
from diffuse_jax.pipelines.method import Net
from diffuse_jax.pipelines.options import CallOptions
from diffuse_jax.pipelines.parts.control import BesideScaled
from diffuse_jax.pipelines.parts.decode import ToImages, autoencoder
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.tasks import changed, require_image
from diffuse_jax.pipelines.unconditional import DDPMPipeline, unconditional


class LDMPipeline(DDPMPipeline):
    """Unconditional images from latents that a :class:`~diffuse_jax.models.VQModel` quantises and decodes."""

    required: ClassVar[tuple[str, ...]] = ("vqvae", "unet", "scheduler")
    default_steps: ClassVar[int] = 50

    def compose(  # type: ignore[override]  # without the option of DDIM
        self,
        batch_size: int = 1,
        *,
        class_labels: int | Sequence[int] | None = None,
        **options: Unpack[CallOptions],
    ) -> Request:
        """Generate ``batch_size`` images; arguments as for :class:`DDPMPipeline`. ``output_type="latent"`` gives
        latents ``[B,h,w,c]``.

        Raises:
          ValueError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        request = unconditional(self, batch_size, class_labels, options)
        return decoded(self, request)


class LDMSuperResolutionPipeline(DDPMPipeline):
    """Images as much larger as the autoencoder's factor (4), from a network that sees the small image beside the
    latents, which have its size."""

    required: ClassVar[tuple[str, ...]] = ("vqvae", "unet", "scheduler")
    default_steps: ClassVar[int] = 100

    def compose(  # type: ignore[override]  # without classes
        self,
        image: ImageInput = None,
        batch_size: int | None = None,
        **options: Unpack[CallOptions],
    ) -> Request:
        """Enlarge images.

        Args:
          image: one image or several. The size of PIL images is rounded down to multiples of 32, as in diffusers;
            arrays ``[N,H,W,3]`` in [0, 1] have a size that the network can halve as often as it does.
          batch_size: number of results, for a single image; one for each image if None.
          **options: as for :class:`DDPMPipeline`; 100 steps by default.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        require_image(image, "image")
        network, vae = self.components["unet"].config, self.components["vqvae"].config
        halved = 2 ** (len(network.block_out_channels) - 1)
        is_pil = isinstance(whole_images(image, "image")[0], Image.Image)
        multiple = math.lcm(32, halved) if is_pil else halved
        small = signed(pixels(image, image_size(image, "image", multiple), "image"))
        count, channels = len(small) if batch_size is None else batch_size, vae.latent_channels
        if network.in_channels != channels + small.shape[-1]:
            raise ValueError(
                f"{type(self).__name__} needs a UNet with {channels + small.shape[-1]} input channels, {channels} of "
                f"latents and {small.shape[-1]} of the image, got {network.in_channels}"
            )
        request = unconditional(self, count, None, options, size=small.shape[1:3], channels=channels)
        rows = {"small_image": per_prompt(small, count, 1, "image")}
        request = changed(request, rows, denoiser=BesideScaled(request.method.denoiser, ("small_image",)))
        return decoded(self, request, scaled=False)


def decoded(pipe: DDPMPipeline, request: Request, *, scaled: bool = True) -> Request:
    """The request, with images that the autoencoder ``vqvae`` decodes, unless latents are asked for.

    Args:
      pipe: the pipeline.
      request: its request over latents.
      scaled: whether latents are divided by the autoencoder's ``scaling_factor`` before they are decoded.
    """
    if request.output_type == "latent":
        return request
    vae, uint8 = Net("vqvae", autoencoder(pipe.components["vqvae"])), request.output_type == "pil"
    return changed(request, {}, decode=ToImages(vae, uint8, pipe.vae_tiling, pipe.vae_slicing, scaled=scaled))
