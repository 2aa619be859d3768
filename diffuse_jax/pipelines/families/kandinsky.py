"""The decoders of Kandinsky 2.1: M-CLIP reads the prompt, which conditions the UNet beside an image embedding."""

from __future__ import annotations

from typing import Any

import jax

from diffuse_jax.pipelines.families.clip import NEGATIVE, ClipFamily
from diffuse_jax.pipelines.families.kandinsky_v22 import decoder_method, embedding_rows
from diffuse_jax.pipelines.family import Call
from diffuse_jax.pipelines.inputs import spread_prompts
from diffuse_jax.pipelines.method import Method, Net, Params, Rows
from diffuse_jax.pipelines.options import PromptedEmbeddingOptions
from diffuse_jax.pipelines.parts.movq import PromptedUNet
from diffuse_jax.pipelines.parts.text import EncodeText
from diffuse_jax.pipelines.prompts import Layout

TOKENS = 77
"""What Kandinsky was trained with; XLM-RoBERTa itself takes more."""


class MultilingualText(EncodeText):
    """M-CLIP's hidden states, and its embeddings."""

    @property
    def adds(self) -> tuple[str, ...]:
        return "states", "pooled"

    def states(self, params: Params, net: Net, output: Any, clip_skip: int | None) -> jax.Array:
        return output.last_hidden_state

    def pooled(self, outputs: list[Any]) -> jax.Array:
        return outputs[-1].text_embeds


class KandinskyFamily(ClipFamily):
    """A family whose UNet takes image embeddings and prompts."""

    def prompts(self, call: Call, branch: str) -> dict[str, list[str]]:
        """The prompts of a branch, each for as many consecutive embeddings; only the negative one may be left out."""
        name = f"{branch}prompt"
        given = call.get(name, "" if branch == NEGATIVE else ())
        return {"text_encoder": spread_prompts(given, call.prompts, name, "image_embeds")}

    def layouts(self, pipe: Any) -> dict[str, Layout]:
        words, c = pipe.components["tokenizer"], pipe.components["text_encoder"].config
        length = min(TOKENS, c.longest, int(words.model_max_length))
        return {"text_encoder": Layout(words, length, c.vocab_size, hide_padding=True)}

    def method(self, pipe: Any, call: Call, rows: Rows) -> Method:
        """The text encoder, the UNet, guidance if the scale is above 1, and the decoder.

        Raises:
          ValueError: ``output_type`` is unknown.
        """
        return decoder_method(
            pipe, call, PromptedUNet(Net("unet", pipe.components["unet"])), self.conditions(pipe, call, rows)
        )


KANDINSKY = KandinskyFamily(
    encoders={"text_encoder": "tokenizer"},
    encode=MultilingualText,
    embeds={},
    conditioning=embedding_rows,
    distilled=False,
    options=PromptedEmbeddingOptions,
)
