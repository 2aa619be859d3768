"""The families of single-file checkpoints: what their tensors do not say, as data, and how a family is recognised.

Sizes are in the tensors. What is not (number of heads, noise schedule, size of the images) is a constant of the
family: a row of :data:`FAMILIES`, with the values of the configurations that were published beside the checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from diffuse_jax.errors import WeightsError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
"""Where the UNet and the autoencoder lie in a file of any family."""

CLASS_LABELS = UNET + "label_emb.weight"
"""The table of class embeddings of a UNet that has one."""

SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COMMON = {"num_train_timesteps": 1000, "trained_betas": None, "steps_offset": 1, "timestep_spacing": "leading"}
PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False, **COMMON, **SCALED_LINEAR}
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False, **COMMON, **SCALED_LINEAR}
EULER = {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", **COMMON, **SCALED_LINEAR}
X4_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}
LOW_RES = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": True,
    "variance_type": "fixed_small",
    **X4_BETAS,
}
"""What adds noise to the image that the upscaler enlarges."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What the checkpoints of a family have in common and their tensors do not say.

    Attributes:
      text: component name -> (prefix in the file, a name of :data:`diffuse_jax.layouts.original.TABLES`).
      pipelines: number of the UNet's input channels -> pipeline class.
      heads: number of attention heads at every level, or None for one for each 64 channels.
      prediction_type: unless the file or the caller says otherwise.
      latent_size: ``sample_size`` of the UNet.
      image_size: ``sample_size`` of the autoencoder.
      vae_scale: ``scaling_factor`` of the autoencoder.
      scheduler: the scheduler's configuration, without ``prediction_type``.
      other_schedulers: component name -> configuration of a scheduler beside it.
      options: further values of ``model_index.json``.
      class_labels: the UNet has a table of class embeddings (:data:`CLASS_LABELS`).
      penultimate_text: the text encoder is read at its last layer but one, and the last one is not used.
      epsilon_sizes: (latent, image) ``sample_size`` of those checkpoints of the family that predict noise although the
        family predicts v, or None.
    """

    text: Mapping[str, tuple[str, str]]
    pipelines: Mapping[int, str]
    heads: int | None
    prediction_type: str
    latent_size: int
    image_size: int
    vae_scale: float
    scheduler: Mapping[str, Any]
    other_schedulers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    class_labels: bool = False
    penultimate_text: bool = False
    epsilon_sizes: tuple[int, int] | None = None

    @property
    def places(self) -> dict[str, tuple[str, str]]:
        """Component name -> (prefix in the file, name of the table), for every network of a file."""
        return {"unet": (UNET, "unet"), "vae": (VAE, "vae"), **self.text}


FAMILIES = {
    "xl": Family(
        text={
            "text_encoder": ("conditioner.embedders.0.transformer.", "clip"),
            "text_encoder_2": ("conditioner.embedders.1.model.", "openclip"),
        },
        pipelines={
            4: "StableDiffusionXLPipeline",
            8: "StableDiffusionXLInstructPix2PixPipeline",
            9: "StableDiffusionXLInpaintPipeline",
        },
        heads=None,
        prediction_type="epsilon",
        latent_size=128,
        image_size=1024,
        vae_scale=0.13025,
        scheduler=EULER,
        options={"force_zeros_for_empty_prompt": True},
    ),
    "xl-refiner": Family(
        text={"text_encoder_2": ("conditioner.embedders.0.model.", "openclip")},
        pipelines={4: "StableDiffusionXLImg2ImgPipeline"},
        heads=None,
        prediction_type="epsilon",
        latent_size=128,
        image_size=1024,
        vae_scale=0.13025,
        scheduler=EULER,
        options={"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
    ),
    "x4-upscaler": Family(
        text={"text_encoder": ("cond_stage_model.model.", "openclip")},
        pipelines={7: "StableDiffusionUpscalePipeline"},
        heads=8,
        prediction_type="v_prediction",
        latent_size=128,
        image_size=256,
        vae_scale=0.08333,
        scheduler=DDIM | X4_BETAS,
        other_schedulers={"low_res_scheduler": LOW_RES},
        options={"max_noise_level": 350},
        class_labels=True,
        penultimate_text=True,
    ),
    "v2": Family(
        text={"text_encoder": ("cond_stage_model.model.", "openclip")},
        pipelines={
            4: "StableDiffusionPipeline",
            5: "StableDiffusionDepth2ImgPipeline",
            9: "StableDiffusionInpaintPipeline",
        },
        heads=None,
        prediction_type="v_prediction",
        latent_size=96,
        image_size=768,
        vae_scale=0.18215,
        scheduler=DDIM,
        penultimate_text=True,
        epsilon_sizes=(64, 512),
    ),
    "v1": Family(
        text={"text_encoder": ("cond_stage_model.transformer.", "clip")},
        pipelines={
            4: "StableDiffusionPipeline",
            8: "StableDiffusionInstructPix2PixPipeline",
            9: "StableDiffusionInpaintPipeline",
        },
        heads=8,
        prediction_type="epsilon",
        latent_size=64,
        image_size=512,
        vae_scale=0.18215,
        scheduler=PNDM,
    ),
}
"""Families by name, in the order in which :func:`family_of` tries them."""

EPSILON_STEPS = {875000}
"""``global_step`` of the files of a family with ``epsilon_sizes`` that predict noise (``2-base``)."""


def family_of(keys: Collection[str]) -> str | None:
    """The family of a single file, by the places of its text encoders and of the class embedding."""
    for name, family in FAMILIES.items():
        if family.class_labels and CLASS_LABELS not in keys:
            continue
        if all(any(key.startswith(prefix) for key in keys) for prefix, _ in family.text.values()):
            return name
    return None


def family_for(networks: Mapping[str, Mapping[str, Any]]) -> str:
    """The family that a pipeline's configurations (component name -> ``config.json``) belong to.

    Raises:
      WeightsError: the original layout has no place for such a pipeline.
    """
    labels = networks.get("unet", {}).get("num_class_embeds") is not None
    for name, family in FAMILIES.items():
        if networks.keys() != family.places.keys() or labels != family.class_labels:
            continue
        if all(_text_table(networks[part]) == table for part, (_, table) in family.text.items()):
            return name
    raise WeightsError(
        f"the components {', '.join(sorted(networks))} fit none of the single-file layouts {', '.join(FAMILIES)}"
    )


def _text_table(config: Mapping[str, Any]) -> str:
    """Which kind of text encoder a ``config.json`` describes; only OpenAI's CLIP has the quick activation."""
    return "clip" if config.get("hidden_act") == "quick_gelu" else "openclip"
