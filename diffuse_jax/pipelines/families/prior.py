"""The priors of unCLIP models: a prompt's CLIP embeddings become those of an image (Ramesh et al. 2022, 2.2)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from diffuse_jax.pipelines.families.clip import guidance_rows, repeat_rows, stack_branches
from diffuse_jax.pipelines.family import Call, asks_for_guidance
from diffuse_jax.pipelines.inputs import one_per_prompt, token_mask, tokenize
from diffuse_jax.pipelines.method import Method, Net, Part, Rows
from diffuse_jax.pipelines.options import PriorOptions
from diffuse_jax.pipelines.parts.guidance import ClassifierFree
from diffuse_jax.pipelines.parts.prior import EncodePriorText, Prior, ToEmbedding, ToEmbeddings
from diffuse_jax.pipelines.parts.start import FromNoise


@dataclasses.dataclass(frozen=True)
class PriorFamily:
    """A family whose runs give image embeddings, from one text encoder, a prior and an image encoder.

    With a negative prompt there are two samples for each image: its own, and one that the prior makes of the negative
    prompt.

    Attributes:
      encoder, tokenizer: the names of these components.
      options: a ``TypedDict`` of the arguments of its calls.
      plan_options: the names of those that are passed on to the sampler's plan.
    """

    encoder: str = "text_encoder"
    tokenizer: str = "tokenizer"
    options: type = PriorOptions
    plan_options: tuple[str, ...] = ()

    def rows(self, pipe: Any, call: Call) -> Rows:
        """Token ids and masks of all branches and samples, and guidance, one row per image.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one.
        """
        negatives = one_per_prompt(call.get("negative_prompt"), call.prompts, "negative_prompt")
        samples = [one_per_prompt(call.get("prompt"), call.prompts, "prompt")]
        samples += [negatives] if call.get("negative_prompt") is not None else []
        branches = [[negatives] * len(samples), samples] if asks_for_guidance(call) else [samples]
        tokens = [self.tokens(pipe, branch) for branch in branches]
        rows: Rows = {name: {self.encoder: stack_branches([found[name] for found in tokens])} for name in tokens[0]}
        rows = {name: repeat_rows(value, call.copies) for name, value in rows.items()}
        return rows | guidance_rows(call, len(branches) > 1)

    def tokens(self, pipe: Any, samples: list[list[str]]) -> dict[str, np.ndarray]:
        """``ids`` and ``attention_mask`` ``[N,L]`` of prompts; of two samples ``[N,2,L]``."""
        words, c = pipe.components[self.tokenizer], pipe.components[self.encoder].config
        length = c.max_position_embeddings
        found = {
            "ids": [tokenize(words, prompts, length, c.vocab_size) for prompts in samples],
            "attention_mask": [token_mask(words, prompts, length) for prompts in samples],
        }
        return {name: arrays[0] if len(arrays) == 1 else np.stack(arrays, 1) for name, arrays in found.items()}

    def method(self, pipe: Any, call: Call, rows: Rows) -> Method:
        """Text encoder, prior, guidance if the scale is above 1, and what makes embeddings of samples."""
        net = lambda name: Net(name, pipe.components[name])
        prior, width = Prior(net("prior"), self.encoder), pipe.components["prior"].config.embedding_dim
        samples = 1 if call.get("negative_prompt") is None else 2
        return Method(
            conditions=(EncodePriorText(net(self.encoder)),),
            denoiser=ClassifierFree(prior) if asks_for_guidance(call) else prior,
            start=FromNoise(),
            decode=self.decode(pipe),
            latent_shape=(width,) if samples == 1 else (width, samples),
        )

    def decode(self, pipe: Any) -> Part:
        """What makes embeddings of samples."""
        prior, encoder = (Net(name, pipe.components[name]) for name in ("prior", "image_encoder"))
        return ToEmbeddings(prior, encoder)


class PriorStage(PriorFamily):
    """The prior inside a pipeline whose decoder takes no negative embedding, so that there is no image encoder."""

    def decode(self, pipe: Any) -> Part:
        return ToEmbedding(Net("prior", pipe.components["prior"]))


PRIOR = PriorFamily()
