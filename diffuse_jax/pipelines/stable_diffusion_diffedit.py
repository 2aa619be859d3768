"""DiffEdit (Couairon et al. 2022, arXiv 2210.11427): edits by two prompts, with Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

import numpy as np
from PIL import Image

from diffuse_jax.messages import renaming, warn
from diffuse_jax.pipelines.diffedit import inside_mask, masking, regularised
from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.inversion import inverse_of, inverting
from diffuse_jax.pipelines.method import Params, Rows
from diffuse_jax.pipelines.options import TextOptions
from diffuse_jax.pipelines.parts.decode import ToImages
from diffuse_jax.pipelines.pipeline import described_by, verb
from diffuse_jax.pipelines.running import Output, Request, apply, as_images
from diffuse_jax.pipelines.stable_diffusion import StableDiffusionPipeline
from diffuse_jax.pipelines.tasks import vae_of
from diffuse_jax.schedulers.request import check_strength


def inversion(
    pipe: Any,
    prompt: Prompt | None = None,
    image: ImageInput = None,
    *,
    inpaint_strength: float = 0.8,
    guidance_scale: float | Sequence[float] = 7.5,
    lambda_auto_corr: float = 20.0,
    lambda_kl: float = 20.0,
    num_reg_steps: int = 0,
    num_auto_corr_rolls: int = 5,
    **options: Unpack[TextOptions],
) -> Request:
    """The request of :meth:`StableDiffusionDiffEditPipeline.invert`."""
    if num_reg_steps and (kind := options.get("noise")) is not None:
        warn(
            f'noise="{kind}" with num_reg_steps={num_reg_steps}: the regularisation draws shifts of its own, so the '
            "result is not that of the other program"
        )
    check_strength(inpaint_strength, "inpaint_strength")
    scheduler = inverse_of(pipe, None)
    arguments = {"prompt": prompt, "guidance_scale": guidance_scale, **options}
    with renaming({"strength": "inpaint_strength"}):
        request = inverting(pipe, image, arguments, scheduler=scheduler, strength=inpaint_strength)
    return regularised(request, scheduler, (lambda_auto_corr, lambda_kl), num_reg_steps, num_auto_corr_rolls)


class StableDiffusionDiffEditPipeline(StableDiffusionPipeline):
    """Edits an image in three steps: :meth:`generate_mask` finds where two prompts differ, :meth:`invert` the noise
    that the image comes from, and the call samples inside the mask from there."""

    sampler_settings: ClassVar[Mapping[str, Any]] = {"steps_offset": 1, "skip_prk_steps": True}

    def compose(  # type: ignore[override]
        self,
        prompt: Prompt | None = None,
        mask_image: ImageInput = None,
        image_latents: Any = None,
        *,
        inpaint_strength: float = 0.8,
        guidance_scale: float | Sequence[float] = 7.5,
        **options: Unpack[TextOptions],
    ) -> Request:
        """Generate edited images.

        Args:
          prompt: what the image should show, or a list; or give ``prompt_embeds``.
          mask_image: of :meth:`generate_mask`, or any mask of the latents' size, one or one per prompt.
          image_latents: ``[prompts,steps,h,w,c]``, of :meth:`invert` with the same number of steps and strength; or a
            list of such arrays.
          inpaint_strength: in (0, 1], the share of the steps to run.
          guidance_scale: one value, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.TextOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        arguments = {"prompt": prompt, "guidance_scale": guidance_scale, **options}
        return inside_mask(self, mask_image, image_latents, inpaint_strength, arguments)

    @described_by(masking, np.ndarray | list[Image.Image])
    def generate_mask(self, *args: Any, **options: Any) -> np.ndarray | list[Image.Image]:
        return verb(masking)(self, *args, **options).images

    def invert(
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        *,
        decode_latents: bool = False,
        output_type: str = "pil",
        **options: Any,
    ) -> Output:
        """Find the noisy latents of an image, for the call: ``out.latents [B,steps,h,w,c]``, the noisiest first.

        Args:
          prompt: what the image shows, one for all images or one for each; empty if None.
          image: the image, or one per prompt; or latents ``[B,h,w,c]``.
          decode_latents: also decode all latents: ``out.images``, those of the first image first.
          output_type: form of these images, "pil" or "np".
          **options: ``inpaint_strength``, in (0, 1], the share of the steps to run (0.8 by default);
            ``guidance_scale`` (7.5); ``num_reg_steps``, how often predicted noise is regularised in each evaluation
            (0), with weights ``lambda_auto_corr`` (20) for its auto-correlation at ``num_auto_corr_rolls`` (5) random
            shifts and ``lambda_kl`` (20) for its divergence from the standard normal distribution; and those of
            :class:`~diffuse_jax.pipelines.options.TextOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        if output_type not in ("pil", "np"):
            raise ValueError(f'output_type must be "pil" or "np", got {output_type!r}; the latents are returned anyway')
        found = verb(inversion)(self, prompt, image, **options | {"return_trajectory": True})
        results = {"latents": found.trajectory[:, :0:-1]}
        if decode_latents:
            results["images"] = self._decoded(results["latents"], output_type)
        return Output(results, found.seeds)

    def _decoded(self, latents: Any, output_type: str) -> Any:
        """The images of latents ``[B,steps,h,w,c]``, those of the first image first; one step at a time."""
        part = ToImages(vae_of(self), output_type == "pil", self.vae_tiling, self.vae_slicing)
        steps = [apply(self, decoded, part, {"latents": step}) for step in np.moveaxis(np.asarray(latents), 1, 0)]
        images = np.stack([np.asarray(step["images"]) for step in steps], 1)
        images = images.reshape(-1, *images.shape[2:])
        return as_images(images) if output_type == "pil" else images


def decoded(part: ToImages, params: Params, rows: Rows) -> Rows:
    """The images of latents, outside a run."""
    return part(params, rows, rows["latents"])
