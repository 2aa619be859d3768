"""The families of single-file checkpoints: what their tensors do not say, as data, and how a family is recognised.

Sizes are in the tensors. What is not (number of heads, noise schedule, size of the images) is a constant of the
family: a row of :data:`FAMILIES`, with the values of the configurations that were published beside the checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from diffuse_jax.errors import WeightsError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
"""Where the UNet and the autoencoder lie in a file of any family."""

CLASS_LABELS = UNET + "label_emb.weight"
SIZE_LABELS = UNET + "label_emb.0.0.weight"
"""The table of class embeddings of a UNet that has one, and the perceptron of one that is conditioned by sizes."""

V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
"""Empty tensors by which files of a family that predicts noise say that they predict v, and that the last timestep of
their noise schedule is noise alone."""

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
      labels: the key of what the UNet is conditioned by besides time and text: a table of class embeddings
        (:data:`CLASS_LABELS`), sizes (:data:`SIZE_LABELS`), or None.
      linear_projection: the matrices around the UNet's attention are no convolutions.
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
    labels: str | None = None
    linear_projection: bool = True
    penultimate_text: bool = False
    epsilon_sizes: tuple[int, int] | None = None

    @property
    def places(self) -> dict[str, tuple[str, str]]:
        """Component name -> (prefix in the file, name of the table), for every network of a file."""
        return {"unet": (UNET, "unet"), "vae": (VAE, "vae"), **self.text}

    def scheduler_for(self, prediction_type: str, zero_snr: bool) -> dict[str, Any]:
        """The scheduler's configuration; PNDM cannot begin at a timestep that is noise alone, DDIM can."""
        changes = {"prediction_type": prediction_type} | ({"rescale_betas_zero_snr": True} if zero_snr else {})
        base = DDIM if zero_snr and self.scheduler is PNDM else self.scheduler
        return {**base, **changes}


XL = Family(
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
    labels=SIZE_LABELS,
)
V2 = Family(
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
)
V1 = Family(
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
    linear_projection=False,
)
FAMILIES = {
    "xl": XL,
    "xl-refiner": dataclasses.replace(
        XL,
        text={"text_encoder_2": ("conditioner.embedders.0.model.", "openclip")},
        pipelines={4: "StableDiffusionXLImg2ImgPipeline"},
        options={"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
    ),
    "x4-upscaler": dataclasses.replace(
        V2,
        pipelines={7: "StableDiffusionUpscalePipeline"},
        heads=8,
        latent_size=128,
        image_size=256,
        vae_scale=0.08333,
        scheduler=DDIM | X4_BETAS,
        other_schedulers={"low_res_scheduler": LOW_RES},
        options={"max_noise_level": 350},
        labels=CLASS_LABELS,
        epsilon_sizes=None,
    ),
    "v2": V2,
    "v1": V1,
}
"""Families by name; where a file fits several equally well, the first is taken."""

MARKS = {
    "unet": ("input_blocks.0.0.weight", "time_embed.0.weight", "middle_block.1.norm.weight", "out.2.weight"),
    "vae": ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight", "post_quant_conv.weight"),
    "clip": (
        "embeddings.token_embedding.weight",
        "embeddings.position_embedding.weight",
        "encoder.layers.0.self_attn.q_proj.weight",
        "final_layer_norm.weight",
    ),
    "openclip": (
        "token_embedding.weight",
        "positional_embedding",
        "transformer.resblocks.0.attn.in_proj_weight",
        "ln_final.weight",
    ),
}
"""Name of a table -> keys that every network of its kind has. With half of them it is there, if perhaps not whole: what
is missing of it is said when its tensors are matched with its shapes."""

EPSILON_STEPS = {875000}
"""``global_step`` of the files of a family with ``epsilon_sizes`` that predict noise (``2-base``)."""


def judge(
    tensors: Mapping[str, np.ndarray], given: Mapping[str, Mapping[str, Any]]
) -> tuple[str | None, dict[str, list[str]]]:
    """The family of a single file, and what the file lacks for each family.

    Args:
      tensors: what the file holds.
      given: component name -> configuration, or an empty one, of those that come from elsewhere; the file is not asked
        for these.

    Returns:
      A name of :data:`FAMILIES`, or None if every family lacks something; and name -> what is missing, in words.
    """
    lacks = {name: _lacks(family, tensors, given) for name, family in FAMILIES.items()}
    fitting = [name for name, missing in lacks.items() if not missing]
    # The networks of one family may be among those of another, and all text encoders may come from elsewhere.
    best = max(fitting, key=lambda name: _explained(FAMILIES[name], tensors), default=None)
    return best, lacks


def _lacks(family: Family, tensors: Mapping[str, np.ndarray], given: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a file lacks to be of a family."""
    missing = [
        f"{part} ({prefix}*)"
        for part, (prefix, table) in family.places.items()
        if part not in given and not _is_there(tensors, prefix, table)
    ]
    missing += [f"a place for {part}" for part in given if part.startswith("text_encoder") and part not in family.text]
    labels = _labels(tensors, given)
    if labels is not None and family.labels is not None and family.labels not in labels:
        missing.append(family.labels)
    if labels is not None and family.labels != CLASS_LABELS and CLASS_LABELS in labels:
        missing.append(f"a place for {CLASS_LABELS}")
    return missing


def _labels(tensors: Mapping[str, np.ndarray], given: Mapping[str, Mapping[str, Any]]) -> Collection[str] | None:
    """What the UNet is conditioned by besides time and text, by its keys or its configuration; None if unknown."""
    if "unet" not in given:
        return {CLASS_LABELS, SIZE_LABELS} & tensors.keys()
    config = given["unet"]
    sizes, classes = config.get("addition_embed_type") == "text_time", config.get("num_class_embeds") is not None
    return [SIZE_LABELS] * sizes + [CLASS_LABELS] * classes if config else None


def _is_there(tensors: Mapping[str, np.ndarray], prefix: str, table: str) -> bool:
    """Whether a file has a network of a kind at a place, by several of its keys."""
    marks = MARKS[table]
    # The oldest text encoders lie one level deeper than those that were trained further soon after.
    found = [prefix + mark in tensors or f"{prefix}text_model.{mark}" in tensors for mark in marks]
    return 2 * sum(found) >= len(marks)


def _explained(family: Family, tensors: Mapping[str, np.ndarray]) -> tuple[int, bool]:
    """How well a family explains a file that has all that it needs: the networks of the file, the kind of its UNet."""
    networks = sum(_is_there(tensors, prefix, table) for prefix, table in family.text.values())
    projection = tensors.get(UNET + "middle_block.1.proj_in.weight")
    return networks, projection is not None and (projection.ndim == 2) == family.linear_projection


def family_for(networks: Mapping[str, Mapping[str, Any]]) -> str:
    """The family that a pipeline's configurations (component name -> ``config.json``) belong to.

    Raises:
      WeightsError: the original layout has no place for such a pipeline.
    """
    labels = networks.get("unet", {}).get("num_class_embeds") is not None
    for name, family in FAMILIES.items():
        if networks.keys() != family.places.keys() or labels != (family.labels == CLASS_LABELS):
            continue
        if all(_text_table(networks[part]) == table for part, (_, table) in family.text.items()):
            return name
    raise WeightsError(
        f"the components {', '.join(sorted(networks))} fit none of the single-file layouts {', '.join(FAMILIES)}"
    )


def _text_table(config: Mapping[str, Any]) -> str:
    """Which kind of text encoder a ``config.json`` describes; only OpenAI's CLIP has the quick activation."""
    return "clip" if config.get("hidden_act") == "quick_gelu" else "openclip"
