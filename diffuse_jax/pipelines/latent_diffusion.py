"""Latent diffusion without prompts (Rombach et al. 2022, arXiv 2112.10752)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from diffuse_jax.pipelines.method import Net
from diffuse_jax.pipelines.parts.decode import ToImages, autoencoder
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.unconditional import DDPMPipeline


class LDMPipeline(DDPMPipeline):
    """Unconditional images from latents that a :class:`~diffuse_jax.models.VQModel` quantises and decodes."""

    required: ClassVar[tuple[str, ...]] = ("vqvae", "unet", "scheduler")
    default_steps: ClassVar[int] = 50

    def compose(self, batch_size: int = 1, **options: Any) -> Request:
        """Generate ``batch_size`` images. ``output_type="latent"`` gives latents ``[B,h,w,c]``.

        Raises:
          ValueError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        request = super().compose(batch_size, **options)
        if request.output_type == "latent":
            return request
        decode = ToImages(Net("vqvae", autoencoder(self.components["vqvae"])), request.output_type == "pil")
        return request._replace(method=dataclasses.replace(request.method, decode=decode))
