"""The training steps to measure, as shapes: published architectures, what is trained, and a batch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.adapters import lora
from diffuse_jax.models import AutoencoderKL, Model, UNet2DConditionModel, presets
from diffuse_jax.pipelines.families import STABLE_DIFFUSION, STABLE_DIFFUSION_XL, ClipFamily
from diffuse_jax.schedulers import DDPMScheduler
from diffuse_jax.text import CLIPTextModel, CLIPTextModelWithProjection
from diffuse_jax.text import presets as text_presets
from diffuse_jax.training.families import LatentFamily
from diffuse_jax.training.latent import denoising_loss, whole, with_lora
from diffuse_jax.training.objective import Objective
from diffuse_jax.training.state import Loss

METHODS = ("full", "lora")
MODELS: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {
    "sd15": (presets.SD15_UNET, presets.SD_VAE, (text_presets.CLIP_L,)),
    "sdxl": (presets.SDXL_UNET, presets.SDXL_VAE, (text_presets.CLIP_L, text_presets.OPENCLIP_BIGG)),
    "small": (
        presets.SD15_UNET.replace(
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=32,
        ),
        presets.SD_VAE.replace(block_out_channels=(32,) * 4, layers_per_block=1),
        (
            text_presets.CLIP_L.replace(
                hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=32
            ),
        ),
    ),
}
"""Configs of UNet, autoencoder and text encoders; ``small`` is for quick trials."""

SCHEDULE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class Trainer(NamedTuple):
    """A training step without values."""

    networks: dict[str, Model]
    trainable: Any  # shapes, float32
    frozen: Any  # shapes, in the dtype that the trainers keep them in
    loss: Loss


def make_trainer(
    model: str,
    method: str,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    rank: int = 4,
    cached: bool = False,
    width: int = 1,
) -> Trainer:
    """The training step of ``train/text_to_image.py`` (``full``) or ``train/text_to_image_lora.py`` (``lora``).

    Args:
      model: one of :data:`MODELS`.
      method: "full" trains the UNet's parameters, "lora" LoRA pairs on its attention layers.
      dtype: the dtype of computations; an autoencoder whose config has ``force_upcast`` stays in float32.
      remat: remat policy of the UNet.
      rank: LoRA rank.
      cached: latents and prompt embeddings come with the batch, so only the UNet is present.
      width: divisor of the UNet's channels, for machines that are too small for it.
    """
    networks, family = _networks(model, dtype, remat)
    if width > 1:
        networks["unet"] = _narrowed(networks["unet"], width)
    used = {"unet": networks["unet"]} if cached else networks
    parameters = {name: network.clone(param_dtype=network.dtype).shapes() for name, network in used.items()}
    if method == "lora":
        pairs = jax.eval_shape(lambda: lora.init(networks["unet"].shapes(), rank, jax.random.key(0)))
        trainable, frozen, combine = {"unet": pairs}, parameters, with_lora(networks)
    else:
        del parameters["unet"]
        trainable, frozen, combine = {"unet": networks["unet"].shapes()}, parameters, whole(networks)
    objective = Objective(scheduler=DDPMScheduler(**SCHEDULE))
    learned = LatentFamily(text=family, encoders=family.encoders)
    return Trainer(networks, trainable, frozen, functools.partial(denoising_loss, learned, combine, objective))


def _networks(model: str, dtype: DTypeLike, remat: str) -> tuple[dict[str, Model], ClipFamily]:
    """Networks by name, text encoders first, and their family."""
    unet, vae, (first, *second) = MODELS[model]
    networks: dict[str, Model] = {"text_encoder": CLIPTextModel(first, dtype=dtype)}
    if second:
        networks["text_encoder_2"] = CLIPTextModelWithProjection(*second, dtype=dtype)
    networks |= {"unet": UNet2DConditionModel(unet, dtype=dtype, remat=remat), "vae": AutoencoderKL(vae)}
    return networks, STABLE_DIFFUSION_XL if second else STABLE_DIFFUSION


def _narrowed(unet: Model, width: int) -> Model:
    channels = tuple(c // width for c in unet.config.block_out_channels)
    return unet.clone(config=unet.config.replace(block_out_channels=channels))


def batch_shapes(model: str, batch: int, pixels: int, *, cached: bool = False) -> Mapping[str, jax.ShapeDtypeStruct]:
    """A batch as the data loaders produce it, without the leading axis of accumulation steps."""
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct((batch, *s), dtype)
    unet, _, encoders = MODELS[model]
    arrays = {"time_ids": shape(6), "pooled": shape(encoders[1].projection_dim)} if len(encoders) > 1 else {}
    if cached:
        return arrays | {"states": shape(77, unet.cross_attention_dim), "moments": shape(pixels // 8, pixels // 8, 8)}
    arrays.pop("pooled", None)
    ids = {name: shape(77, dtype=jnp.int32) for name in ("text_encoder", "text_encoder_2")[: len(encoders)]}
    return arrays | ids | {"pixel_values": shape(pixels, pixels, 3, dtype=jnp.uint8)}
