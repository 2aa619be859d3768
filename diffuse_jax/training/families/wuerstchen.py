"""Training Würstchen's prior: noise of semantic maps in continuous time (Pernias et al. 2023, arXiv 2306.00637)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from diffuse_jax.models import Params
from diffuse_jax.schedulers import DDPMWuerstchenScheduler, Scheduler
from diffuse_jax.training.efficientnet_v2 import SCALE, read_encoder
from diffuse_jax.training.families.base import (
    Arrays,
    Networks,
    TrainedFamily,
    Words,
    apply,
    mask_name,
)
from diffuse_jax.training.families.stable_diffusion import OF_IF, OF_KANDINSKY

DEVIATION, SHIFT = 42.0, 1.0
"""Maps are the encoder's features plus the shift, over the deviation: ``latent_mean`` and ``latent_std`` of pipelines,
which undo it."""

EVEN = "times are drawn evenly from 0 to 1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SemanticFamily(TrainedFamily):
    """The prior: a network that denoises maps of images, made by an EfficientNet, from CLIP's states of captions."""

    denoiser: str = "prior"
    parts: tuple[str, ...] = ("effnet",)
    methods: tuple[str, ...] = ("text to image", "DreamBooth")
    encoders: Any = dataclasses.field(default_factory=lambda: {"text_encoder": "tokenizer"})
    image_encoders: tuple[str, ...] = ("effnet",)
    encoded_images: tuple[str, ...] = ("maps",)
    borrowed: Any = dataclasses.field(default_factory=lambda: {"effnet": "effnet_path"})
    refused: Any = dataclasses.field(
        default_factory=lambda: {
            "pretrained_vae_model_name_or_path": "a prior is trained on the maps of --effnet_path",
            "pretrained_prior_model_name_or_path": OF_KANDINSKY,
            "prediction_type": "it predicts the noise",
            "train_text_encoder": "both stages of Würstchen read CLIP's states as they are",
            "gradient_checkpointing": "this network has no blocks that can be recomputed",
            "remat_policy": "this network has no blocks that can be recomputed",
            "timestep_bias_strategy": EVEN,
            "validation_prompt": "a prior makes maps; open a checkpoint and a decoder with WuerstchenCombinedPipeline",
            "validation_images": OF_IF,
            "class_labels_conditioning": OF_IF,
        }
    )

    def read(self, path: Path) -> tuple[Any, Params]:
        return read_encoder(path)

    def scheduler(self, folder: Path) -> Scheduler:
        return DDPMWuerstchenScheduler.from_pretrained(folder, subfolder="scheduler")

    def sampler(self, sampler: Scheduler, schedule: Scheduler) -> Scheduler:
        return sampler

    def multiple(self, pipe: Any) -> int:
        return SCALE

    def cell(self, pipe: Any) -> int | None:
        return SCALE

    def size(self, pipe: Any) -> tuple[int, int] | None:
        return None

    def draws(self, pipe: Any) -> bool:
        return False

    def words(self, pipe: Any) -> dict[str, Words]:
        return {name: own._replace(masked=True) for name, own in super().words(pipe).items()}

    def encode_text(self, models: Networks, params: Params, batch: Arrays) -> dict[str, jax.Array]:
        """``states [B,L,D]``."""
        name = "text_encoder"
        return {"states": apply(models, params, name, batch[name], batch[mask_name(name)]).last_hidden_state}

    def encode_images(self, models: Networks, params: Params, batch: Arrays) -> dict[str, jax.Array]:
        """``maps [B,h,w,c]``, of about unit variance."""
        return {"maps": (apply(models, params, "effnet", batch["pixel_values"]) + SHIFT) / DEVIATION}

    def begin(self, models: Networks, params: Params, batch: Arrays, key: jax.Array) -> tuple[jax.Array, Arrays]:
        return jnp.asarray(batch["maps"], jnp.float32), batch

    def predict(self, models: Networks, params: Params, batch: Arrays, x: jax.Array, t: jax.Array) -> jax.Array:
        return apply(models, params, "prior", x, t, batch["states"])


WUERSTCHEN_TRAINED = SemanticFamily()
