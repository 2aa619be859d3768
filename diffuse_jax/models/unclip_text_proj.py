"""The conditions of an unCLIP decoder from CLIP's embeddings of image and prompt (Ramesh et al. 2022, 2.1)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffuse_jax.allowed import Index
from diffuse_jax.config import Config
from diffuse_jax.models.base import Model
from diffuse_jax.models.layers import Dense, LayerNorm, parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnCLIPTextProjConfig(Config):
    """``config.json`` of an ``UnCLIPTextProjModel``; the defaults are Karlo's."""

    class_name: ClassVar[str] = "UnCLIPTextProjModel"

    clip_extra_context_tokens: Index = 4
    clip_embeddings_dim: int = 768
    time_embed_dim: int = 1280
    cross_attention_dim: int = 1536


class DecoderConditions(NamedTuple):
    """What an unCLIP decoder is conditioned on.

    Attributes:
      context: ``[B,T+L,cross_attention_dim]``: ``T`` tokens of the image, then those of the prompt.
      vector: ``[B,time_embed_dim]``, which is added to the embedding of the timestep.
    """

    context: jax.Array
    vector: jax.Array


class UnCLIPTextProjModel(Model):
    """Projects CLIP's embeddings of an image and a prompt, and the prompt's hidden states, for an unCLIP decoder."""

    config: UnCLIPTextProjConfig = UnCLIPTextProjConfig()
    config_class: ClassVar[type[Config]] = UnCLIPTextProjConfig

    @classmethod
    def library(cls) -> str:
        """The module of PyTorch diffusers that published folders name for this class."""
        return "unclip"

    def setup(self) -> None:
        c = self.config
        dense = lambda width: Dense(width, dtype=self.dtype, param_dtype=self.param_dtype)
        name = "learned_classifier_free_guidance_embeddings"
        self.learned_classifier_free_guidance_embeddings = parameter(
            self, name, nn.initializers.zeros_init(), (c.clip_embeddings_dim,)
        )
        self.embedding_proj = dense(c.time_embed_dim)
        self.clip_image_embeddings_project_to_time_embeddings = dense(c.time_embed_dim)
        self.clip_extra_context_tokens_proj = dense(c.clip_extra_context_tokens * c.cross_attention_dim)
        self.encoder_hidden_states_proj = dense(c.cross_attention_dim)
        self.text_encoder_hidden_states_norm = LayerNorm(dtype=self.dtype, param_dtype=self.param_dtype)

    def example_inputs(self) -> dict[str, Any]:
        width = self.config.clip_embeddings_dim
        shape = lambda *axes: jax.ShapeDtypeStruct((1, *axes, width), jnp.float32)
        return {
            "image_embeddings": shape(),
            "prompt_embeds": shape(),
            "text_encoder_hidden_states": shape(1),
            "is_unconditional": jax.ShapeDtypeStruct((1,), bool),
        }

    def __call__(
        self,
        image_embeddings: jax.Array,
        prompt_embeds: jax.Array,
        text_encoder_hidden_states: jax.Array,
        is_unconditional: jax.Array,
    ) -> DecoderConditions:
        """The conditions.

        Args:
          image_embeddings: ``[B,E]`` of the image; not looked at where ``is_unconditional`` is true.
          prompt_embeds: ``[B,E]`` of the prompt.
          text_encoder_hidden_states: ``[B,L,E]`` of the prompt.
          is_unconditional: bool ``[B]``, where a learned embedding takes the place of the image's.
        """
        c = self.config
        learned = jnp.asarray(self.learned_classifier_free_guidance_embeddings, self.dtype)
        image = jnp.where(is_unconditional[:, None], learned, jnp.asarray(image_embeddings, self.dtype))
        vector = self.clip_image_embeddings_project_to_time_embeddings(image)
        vector = vector + self.embedding_proj(jnp.asarray(prompt_embeds, self.dtype))
        tokens = self.clip_extra_context_tokens_proj(image)
        tokens = tokens.reshape(len(tokens), c.cross_attention_dim, c.clip_extra_context_tokens).swapaxes(1, 2)
        states = self.encoder_hidden_states_proj(jnp.asarray(text_encoder_hidden_states, self.dtype))
        states = self.text_encoder_hidden_states_norm(states)
        return DecoderConditions(jnp.concatenate([tokens, states], 1), vector)
