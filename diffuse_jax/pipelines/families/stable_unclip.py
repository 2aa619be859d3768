"""Stable unCLIP: Stable Diffusion 2.1 conditioned on a prompt and on the CLIP embedding of an image."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffuse_jax.pipelines.families.clip import ClipFamily
from diffuse_jax.pipelines.families.prior import PriorStage
from diffuse_jax.pipelines.families.stable_diffusion import LastStates
from diffuse_jax.pipelines.family import Call, one_width
from diffuse_jax.pipelines.image_prompts import prompted
from diffuse_jax.pipelines.inputs import one_per_image
from diffuse_jax.pipelines.method import Net, Part, Rows
from diffuse_jax.pipelines.options import StableUnCLIPOptions
from diffuse_jax.pipelines.parts.stable_unclip import NoisedEmbedding


class StableUnCLIPFamily(ClipFamily):
    """A family whose UNet takes a noised image embedding in the place of a class; a task adds ``image_embeds``."""

    def rows(self, pipe: Any, call: Call) -> Rows:
        """The rows of Stable Diffusion, and the level of the noise that is added to the embeddings.

        Raises:
          ValueError, TypeError: an argument is invalid, or the networks have embeddings of different widths.
        """
        check_widths(pipe)
        levels = pipe.components["image_noising_scheduler"].train_levels()
        level = one_per_image(call.get("noise_level", 0), call.images, "noise_level")
        if np.any(level != np.round(level)) or np.any(level < 0) or np.any(level >= len(levels)):
            raise ValueError(
                f"noise_level must be a whole number from 0 to {len(levels) - 1}, got {call.get('noise_level')}"
            )
        noising = {"noise_level": level, "image_embedding_level": levels[level.astype(int)].astype(np.float32)}
        seen = {"prompted": prompted(call.images, self.uses_guidance(pipe, call))}
        return super().rows(pipe, call) | noising | seen

    def conditions(self, pipe: Any, call: Call, rows: Rows) -> tuple[Part, ...]:
        normalizer = Net("image_normalizer", pipe.components["image_normalizer"])
        return (*super().conditions(pipe, call, rows), NoisedEmbedding(normalizer))


def check_widths(pipe: Any) -> None:
    """Check that the networks take each other's embeddings.

    Raises:
      ValueError: they do not.
    """
    fields = {"image_normalizer": "embedding_dim", "prior": "embedding_dim", "image_encoder": "projection_dim"}
    width, unet = one_width(pipe, fields), pipe.components["unet"].config
    kind, taken = unet.class_embed_type, unet.projection_class_embeddings_input_dim
    if kind != "projection" or taken != 2 * width:
        raise ValueError(
            f"the UNet must have class_embed_type='projection' with an input of {2 * width}, twice the width of the "
            f"embeddings; it has {kind!r} with {taken}"
        )


STABLE_UNCLIP = StableUnCLIPFamily(
    encoders={"text_encoder": "tokenizer"},
    encode=LastStates,
    embeds={"states": "prompt_embeds"},
    masked=True,
    options=StableUnCLIPOptions,
)

STABLE_UNCLIP_PRIOR = PriorStage(encoder="prior_text_encoder", tokenizer="prior_tokenizer")
