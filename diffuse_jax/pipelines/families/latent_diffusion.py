"""Latent diffusion's text to image: a transformer trained with the UNet reads BERT's tokens (Rombach et al. 2022)."""

from __future__ import annotations

from typing import Any

import jax

from diffuse_jax.pipelines.families.clip import ClipFamily
from diffuse_jax.pipelines.method import Net, Params
from diffuse_jax.pipelines.options import EncoderTextOptions
from diffuse_jax.pipelines.parts.text import EncodeText
from diffuse_jax.text.prompts import PLAIN, Style


class BertStates(EncodeText):
    """The encoder's last hidden states, after its final norm."""

    def states(self, params: Params, net: Net, output: Any, clip_skip: int | None) -> jax.Array:
        return output.last_hidden_state


class BertFamily(ClipFamily):
    """A family whose encoder returns no states of earlier layers."""

    def text_part(self, pipe: Any, clip_skip: int | None = None, style: Style = PLAIN) -> EncodeText:
        return self.encode(tuple(Net(name, pipe.components[name]) for name in self.encoders), style=style)


LATENT_DIFFUSION = BertFamily(
    encoders={"bert": "tokenizer"},
    encode=BertStates,
    embeds={"states": "prompt_embeds"},
    distilled=False,
    options=EncoderTextOptions,
    autoencoder="vqvae",
)
