"""Training Kandinsky 2.2: the prior on embeddings of images, the decoder on MoVQ's latents (Razzhigaev et al. 2023)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffuse_jax.models import Params
from diffuse_jax.schedulers import DDPMScheduler, Scheduler
from diffuse_jax.training.families.base import (
    Arrays,
    Networks,
    TrainedFamily,
    Words,
    apply,
    mask_name,
    normalised,
    pixels_of,
)
from diffuse_jax.training.families.stable_diffusion import OF_IF, OF_KANDINSKY, OF_WUERSTCHEN

NO_IMAGES = (
    "a prior and a decoder make images together; open a checkpoint and the other one with KandinskyV22CombinedPipeline"
)
NO_TEXT = "a decoder reads embeddings of images, and has no text encoder"
NO_AUTOENCODER = "a prior is trained on embeddings, and has no autoencoder"


def image_pixels(processor: Any, edge: int, example: Any) -> np.ndarray:
    """The image of an example as an image encoder takes it, float32 ``[edge,edge,3]``."""
    found = np.asarray(processor([Image.fromarray(np.asarray(example.pixels))]))
    if found.shape[1:3] != (edge, edge):
        raise ValueError(f"the image processor makes {found.shape[1:3]} pixels, and the image_encoder takes {edge}")
    return found[0]


def encoder_arrays(pipe: Any) -> dict[str, Callable[[Any], np.ndarray]]:
    """What the pipeline's image encoder takes of an example."""
    processor = pipe.components.get("image_processor") or pipe.components["feature_extractor"]
    edge = pipe.components["image_encoder"].config.image_size
    return {"image_pixels": functools.partial(image_pixels, processor, edge)}


def embeddings(models: Networks, params: Params, batch: Arrays) -> jax.Array:
    """CLIP's embeddings of images ``[B,E]``, float32."""
    return apply(models, params, "image_encoder", batch["image_pixels"]).image_embeds.astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderFamily(TrainedFamily):
    """A decoder: a UNet that is conditioned on the embedding of the image whose latents it denoises."""

    parts: tuple[str, ...] = ("movq", "image_encoder")
    methods: tuple[str, ...] = ("text to image", "DreamBooth")
    image_encoders: tuple[str, ...] = ("movq", "image_encoder")
    encoded_images: tuple[str, ...] = ("latents", "image_embeds")
    borrowed: Any = dataclasses.field(default_factory=lambda: {"image_encoder": "pretrained_prior_model_name_or_path"})
    beside: Any = dataclasses.field(default_factory=lambda: {"image_encoder": {"image_processor": "feature_extractor"}})
    refused: Any = dataclasses.field(
        default_factory=lambda: {
            "pretrained_vae_model_name_or_path": "its autoencoder is the folder movq of the model",
            "train_text_encoder": NO_TEXT,
            "cache_text_embeddings": f"{NO_TEXT}; --cache_latents stores the embeddings too",
            "proportion_empty_prompts": NO_TEXT,
            "validation_prompt": NO_IMAGES,
            "validation_images": OF_IF,
            "effnet_path": OF_WUERSTCHEN,
            "class_labels_conditioning": OF_IF,
        }
    )

    def check(self, configs: Mapping[str, Any], what: str) -> None:
        unet, latents = configs["unet"], configs["movq"].latent_channels
        if unet.sample_channels != latents or unet.addition_embed_type != "image":
            raise ValueError(
                f"{what} whose UNet has {unet.in_channels} input channels (addition_embed_type="
                f"{unet.addition_embed_type!r}); this trainer gives it noisy latents alone ({latents}), as the decoder "
                "of a KandinskyV22Pipeline takes"
            )

    def multiple(self, pipe: Any) -> int:
        return int(pipe.components["movq"].config.scale * pipe.components["unet"].config.divisor)

    def cell(self, pipe: Any) -> int | None:
        return int(pipe.components["movq"].config.scale)

    def draws(self, pipe: Any) -> bool:
        return False

    def size(self, pipe: Any) -> tuple[int, int] | None:
        edge = pipe.components["unet"].config.sample_size
        return (edge * pipe.components["movq"].config.scale,) * 2 if isinstance(edge, int) else None

    def arrays(self, pipe: Any, true_sizes: bool) -> dict[str, Callable[[Any], np.ndarray]]:
        return {"pixel_values": pixels_of, **encoder_arrays(pipe)}

    def encode_images(self, models: Networks, params: Params, batch: Arrays) -> dict[str, jax.Array]:
        """``latents [B,h,w,c]``, neither quantised nor scaled, and ``image_embeds [B,E]``."""
        found = apply(models, params, "movq", normalised(batch["pixel_values"]), method="encode").mode()
        return {"latents": found.astype(jnp.float32), "image_embeds": embeddings(models, params, batch)}

    def begin(self, models: Networks, params: Params, batch: Arrays, key: jax.Array) -> tuple[jax.Array, Arrays]:
        return batch["latents"], batch

    def predict(self, models: Networks, params: Params, batch: Arrays, x: jax.Array, t: jax.Array) -> jax.Array:
        """The noise; the other half of the channels is a variance, which is not trained."""
        found = apply(models, params, "unet", x, t, None, {"image_embeds": batch["image_embeds"]})
        return found[..., : x.shape[-1]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorFamily(TrainedFamily):
    """A prior: a transformer that predicts the normalised embedding of an image from a noisy one and a caption."""

    denoiser: str = "prior"
    parts: tuple[str, ...] = ("image_encoder",)
    methods: tuple[str, ...] = ("text to image", "DreamBooth")
    encoders: Any = dataclasses.field(default_factory=lambda: {"text_encoder": "tokenizer"})
    fixed: tuple[str, ...] = ("clip_mean", "clip_std")
    image_encoders: tuple[str, ...] = ("image_encoder",)
    encoded_images: tuple[str, ...] = ("image_embeds",)
    refused: Any = dataclasses.field(
        default_factory=lambda: {
            "pretrained_vae_model_name_or_path": NO_AUTOENCODER,
            "pretrained_prior_model_name_or_path": f"{OF_KANDINSKY}; this is a prior, with its own",
            "prediction_type": "a prior predicts clean embeddings",
            "train_text_encoder": "a prior reads CLIP's embeddings as they are",
            "noise_offset": "an embedding has no channels with pixels in them",
            "gradient_checkpointing": "the prior has no blocks that can be recomputed",
            "remat_policy": "the prior has no blocks that can be recomputed",
            "validation_prompt": NO_IMAGES,
            "validation_images": OF_IF,
            "effnet_path": OF_WUERSTCHEN,
            "class_labels_conditioning": OF_IF,
        }
    )

    def scheduler(self, folder: Path) -> Scheduler:
        """That of unCLIP's sampler, whose configuration does not say its levels."""
        return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")

    def sampler(self, sampler: Scheduler, schedule: Scheduler) -> Scheduler:
        return sampler

    def size(self, pipe: Any) -> tuple[int, int] | None:
        return None

    def draws(self, pipe: Any) -> bool:
        return False

    def words(self, pipe: Any) -> dict[str, Words]:
        length = pipe.components["text_encoder"].config.max_position_embeddings
        return {"text_encoder": Words(pipe.components["tokenizer"], length, masked=True)}

    def arrays(self, pipe: Any, true_sizes: bool) -> dict[str, Callable[[Any], np.ndarray]]:
        return encoder_arrays(pipe)

    def encode_text(self, models: Networks, params: Params, batch: Arrays) -> dict[str, jax.Array]:
        """``states [B,L,D]``, ``pooled [B,E]``, and the tokens' ``mask [B,L]``."""
        name = "text_encoder"
        out = apply(models, params, name, batch[name])
        return {"states": out.last_hidden_state, "pooled": out.text_embeds, "mask": batch[mask_name(name)]}

    def encode_images(self, models: Networks, params: Params, batch: Arrays) -> dict[str, jax.Array]:
        """``image_embeds [B,E]``."""
        return {"image_embeds": embeddings(models, params, batch)}

    def begin(self, models: Networks, params: Params, batch: Arrays, key: jax.Array) -> tuple[jax.Array, Arrays]:
        """Embeddings in units of the prior, of about unit variance (the inverse of ``unnormalised``)."""
        mean, std = (jnp.asarray(params["prior"][name], jnp.float32) for name in self.fixed)
        return (batch["image_embeds"] - mean) / std, batch

    def predict(self, models: Networks, params: Params, batch: Arrays, x: jax.Array, t: jax.Array) -> jax.Array:
        mask = batch["mask"].astype(bool)
        return apply(models, params, "prior", x, t, batch["pooled"], batch["states"], mask)


KANDINSKY_DECODER = DecoderFamily()
KANDINSKY_PRIOR = PriorFamily()
