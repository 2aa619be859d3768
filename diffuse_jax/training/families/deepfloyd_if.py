"""Training DeepFloyd IF: noise of pixels, from T5's states of captions; the second stage also sees small images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffuse_jax.models import Params
from diffuse_jax.pipelines.families.deepfloyd_if import CHANNELS, TOKENS
from diffuse_jax.pipelines.pixel_tasks import enlarged
from diffuse_jax.schedulers import Scheduler
from diffuse_jax.training.families.base import (
    Arrays,
    Networks,
    TrainedFamily,
    Words,
    apply,
    mask_name,
    normalised,
)
from diffuse_jax.training.families.stable_diffusion import OF_KANDINSKY, OF_WUERSTCHEN

FIRST_STAGE = 64
"""Height and width of the first stage's images in pixels."""

NO_LATENTS = "DeepFloyd IF is trained on pixels"
SECOND = "images of the second stage are four times as large as those that it enlarges; this is a first stage"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelFamily(TrainedFamily):
    """Both stages of DeepFloyd IF. The UNet also predicts a variance, which is not trained.

    Super-resolution is recognised by a UNet with twice the input channels.

    Attributes:
      class_labels: see ``class_labels_conditioning`` of :class:`~diffuse_jax.training.settings.ModelSettings`.
    """

    class_labels: str = "noise_level"
    parts: tuple[str, ...] = ("image_noising_scheduler",)
    encoders: Any = dataclasses.field(default_factory=lambda: {"text_encoder": "tokenizer"})
    methods: tuple[str, ...] = ("text to image", "DreamBooth")
    refused: Any = dataclasses.field(
        default_factory=lambda: {
            "cache_latents": f"{NO_LATENTS}, so there are no latents",
            "pretrained_vae_model_name_or_path": f"{NO_LATENTS}, so it has no autoencoder",
            "train_text_encoder": "T5 stays as it is, and both stages read the same prompt embeddings",
            "pretrained_prior_model_name_or_path": OF_KANDINSKY,
            "effnet_path": OF_WUERSTCHEN,
        }
    )

    def check(self, configs: Mapping[str, Any], what: str) -> None:
        takes = configs["unet"].in_channels
        if takes not in (CHANNELS, 2 * CHANNELS):
            raise ValueError(
                f"{what} whose UNet has {takes} input channels; this trainer gives it noisy pixels ({CHANNELS}), and "
                f"beside them an image to enlarge ({2 * CHANNELS})"
            )

    def refusals(self, pipe: Any) -> Mapping[str, str]:
        if enlarges(pipe):
            return self.refused
        return {**self.refused, "class_labels_conditioning": SECOND, "validation_images": SECOND}

    def sampler(self, sampler: Scheduler, schedule: Scheduler) -> Scheduler:
        """With a fixed variance: what the UNet predicts of it is not trained along with the noise."""
        found = super().sampler(sampler, schedule)
        learned = str(getattr(found, "variance_type", "")).startswith("learned")
        return found.replace(variance_type="fixed_small") if learned else found

    def multiple(self, pipe: Any) -> int:
        config = pipe.components["unet"].config
        return math.lcm(config.divisor, shrinking(config) if enlarges(pipe) else 1)

    def cell(self, pipe: Any) -> int | None:
        return 1

    def draws(self, pipe: Any) -> bool:
        return not enlarges(pipe)

    def words(self, pipe: Any) -> dict[str, Words]:
        if pipe.components.get("text_encoder") is None:
            raise ValueError(f"training a {type(pipe).__name__} needs its text_encoder, and the folder has none")
        tokenizer = pipe.components["tokenizer"]
        length = min(TOKENS, int(tokenizer.model_max_length))
        return {"text_encoder": Words(tokenizer, length, masked=True, plain=True)}

    def with_class_labels(self, class_labels: str | None) -> TrainedFamily:
        return self if class_labels is None else dataclasses.replace(self, class_labels=class_labels)

    def encode_text(self, models: Networks, params: Params, batch: Arrays) -> dict[str, jax.Array]:
        """``states [B,L,D]``."""
        name = "text_encoder"
        return {"states": apply(models, params, name, batch[name], batch[mask_name(name)]).last_hidden_state}

    def begin(self, models: Networks, params: Params, batch: Arrays, key: jax.Array) -> tuple[jax.Array, Arrays]:
        """Pixels in [-1, 1]; for super-resolution also the image ``beside`` them and its noise level,
        ``class_labels``."""
        x0 = normalised(batch["pixel_values"]).astype(jnp.float32)
        if models["unet"].config.in_channels == CHANNELS or self.class_labels == "timesteps":
            return x0, batch
        k_level, k_noise = jax.random.split(key)
        scheduler, large = models["image_noising_scheduler"], coarse(x0, shrinking(models["unet"].config))
        level = jax.random.randint(k_level, x0.shape[:1], 0, scheduler.num_train_timesteps, jnp.int32)
        noise = jax.random.normal(k_noise, x0.shape, jnp.float32)
        return x0, {**batch, "beside": scheduler.add_noise(large, noise, level), "class_labels": level}

    def predict(self, models: Networks, params: Params, batch: Arrays, x: jax.Array, t: jax.Array) -> jax.Array:
        """The noise; the other half of the channels is a variance."""
        if models["unet"].config.in_channels == CHANNELS:
            found = apply(models, params, "unet", x, t, batch["states"])
        else:
            seen = jnp.concatenate([x, batch.get("beside", x)], -1)
            found = apply(models, params, "unet", seen, t, batch["states"], class_labels=batch.get("class_labels", t))
        return found[..., :CHANNELS]


def enlarges(pipe: Any) -> bool:
    """Whether a pipeline is one for super-resolution."""
    return bool(pipe.components["unet"].config.in_channels == 2 * CHANNELS)


def shrinking(config: Any) -> int:
    """How many times larger the images of a second stage are than those that it enlarges: 4 in the published one."""
    edge = config.sample_size
    return max(2, edge // FIRST_STAGE) if isinstance(edge, int) else 4


def coarse(images: jax.Array, factor: int) -> jax.Array:
    """Images ``[B,H,W,C]`` as a second stage sees those of the first: averaged over squares, and enlarged again."""
    batch, height, width, channels = images.shape
    squares = images.reshape(batch, height // factor, factor, width // factor, factor, channels)
    return enlarged(squares.mean((2, 4)), (height, width))


DEEPFLOYD_IF_TRAINED = PixelFamily()
