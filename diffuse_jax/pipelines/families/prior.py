"""The priors of unCLIP models: a prompt's CLIP embeddings become those of an image (Ramesh et al. 2022, 2.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffuse_jax.messages import brief
from diffuse_jax.pipelines.families.clip import guidance_rows, repeat_rows, stack_branches
from diffuse_jax.pipelines.family import Call, asks_for_guidance, one_width
from diffuse_jax.pipelines.inputs import finite, number_array, one_per_prompt, token_mask, tokenize
from diffuse_jax.pipelines.method import Method, Net, Part, Rows
from diffuse_jax.pipelines.options import PriorOptions
from diffuse_jax.pipelines.parts.guidance import ClassifierFree
from diffuse_jax.pipelines.parts.prior import EncodePriorText, GivenText, Prior, ToEmbedding, ToEmbeddings
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

    @property
    def widths(self) -> dict[str, str]:
        """Component -> the field that is the width of its embeddings."""
        return {"prior": "embedding_dim", self.encoder: "projection_dim", "image_encoder": "projection_dim"}

    def rows(self, pipe: Any, call: Call) -> Rows:
        """Token ids and masks of all branches and samples, and guidance, one row per image; or what the text encoder
        has made of prompts (:func:`given_text`), and the ids of the branch without one.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one.
        """
        one_width(pipe, self.widths)
        if (text := call.get("text_model_output")) is not None:
            return self.text_rows(pipe, call, text)
        negatives = one_per_prompt(call.get("negative_prompt"), call.prompts, "negative_prompt")
        samples = [one_per_prompt(call.get("prompt"), call.prompts, "prompt")]
        samples += [negatives] if call.get("negative_prompt") is not None else []
        branches = [[negatives] * len(samples), samples] if asks_for_guidance(call) else [samples]
        tokens = [self.tokens(pipe, branch) for branch in branches]
        rows: Rows = {name: {self.encoder: stack_branches([found[name] for found in tokens])} for name in tokens[0]}
        rows = {name: repeat_rows(value, call.copies) for name, value in rows.items()}
        return rows | guidance_rows(call, len(branches) > 1)

    def text_rows(self, pipe: Any, call: Call, text: Rows) -> Rows:
        """The rows of prompts that are encoded; see :meth:`rows`."""
        rows, mask, guided = {f"given_{name}": text[name] for name in TEXT}, [text["mask"]], asks_for_guidance(call)
        if guided:
            empty = self.tokens(pipe, [[""] * call.prompts])
            rows["ids"], mask = {self.encoder: empty["ids"]}, [empty["attention_mask"], *mask]
        rows["attention_mask"] = {self.encoder: stack_branches(mask)}
        rows = {name: repeat_rows(value, call.copies) for name, value in rows.items()}
        return rows | guidance_rows(call, guided)

    def text_part(self, pipe: Any, rows: Rows) -> EncodePriorText:
        """What encodes the prompts that are not encoded yet."""
        kind = GivenText if "given_pooled" in rows else EncodePriorText
        return kind(Net(self.encoder, pipe.components[self.encoder]))

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
            conditions=(self.text_part(pipe, rows),),
            denoiser=ClassifierFree(prior) if asks_for_guidance(call) else prior,
            start=FromNoise(),
            decode=self.decode(pipe),
            latent_shape=(width,) if samples == 1 else (width, samples),
        )

    def decode(self, pipe: Any) -> Part:
        """What makes embeddings of samples."""
        prior, encoder = (Net(name, pipe.components[name]) for name in ("prior", "image_encoder"))
        return ToEmbeddings(prior, encoder)


TEXT = {"pooled": "text_embeds", "states": "last_hidden_state"}
"""Row -> the result of a text encoder that it is."""


def given_text(pipe: Any, output: Any, mask: Any) -> Rows:
    """What a text encoder has made of prompts: ``pooled [N,E]`` and ``states [N,L,E]`` float32, ``mask [N,L]`` bool.

    Args:
      pipe: the pipeline, with a ``text_encoder``.
      output: an object or dict with the names of :data:`TEXT`, or both arrays in this order.
      mask: false at padding.

    Raises:
      ValueError: one of the two is missing, or has another shape than the encoder and its tokenizer would give.
      TypeError: something is no array of numbers.
    """
    if output is None or mask is None:
        missing = "text_attention_mask" if mask is None else "text_model_output"
        raise ValueError(f"text_model_output and text_attention_mask belong together; {missing} is missing")
    arrays = [_field(output, name) for name in TEXT.values()]
    if isinstance(output, tuple | list) and all(array is None for array in arrays):
        arrays = [*output[: len(TEXT)]]
    if len(arrays) != len(TEXT) or any(array is None for array in arrays):
        raise TypeError(f"text_model_output must have {' and '.join(TEXT.values())}, got {brief(output)}")
    c, words = pipe.components["text_encoder"].config, pipe.components["tokenizer"]
    length, width = min(c.max_position_embeddings, int(words.model_max_length)), c.projection_dim
    names = [f"text_model_output.{name}" for name in TEXT.values()]
    found = [number_array(array, name).astype(np.float32) for array, name in zip(arrays, names, strict=True)]
    seen = finite(mask, "text_attention_mask")
    prompts = max(found[0].shape[0] if found[0].ndim else 0, 1)
    wanted = [(prompts, width), (prompts, length, c.hidden_size), (prompts, length)]
    for name, array, shape in zip([*names, "text_attention_mask"], [*found, seen], wanted, strict=True):
        if array.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} (padded to {length} tokens), got {list(array.shape)}")
    if not np.isin(seen, (0, 1)).all():
        raise ValueError("text_attention_mask must be True for tokens and False for padding")
    return {"pooled": found[0], "states": found[1], "mask": seen.astype(bool)}


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


class PriorStage(PriorFamily):
    """The prior inside a pipeline whose decoder takes no negative embedding, so that there is no image encoder."""

    def decode(self, pipe: Any) -> Part:
        return ToEmbedding(Net("prior", pipe.components["prior"]))


PRIOR = PriorFamily()
# It computes the same, but its embeddings are those of another image encoder, which only its own decoders were trained
# with: families are compared by identity.
KANDINSKY21_PRIOR = PriorFamily()
