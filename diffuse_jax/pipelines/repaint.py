"""RePaint: inpainting with an unconditional network (Lugmayr et al. 2022, arXiv 2201.09865)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Unpack

from diffuse_jax.pipelines.inputs import ImageInput, mask_pixels, per_prompt, pixels, signed
from diffuse_jax.pipelines.options import CallOptions
from diffuse_jax.pipelines.parts.step import KeepKnownAnew
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.unconditional import DDPMPipeline, unconditional
from diffuse_jax.schedulers import RePaintScheduler, Scheduler


class RePaintPipeline(DDPMPipeline):
    """Repaints a part of images with an unconditional network, whatever sampler the folder names.

    Jumps back to more noise let the new part agree with the known one; they multiply the evaluations.
    """

    default_steps: ClassVar[int] = 250
    sampler: ClassVar[type[Scheduler] | None] = RePaintScheduler

    def compose(  # type: ignore[override, misc]  # the images say how many there are
        self,
        image: ImageInput,
        mask_image: ImageInput,
        *,
        eta: float = 0.0,
        jump_length: int = 10,
        jump_n_sample: int = 10,
        **options: Unpack[CallOptions],
    ) -> Request:
        """Repaint images.

        Args:
          image: one image or several, one result each. Their size, rounded down to what the network can halve, is that
            of the results.
          mask_image: one mask, or one per image: black (0) is repainted, white (1) is kept. This is the opposite of
            other pipelines, as in diffusers.
          eta: noise of a step, from 0 (DDIM) to 1 (DDPM).
          jump_length: how many steps a jump goes back.
          jump_n_sample: how often each stretch of that length is run; 1 never jumps.
          **options: as for :class:`DDPMPipeline`; 250 steps by default.

        Raises:
          ValueError, TypeError: an argument is invalid; nothing has been compiled.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be from 0 to 1, got {eta}")
        multiple = max(8, 2 ** (len(self.components["unet"].config.block_out_channels) - 1))
        known = pixels(image, None, "image", multiple=multiple)
        size, count = known.shape[1:3], len(known)
        kept = per_prompt(mask_pixels(mask_image, size, "mask_image"), count, 1, "mask_image")
        request = unconditional(
            self,
            count,
            None,
            options,
            size=size,
            scheduler=RePaintScheduler.from_config(self.scheduler, eta=eta),
            jump_length=jump_length,
            jump_n_sample=jump_n_sample,
        )
        rows = request.rows | {"image_latents": signed(known), "latent_mask": 1 - kept}
        return request._replace(rows=rows, method=dataclasses.replace(request.method, advance=KeepKnownAnew()))
