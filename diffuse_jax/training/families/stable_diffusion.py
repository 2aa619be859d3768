"""Training Stable Diffusion 1.x, 2.x and XL: noise of an autoencoder's latents, from CLIP's states of captions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.models import Params
from diffuse_jax.models.autoencoder_kl import Posterior, scale_latents
from diffuse_jax.pipelines import Net
from diffuse_jax.pipelines.families import ClipFamily
from diffuse_jax.pipelines.family import Call
from diffuse_jax.training.families.base import (
    METHODS,
    Arrays,
    Networks,
    TrainedFamily,
    apply,
    normalised,
    pixels_of,
    tokens_of,
)

OF_IF = "only DeepFloyd IF's second stage has it"
OF_WUERSTCHEN = "only a prior of Würstchen learns the maps of an EfficientNet"
OF_KANDINSKY = "only the decoders of Kandinsky 2.2 read embeddings of a prior's image encoder"
OF_LATENTS: Mapping[str, str] = {
    "class_labels_conditioning": OF_IF,
    "validation_images": OF_IF,
    "pretrained_prior_model_name_or_path": OF_KANDINSKY,
    "effnet_path": OF_WUERSTCHEN,
}
"""Settings that make no sense for Stable Diffusion -> what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentFamily(TrainedFamily):
    """Checkpoints with CLIP text encoders, an ``AutoencoderKL`` and a UNet; XL's also has micro-conditioning.

    Attributes:
      text: the family of their pipelines.
    """

    text: ClipFamily
    parts: tuple[str, ...] = ("vae", "controlnet", "adapter")
    methods: tuple[str, ...] = METHODS
    trains_text: bool = True
    image_encoders: tuple[str, ...] = ("vae",)
    encoded_images: tuple[str, ...] = ("moments",)
    borrowed: Any = dataclasses.field(default_factory=lambda: {"vae": "pretrained_vae_model_name_or_path"})
    refused: Any = dataclasses.field(default_factory=lambda: OF_LATENTS)

    def check(self, configs: Mapping[str, Any], what: str) -> None:
        unet, vae = (configs.get(name) for name in ("unet", "vae"))
        if unet and (reason := distilled(unet)):
            raise ValueError(f"{what}; {reason}")
        if unet and vae and unet.in_channels not in (vae.latent_channels, 2 * vae.latent_channels + 1):
            more = unet.in_channels - vae.latent_channels
            advice = {
                1: "; it reads depth maps, which training does not make: train a ControlNet for depth instead",
                3: "; it enlarges images: train the second stage of DeepFloyd IF instead",
                vae.latent_channels: "; it edits images: train/instruct_pix2pix.py starts from one for text to image",
            }.get(more, "")
            raise ValueError(
                f"{what} whose UNet has {unet.in_channels} input channels; this trainer gives it noisy latents alone "
                f"({vae.latent_channels}), as a checkpoint for text to image takes, or with a mask and the latents "
                f"around it ({2 * vae.latent_channels + 1}), as one for inpainting{advice}"
            )

    def multiple(self, pipe: Any) -> int:
        return int(pipe.components["vae"].config.scale)

    def cell(self, pipe: Any) -> int | None:
        return self.multiple(pipe)

    def arrays(self, pipe: Any, true_sizes: bool) -> dict[str, Callable[[Any], np.ndarray]]:
        found: dict[str, Callable[[Any], np.ndarray]] = {"pixel_values": pixels_of}
        if pipe.components["unet"].config.addition_embed_type == "text_time":
            found["time_ids"] = functools.partial(micro_conditioning, true_sizes)
        return found

    def encode_text(self, models: Networks, params: Params, batch: Arrays) -> dict[str, jax.Array]:
        """``states [B,L,D]`` and, for SDXL, ``pooled [B,P]``."""
        nets = tuple(Net(name, models[name]) for name in self.encoders if name in batch and name in models)
        return self.text.encode(nets).encode(params, {"ids": {net.name: batch[net.name] for net in nets}})

    def unconditional(self, pipe: Any) -> dict[str, jax.Array]:
        """The states of the empty prompt, or zeros for a checkpoint whose guidance takes these, as SDXL's does."""
        tokens = {name: jnp.asarray(ids)[None] for name, ids in tokens_of(self.words(pipe), "").items()}
        made = jax.jit(lambda params: self.encode_text(pipe.components, params, tokens))(
            {name: pipe.params[name] for name in tokens}
        )
        zero = self.text.zero_negative is not None and self.text.zero_negative(pipe, Call({}, 1, 1, (0, 0)))
        return jax.tree.map(jnp.zeros_like, made) if zero else made

    def encode_images(self, models: Networks, params: Params, batch: Arrays) -> dict[str, jax.Array]:
        """``moments [B,h,w,2c]``: mean and log variance of the latents."""
        posterior = apply(models, params, "vae", normalised(batch["pixel_values"]), method="encode")
        return {"moments": jnp.concatenate(posterior, -1)}

    def begin(self, models: Networks, params: Params, batch: Arrays, key: jax.Array) -> tuple[jax.Array, Arrays]:
        """Scaled latents ``[B,h,w,c]``, sampled from their distribution."""
        posterior = Posterior(*jnp.split(jnp.asarray(batch["moments"], jnp.float32), 2, axis=-1))
        return scale_latents(posterior.sample(key), models["vae"].config), batch

    def predict(self, models: Networks, params: Params, batch: Arrays, x: jax.Array, t: jax.Array) -> jax.Array:
        added = None
        if "time_ids" in batch:
            added = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}
        inputs = x, t, batch["states"]
        more = control_residuals(models, params, batch, inputs, added)
        if "timestep_cond" in batch:
            more["timestep_cond"] = batch["timestep_cond"]
        return apply(models, params, "unet", *inputs, added, **more)


def distilled(unet: Any) -> str:
    """Why a UNet of this configuration is not trained, if it was made by distillation; empty for others."""
    if (dim := unet.time_cond_proj_dim) is None:
        return ""
    return (
        f"the UNet takes the guidance scale as an input (time_cond_proj_dim={dim}), so it has been distilled before; "
        "give the model that it was distilled from"
    )


def micro_conditioning(true: bool, example: Any) -> np.ndarray:
    """SDXL's ``time_ids [6]`` float32 (Podell et al. 2023, section 2.2): original size, top left of the crop, target
    size.

    All are (height, width) in pixels. Unless they are to be ``true``, the image counts as uncropped and as having the
    target size originally. These are the values at inference, so the model does not associate a handful of training
    images with their original resolution.
    """
    target = example.target_size
    original = (*example.original_size, *example.crop_top_left) if true else (*target, 0, 0)
    return np.array((*original, *target), np.float32)


def control_residuals(
    models: Networks,
    params: Params,
    batch: Arrays,
    inputs: tuple[jax.Array, jax.Array, jax.Array],
    added: Arrays | None,
) -> dict[str, Any]:
    """What the ControlNet or T2I-Adapter adds inside the UNet, by the names of the UNet's arguments; nothing without
    control images.

    ``inputs`` and ``added`` are those of the UNet: the sample, the timesteps and the prompt embeddings, and SDXL's.
    """
    if "conditioning" not in batch:
        return {}
    images = batch["conditioning"].astype(jnp.float32) / 255
    if "adapter" in models:
        return {"down_intrablock_additional_residuals": apply(models, params, "adapter", images)}
    down, middle = apply(models, params, "controlnet", *inputs, images, added)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
