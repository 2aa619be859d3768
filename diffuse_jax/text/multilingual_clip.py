"""M-CLIP: the prompts of many languages in CLIP's space (Carlsson et al. 2022), Kandinsky 2.1's text encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffuse_jax.config import Config
from diffuse_jax.models.base import Model
from diffuse_jax.models.layers import Dense
from diffuse_jax.text.xlm_roberta import XLMRoberta, XLMRobertaConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultilingualCLIPConfig(XLMRobertaConfig):
    """``config.json`` of a ``MultilingualCLIP``, as PyTorch diffusers writes it: an XLM-RoBERTa's and two widths.

    ``numDims`` is the width of the embeddings; ``transformerDimensions`` says ``hidden_size`` again.
    """

    harmless: ClassVar[Mapping[str, str]] = {**XLMRobertaConfig.harmless, "modelBase": "about the file"}
    model_types: ClassVar[tuple[str, ...]] = ("M-CLIP",)

    transformerDimensions: int = 1024
    numDims: int = 768

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transformerDimensions != self.hidden_size:
            raise ValueError(
                f"MultilingualCLIP: transformerDimensions={self.transformerDimensions} must be hidden_size, "
                f"{self.hidden_size}"
            )


class MultilingualCLIPOutput(NamedTuple):
    """The encoder's outputs, in its ``dtype``."""

    last_hidden_state: jax.Array  # [B,L,hidden_size]
    text_embeds: jax.Array  # [B,numDims], the projected mean over tokens


class MultilingualCLIP(Model):
    """XLM-RoBERTa, and a linear layer that takes the mean of its states to CLIP's space."""

    config: MultilingualCLIPConfig = MultilingualCLIPConfig(hidden_size=1024, num_attention_heads=16)
    config_class: ClassVar[type[Config]] = MultilingualCLIPConfig
    weights_name: ClassVar[str] = "model"
    model_type: ClassVar[str] = "M-CLIP"

    @classmethod
    def library(cls) -> str:
        """The module of PyTorch diffusers' pipelines that ``model_index.json`` names for this class."""
        return "kandinsky"

    def example_inputs(self) -> dict[str, Any]:
        return {"input_ids": jax.ShapeDtypeStruct((1, 2), jnp.int32)}

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> MultilingualCLIPOutput:
        """Encode ``input_ids [B,L]`` int32, ``L <= config.longest``.

        Args:
          input_ids: token ids, which are not checked against the vocabulary.
          attention_mask: ``[B,L]``, true (or 1) where a token may be attended to and counts in the mean; all if None.

        Raises:
          ValueError: ids or mask have another shape.
        """
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        states = XLMRoberta(self.config, **dtypes, name="transformer")(input_ids, attention_mask)
        mean = masked_mean(states, jnp.ones(input_ids.shape) if attention_mask is None else attention_mask)
        project = Dense(self.config.numDims, **dtypes, name="LinearTransformation")
        return MultilingualCLIPOutput(states, project(mean.astype(self.dtype)))


def masked_mean(states: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of ``states [B,L,D]`` over the tokens where ``mask [B,L]`` is true, float32 ``[B,D]``."""
    weights = mask.astype(jnp.float32)[..., None]
    return (states.astype(jnp.float32) * weights).sum(1) / weights.sum(1)
