"""DeepFloyd IF's safety checker: two scores of an image's CLIP embedding."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from diffuse_jax.config import Config
from diffuse_jax.models.base import Model
from diffuse_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModelWithProjection, pixel_values, whole_clip
from diffuse_jax.models.layers import Dense

THRESHOLD = 0.5
"""A score above it flags an image."""


class IFSafetyChecker(Model):
    """Says which images are unsafe or show a watermark."""

    config: CLIPVisionConfig = CLIPVisionConfig()
    config_class: ClassVar[type[Config]] = CLIPVisionConfig
    weights_name: ClassVar[str] = "model"
    model_type: ClassVar[str] = "clip"

    @classmethod
    def library(cls) -> str:
        """The module of PyTorch diffusers' pipelines that ``model_index.json`` names for this class."""
        return "deepfloyd_if"

    def setup(self) -> None:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.vision_model = CLIPVisionModelWithProjection(self.config, **dtypes)
        self.p_head = Dense(1, **dtypes)
        self.w_head = Dense(1, **dtypes)

    def example_inputs(self) -> dict[str, Any]:
        return {"clip_input": pixel_values(self.config)}

    def __call__(self, clip_input: jax.Array) -> jax.Array:
        """Whether each image is flagged: ``[B]`` bool.

        Args:
          clip_input: the images as the image processor makes them, ``[B,image_size,image_size,3]``.
        """
        embeds = self.vision_model(clip_input).image_embeds
        scores = jnp.concatenate([self.p_head(embeds), self.w_head(embeds)], -1)
        return (scores > THRESHOLD).any(-1)

    def config_json(self) -> dict[str, Any]:
        return whole_clip(self)
