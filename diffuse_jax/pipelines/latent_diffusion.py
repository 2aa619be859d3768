"""Latent diffusion without prompts (Rombach et al. 2022, arXiv 2112.10752)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Unpack

from diffuse_jax.pipelines.method import Net
from diffuse_jax.pipelines.options import CallOptions
from diffuse_jax.pipelines.parts.decode import ToImages, autoencoder
from diffuse_jax.pipelines.running import Request
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
        if request.output_type == "latent":
            return request
        vae, uint8 = Net("vqvae", autoencoder(self.components["vqvae"])), request.output_type == "pil"
        decode = ToImages(vae, uint8, self.vae_tiling, self.vae_slicing)
        return request._replace(method=dataclasses.replace(request.method, decode=decode))
