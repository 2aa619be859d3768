"""The training steps that are measured, as shapes: published architectures, what is trained, and a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.adapters import lora
from diffuse_jax.models import AutoencoderKL, Model, UNet2DConditionModel, presets
from diffuse_jax.pipelines import stable_diffusion, stable_diffusion_xl
from diffuse_jax.schedulers import DDPMScheduler
from diffuse_jax.text import CLIPTextModel, CLIPTextModelWithProjection
from diffuse_jax.text import presets as text_presets
from diffuse_jax.training.latent import denoising_loss, whole, with_lora
from diffuse_jax.training.objective import Objective
from diffuse_jax.training.state import Loss

MODELS = ("sd15", "sdxl")
METHODS = ("full", "lora")
SMALL: dict[str, Any] = {
    "block_out_channels": (320, 640),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
"""What ``small`` changes of SD 1.5's UNet: for trying a script out."""

SCHEDULE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class Trainer(NamedTuple):
    """A training step without numbers."""

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
    """What ``train/text_to_image.py`` (``full``) and ``train/text_to_image_lora.py`` (``lora``) make of a checkpoint.

    Args:
      model: "sd15", "sdxl", or "small", a UNet of two levels in place of SD 1.5's.
      method: "full" trains the UNet's parameters, "lora" low-rank pairs beside its attention.
      dtype: what networks compute in; an autoencoder whose config has ``force_upcast`` stays in float32.
      remat: of the UNet.
      rank: of LoRA.
      cached: latents and text states come with the batch, so only the UNet is there.
      width: what the UNet's channels are divided by, for machines that are too small for it.
    """
    networks, encode = _networks(model, dtype, remat)
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
    return Trainer(networks, trainable, frozen, functools.partial(denoising_loss, encode, combine, objective))


def _networks(model: str, dtype: DTypeLike, remat: str) -> tuple[dict[str, Model], Callable[..., Any]]:
    """Networks by name, text encoders first, and how their outputs become the UNet's conditions."""
    clip = CLIPTextModel(text_presets.CLIP_L, dtype=dtype)
    if model == "sdxl":
        unet = UNet2DConditionModel(presets.SDXL_UNET, dtype=dtype, remat=remat)
        second = CLIPTextModelWithProjection(text_presets.OPENCLIP_BIGG, dtype=dtype)
        vae = AutoencoderKL(presets.SDXL_VAE)
        return {"text_encoder": clip, "text_encoder_2": second, "unet": unet, "vae": vae}, stable_diffusion_xl.encode
    config = presets.SD15_UNET.replace(**SMALL) if model == "small" else presets.SD15_UNET
    unet = UNet2DConditionModel(config, dtype=dtype, remat=remat)
    return {"text_encoder": clip, "unet": unet, "vae": AutoencoderKL(presets.SD_VAE)}, stable_diffusion.encode


def _narrowed(unet: Model, width: int) -> Model:
    channels = tuple(c // width for c in unet.config.block_out_channels)
    return unet.clone(config=unet.config.replace(block_out_channels=channels))


def batch_shapes(model: str, batch: int, pixels: int, *, cached: bool = False) -> Mapping[str, jax.ShapeDtypeStruct]:
    """A batch as the data loaders make it, without the leading axis of accumulation steps."""
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct((batch, *s), dtype)
    names = ("text_encoder", "text_encoder_2") if model == "sdxl" else ("text_encoder",)
    arrays = {"time_ids": shape(6)} if model == "sdxl" else {}
    if not cached:
        ids = {name: shape(77, dtype=jnp.int32) for name in names}
        return arrays | ids | {"pixel_values": shape(pixels, pixels, 3, dtype=jnp.uint8)}
    arrays |= {"pooled": shape(1280)} if model == "sdxl" else {}
    states = shape(77, 2048 if model == "sdxl" else 768)
    return arrays | {"states": states, "moments": shape(pixels // 8, pixels // 8, 8)}
