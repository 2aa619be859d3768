"""DeepFloyd IF: T5's states of 77 tokens, and a UNet over pixels that also returns a variance (DeepFloyd, 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from diffuse_jax.messages import warn
from diffuse_jax.pipelines.families.clip import NEGATIVE, POSITIVE, ClipFamily
from diffuse_jax.pipelines.family import Call, check_output
from diffuse_jax.pipelines.method import Method, Net, Params, Rows
from diffuse_jax.pipelines.options import PixelTextOptions
from diffuse_jax.pipelines.parts.decode import Raw, ToPixels
from diffuse_jax.pipelines.parts.guidance import ClassifierFree
from diffuse_jax.pipelines.parts.network import UNet
from diffuse_jax.pipelines.parts.start import FromNoise
from diffuse_jax.pipelines.parts.text import EncodeText
from diffuse_jax.pipelines.prompts import Layout
from diffuse_jax.text.prompts import PLAIN, Style

TOKENS = 77
"""What IF was trained with; T5 itself takes more."""

CHANNELS = 3
"""Of a sample, which is an image."""


class T5States(EncodeText):
    """T5's last hidden states."""

    def states(self, params: Params, net: Net, output: Any, clip_skip: int | None) -> jax.Array:
        return output.last_hidden_state


class PixelTextFamily(ClipFamily):
    """A family whose samples are images, with T5 as an optional text encoder: embeddings may be given instead."""

    def text_rows(
        self,
        pipe: Any,
        call: Call,
        branches: tuple[str, ...],
        checked: tuple[str, ...] = (NEGATIVE, POSITIVE),
    ) -> Rows:
        """As for other families.

        Raises:
          ValueError: there is no text encoder, and a branch has no embeddings.
        """
        if pipe.components.get("text_encoder") is None:
            names = [f"{branch}prompt_embeds" for branch in branches]
            if missing := [name for name in names if call.get(name) is None]:
                raise ValueError(
                    f"the pipeline has no text_encoder, so give {' and '.join(missing)}, as encode_prompt of a "
                    "pipeline with one returns them"
                )
        return super().text_rows(pipe, call, branches, checked)

    def prompts(self, call: Call, branch: str) -> dict[str, list[str]]:
        """The prompts of a branch in small letters without outer white space, as IF was trained with."""
        if call.get("clean_caption"):
            warn("clean_caption=True needs packages that this library does not use; the prompt is only made lower case")
        return {name: [text.lower().strip() for text in texts] for name, texts in super().prompts(call, branch).items()}

    def layouts(self, pipe: Any) -> dict[str, Layout]:
        network = pipe.components.get("text_encoder")
        if network is None:
            return {}
        if (tokenizer := pipe.components.get("tokenizer")) is None:
            raise ValueError("the pipeline has a text_encoder but no tokenizer; give one, or prompt_embeds")
        length = min(TOKENS, int(tokenizer.model_max_length))
        return {"text_encoder": Layout(tokenizer, length, network.config.vocab_size, True)}

    def tokens(self, pipe: Any, prompts: Mapping[str, list[str]], style: Style = PLAIN) -> Rows:
        return super().tokens(pipe, prompts, style) if self.layouts(pipe) else {"ids": {}}

    def text_part(self, pipe: Any, clip_skip: int | None = None, style: Style = PLAIN) -> EncodeText:
        return self.encode((Net("text_encoder", pipe.components.get("text_encoder")),))

    def method(self, pipe: Any, call: Call, rows: Rows) -> Method:
        """The text encoder, the UNet, and guidance if the scale is above 1.

        Raises:
          ValueError: ``output_type`` is unknown.
        """
        unet, output = UNet(Net("unet", pipe.components["unet"])), check_output(call.get("output_type", "pil"))
        return Method(
            conditions=self.conditions(pipe, call, rows),
            denoiser=ClassifierFree(unet) if self.uses_guidance(pipe, call) else unet,
            start=FromNoise(),
            decode=Raw() if output == "latent" else ToPixels(output == "pil"),
            latent_shape=(*call.size, CHANNELS),
        )


DEEPFLOYD_IF = PixelTextFamily(
    encoders={"text_encoder": "tokenizer"},
    encode=T5States,
    embeds={"states": "prompt_embeds"},
    distilled=False,
    options=PixelTextOptions,
)
