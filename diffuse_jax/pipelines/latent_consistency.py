"""Latent consistency models (Luo et al. 2023, arXiv 2310.04378): a few steps, guidance as an input of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

from diffuse_jax.messages import renaming
from diffuse_jax.pipelines.family import default_steps, output_size, text_to_image
from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.options import TextOptions
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion import StableDiffusionPipeline
from diffuse_jax.pipelines.tasks import from_image, input_size


class LatentConsistencyModelPipeline(StableDiffusionPipeline):
    """Images from prompts in four steps. There are no negative prompts: the guidance is distilled into the network."""

    sampler_settings: ClassVar[Mapping[str, Any]] = {}

    def compose(
        self,
        prompt: Prompt | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | Sequence[float] = 8.5,
        original_inference_steps: int | None = None,
        **options: Unpack[TextOptions],
    ) -> Request:
        """Generate images, in 4 steps by default. Arguments shared with :class:`StableDiffusionPipeline` have the same
        meaning.

        Args:
          prompt: one prompt or a list; or give ``prompt_embeds``.
          height, width: in pixels; the checkpoint's default size if None.
          guidance_scale: an input of the network, one value or one per image.
          original_inference_steps: steps of the distillation, from which the timesteps are chosen; the sampler's value
            (50) if None.
          **options: see :class:`~diffuse_jax.pipelines.options.TextOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        refuse_negative(self, options)
        arguments = default_steps({"prompt": prompt, "guidance_scale": guidance_scale, **options}, 4)
        return text_to_image(
            self, arguments, output_size(self, height, width), **of_distillation(original_inference_steps)
        )


class LatentConsistencyModelImg2ImgPipeline(LatentConsistencyModelPipeline):
    """Images from prompts and an initial image, in four steps."""

    def compose(  # type: ignore[override]
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        *,
        strength: float = 0.8,
        guidance_scale: float | Sequence[float] = 8.5,
        original_inference_steps: int | None = None,
        **options: Unpack[TextOptions],
    ) -> Request:
        """Generate images of the size of ``image``. Arguments shared with :class:`LatentConsistencyModelPipeline` have
        the same meaning.

        Args:
          prompt: one prompt or a list; or give ``prompt_embeds``.
          image: the initial image, or one per prompt; or latents ``[B,h,w,c]``.
          strength: in (0, 1], how much the image is changed. It shortens the grid of the distillation; the number of
            steps stays.
          guidance_scale, original_inference_steps: as in :class:`LatentConsistencyModelPipeline`.
          **options: see :class:`~diffuse_jax.pipelines.options.TextOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        refuse_negative(self, options)
        arguments = default_steps({"prompt": prompt, "guidance_scale": guidance_scale, **options}, 4)
        size, distillation = input_size(self, image, "image"), of_distillation(original_inference_steps)
        # Samplers that do not choose from the timesteps of a distillation leave out the first steps, as elsewhere.
        name = "grid_strength" if "grid_strength" in self.scheduler.grid_options else "strength"
        part: dict[str, Any] = {name: strength, **distillation}
        with renaming({"grid_strength": "strength"}):
            request = text_to_image(self, arguments, size, **part)
        return from_image(request, self, image)


def of_distillation(steps: int | None) -> dict[str, Any]:
    """The option of the sampler's plan, where it was given."""
    return {} if steps is None else {"original_inference_steps": steps}


def refuse_negative(pipe: Any, options: Mapping[str, Any]) -> None:
    """Refuse a negative prompt where it would have no effect.

    Raises:
      TypeError: one was given.
    """
    names = [name for name in ("negative_prompt", "negative_prompt_embeds") if options.get(name) is not None]
    if names and pipe.components["unet"].config.time_cond_proj_dim is not None:
        raise TypeError(f"{type(pipe).__name__} takes no {names[0]}: its guidance is distilled into the network")
