"""The safety checker as a part: what it flags becomes black before it leaves the device."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from diffuse_jax.messages import warn
from diffuse_jax.pipelines.method import Net, Params, Part, Rows
from diffuse_jax.processors import ImageProcessor

FLAGGED = "nsfw_content_detected"
"""The name of the result that says which images were flagged, ``[B]`` bool."""


@dataclasses.dataclass(frozen=True)
class Checked(Part):
    """Decoded images, black where the safety checker flags one, and ``nsfw_content_detected [B]``; other results are
    unchanged.

    Attributes:
      decode: the decoder; without ``images`` among its results, nothing is checked.
      checker: the :class:`~diffuse_jax.models.StableDiffusionSafetyChecker`.
      processor: what prepares images for it.
    """

    decode: Any
    checker: Net
    processor: ImageProcessor

    def __call__(self, params: Params, rows: Rows, sample: Array) -> dict[str, Any]:
        results = self.decode(params, rows, sample)
        if "images" not in results:
            return results
        images = results["images"]
        shown = images / jnp.float32(255) if images.dtype == jnp.uint8 else images.astype(jnp.float32)
        shown = jnp.broadcast_to(shown, (*shown.shape[:-1], 3))  # images of one channel are gray
        flagged = self.checker.apply(params, self.processor.on_device(shown))
        black = jnp.where(flagged[:, None, None, None], jnp.zeros_like(images), images)
        return results | {"images": black, FLAGGED: flagged}


def warn_of_flagged(flagged: list[bool]) -> None:
    """Warn that images are black because they were flagged."""
    if any(flagged):
        warn(
            f"{sum(flagged)} of {len(flagged)} images were flagged by the safety checker and are black; try another "
            "prompt or seed"
        )
