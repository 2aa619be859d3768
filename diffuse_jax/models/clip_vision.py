"""CLIP's vision encoder (Radford et al. 2021; OpenCLIP, Cherti et al. 2023), and the safety checker that reads it."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffuse_jax.config import Config
from diffuse_jax.models.base import Model
from diffuse_jax.models.clip_layers import CLIPLayersConfig, Part, TransformerLayers
from diffuse_jax.models.embeddings import Embedding
from diffuse_jax.models.layers import Conv, Dense, parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig(CLIPLayersConfig):
    """``config.json`` of a CLIP vision encoder, as transformers writes it (or its ``vision_config`` part)."""

    label: ClassVar[str] = "CLIP vision"
    section: ClassVar[str] = "vision_config"
    model_types: ClassVar[tuple[str, ...]] = ("clip_vision_model", "clip")

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size > self.image_size:
            raise ValueError(f"CLIP vision: patch_size {self.patch_size} of an image of {self.image_size} pixels")


class CLIPVisionOutput(NamedTuple):
    """The encoder's outputs. Under ``jit``, whatever the caller leaves out is not computed or kept."""

    last_hidden_state: jax.Array  # [B,1+N,D]: class token, then patches row by row; not normalised
    pooler_output: jax.Array  # [B,D], the normalised class token
    hidden_states: tuple[jax.Array, ...]  # num_hidden_layers + 1 times [B,1+N,D]: the layers' input, then their outputs
    image_embeds: jax.Array | None  # [B,projection_dim]; None without a projection


class CLIPVisionModel(Model):
    """A transformer over the patches of an image; without a projection of the pooled state."""

    config: CLIPVisionConfig = CLIPVisionConfig()
    config_class: ClassVar[type[Config]] = CLIPVisionConfig
    weights_name: ClassVar[str] = "model"
    model_type: ClassVar[str] = "clip_vision_model"
    has_projection: ClassVar[bool] = False

    def setup(self) -> None:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.vision_model = VisionTransformer(self.config, **dtypes)
        if self.has_projection:
            self.visual_projection = Dense(self.config.projection_dim, use_bias=False, **dtypes)

    def example_inputs(self) -> dict[str, Any]:
        return {"pixel_values": pixel_values(self.config)}

    def __call__(self, pixel_values: jax.Array) -> CLIPVisionOutput:
        """Encode ``pixel_values [B,image_size,image_size,num_channels]``, normalised by the image processor.

        Raises:
          ValueError: another shape.
        """
        c = self.config
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (c.image_size, c.image_size, c.num_channels):
            raise ValueError(
                f"pixel_values must be [B,{c.image_size},{c.image_size},{c.num_channels}] (channel-last; see "
                f"CLIPImageProcessor), got {pixel_values.shape}"
            )
        pooled, states = self.vision_model(jnp.asarray(pixel_values, self.dtype))
        embeds = self.visual_projection(pooled) if self.has_projection else None
        return CLIPVisionOutput(states[-1], pooled, states, embeds)


class CLIPVisionModelWithProjection(CLIPVisionModel):
    """The same with ``image_embeds``, the projected pooled state (IP-Adapter, image variation, unCLIP)."""

    has_projection: ClassVar[bool] = True


def pixel_values(config: CLIPVisionConfig) -> jax.ShapeDtypeStruct:
    """The input of the encoder, for one image."""
    return jax.ShapeDtypeStruct((1, config.image_size, config.image_size, config.num_channels), jnp.float32)


class VisionTransformer(Part):
    """Embeddings, a norm, layers, and the norm of the class token."""

    def setup(self) -> None:
        self.embeddings = VisionEmbeddings(self.config, **self.dtypes)
        self.pre_layrnorm = self.norm()  # the checkpoints' spelling
        self.encoder = TransformerLayers(self.config, **self.dtypes)
        self.post_layernorm = self.norm()

    def __call__(self, images: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        states = self.encoder(self.pre_layrnorm(self.embeddings(images)))
        return self.post_layernorm(states[-1][:, 0]), states


class VisionEmbeddings(Part):
    """Class token and patches, plus position: ``[B,H,W,C] -> [B,1+N,D]``. Pixels beyond the last patch are cut off."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        c = self.config
        D, edge = c.hidden_size, c.patch_size
        embed = Conv(D, edge, stride=edge, padding=0, use_bias=False, **self.dtypes, name="patch_embedding")
        patches = embed(images).reshape(images.shape[0], -1, D)
        token = parameter(self, "class_embedding", nn.initializers.normal(0.02), (D,))
        token = jnp.broadcast_to(jnp.asarray(token, self.dtype), (images.shape[0], 1, D))
        x = jnp.concatenate([token, patches], axis=1)
        count = 1 + (c.image_size // edge) ** 2
        table = Embedding(count, D, **self.dtypes, name="position_embedding")
        return x + table(jnp.arange(count, dtype=jnp.int32)[None, :])


CONCEPTS, SPECIAL_CARE = 17, 3
"""Numbers of concepts that the safety checker compares an image with."""

STRICTER = 0.01
"""Added to an image's scores if a concept of special care was found in it."""


class StableDiffusionSafetyChecker(Model):
    """Says which images show one of 17 unsafe concepts, each a CLIP embedding and a threshold.

    An image's result does not depend on the others in its batch.
    """

    config: CLIPVisionConfig = CLIPVisionConfig()
    config_class: ClassVar[type[Config]] = CLIPVisionConfig
    weights_name: ClassVar[str] = "model"
    model_type: ClassVar[str] = "clip"

    @classmethod
    def library(cls) -> str:
        """The module of PyTorch diffusers' pipelines that ``model_index.json`` names for this class."""
        return "stable_diffusion"

    def setup(self) -> None:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.vision_model = CLIPVisionModel(self.config, **dtypes)
        self.visual_projection = Dense(self.config.projection_dim, use_bias=False, **dtypes)
        ones = lambda name, *shape: parameter(self, name, nn.initializers.ones_init(), shape)
        width = self.config.projection_dim
        self.concept_embeds = ones("concept_embeds", CONCEPTS, width)
        self.concept_embeds_weights = ones("concept_embeds_weights", CONCEPTS)
        self.special_care_embeds = ones("special_care_embeds", SPECIAL_CARE, width)
        self.special_care_embeds_weights = ones("special_care_embeds_weights", SPECIAL_CARE)

    def example_inputs(self) -> dict[str, Any]:
        return {"clip_input": pixel_values(self.config)}

    def __call__(self, clip_input: jax.Array) -> jax.Array:
        """Whether each image is unsafe: ``[B]`` bool; similarities and thresholds are compared in float32.

        Args:
          clip_input: the images as the image processor makes them, ``[B,image_size,image_size,3]``.
        """
        embeds = self.visual_projection(self.vision_model(clip_input).pooler_output)
        special = scores(embeds, self.special_care_embeds, self.special_care_embeds_weights)
        stricter = STRICTER * above_zero(special).any(-1, keepdims=True).astype(jnp.float32)
        concepts = scores(embeds, self.concept_embeds, self.concept_embeds_weights)
        return above_zero(concepts + stricter).any(-1)

    def config_json(self) -> dict[str, Any]:
        return whole_clip(self)


def whole_clip(model: Model) -> dict[str, Any]:
    """The file of a whole CLIP, of which only the vision side exists, for a network with such a configuration."""
    config: Any = model.config
    vision = {**config.to_json(), "model_type": CLIPVisionModel.model_type}
    head = {"architectures": [type(model).__name__], "model_type": model.model_type}
    return {**head, "projection_dim": config.projection_dim, "vision_config": vision}


def scores(embeds: jax.Array, concepts: jax.Array, thresholds: jax.Array) -> jax.Array:
    """Cosine similarity of images ``[B,D]`` and concepts ``[N,D]`` above the thresholds ``[N]``: ``[B,N]`` float32."""
    similarity = unit(embeds) @ unit(concepts).T
    return similarity - jnp.asarray(thresholds, jnp.float32)[None, :]


def unit(x: jax.Array) -> jax.Array:
    """Rows of length one, in float32."""
    x = jnp.asarray(x, jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def above_zero(x: jax.Array) -> jax.Array:
    """Whether scores are positive once they are rounded to three decimals, as they are published."""
    return jnp.round(x, 3) > 0
