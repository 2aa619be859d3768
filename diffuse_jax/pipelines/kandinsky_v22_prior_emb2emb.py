"""The prior of Kandinsky 2.2, from a prompt and the embedding of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.kandinsky_v22_prior import KandinskyV22PriorPipeline
from diffuse_jax.pipelines.options import PriorOptions
from diffuse_jax.pipelines.priors import from_embedding, prior_request
from diffuse_jax.pipelines.running import Request


class KandinskyV22PriorEmb2EmbPipeline(KandinskyV22PriorPipeline):
    """Embeddings of images for the decoders of Kandinsky 2.2, from a prompt and an initial image."""

    def compose(
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        *,
        strength: float = 0.3,
        guidance_scale: float | Sequence[float] = 4.0,
        **options: Unpack[PriorOptions],
    ) -> Request:
        """Generate embeddings. Arguments shared with :class:`KandinskyV22PriorPipeline` have the same meaning.

        Args:
          prompt: one prompt or a list.
          image: the initial image, or one per prompt, of any size; or embeddings ``[N,E]``.
          strength: in (0, 1], how much the embedding is changed: the fraction of the steps that is run.
          guidance_scale: one value, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.PriorOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        arguments = {"prompt": prompt, "guidance_scale": guidance_scale, **options}
        return from_embedding(prior_request(self, arguments, strength=strength), self, image)
