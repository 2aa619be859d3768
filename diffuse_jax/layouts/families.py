"""The families of single-file checkpoints: their constants as data, and how a family is identified.

Sizes are read from the tensors. What tensors do not imply (number of heads, noise schedule, image size) is a constant
of the family: an entry of :data:`FAMILIES`, with values from the configurations published with the checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from diffuse_jax.errors import WeightsError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
"""Prefixes of the UNet's and the autoencoder's keys in every family."""

CLASS_LABELS = UNET + "label_emb.weight"
SIZE_LABELS = UNET + "label_emb.0.0.weight"
"""A UNet's class embedding table, and its MLP for SDXL's micro-conditioning."""

SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COMMON = {"num_train_timesteps": 1000, "trained_betas": None, "steps_offset": 1, "timestep_spacing": "leading"}
PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False, **COMMON, **SCALED_LINEAR}
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False, **COMMON, **SCALED_LINEAR}
TRAILING_EULER = {
    "_class_name": "EulerDiscreteScheduler",
    **COMMON,
    **SCALED_LINEAR,
    "timestep_spacing": "trailing",
}
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
"""The scheduler that adds noise to the upscaler's low-resolution input."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family's checkpoints have in common but their tensors do not imply.

    Attributes:
      text: text encoder name -> (prefix in the file, a name of :data:`diffuse_jax.layouts.original.TABLES`).
      others: the same for networks besides UNet, autoencoder and text encoders.
      pipelines: number of UNet input channels -> pipeline class.
      heads: number of attention heads at every level, or None for one per 64 channels.
      prediction_type: the default, unless the file or the caller says otherwise.
      latent_size: ``sample_size`` of the UNet.
      image_size: ``sample_size`` of the autoencoder.
      vae_scale: ``scaling_factor`` of the autoencoder.
      scheduler: the scheduler's configuration, without ``prediction_type``.
      other_schedulers: component name -> configuration of any further scheduler.
      options: further values of ``model_index.json``.
      labels: the key of the UNet's conditioning besides time and text: a class embedding table
        (:data:`CLASS_LABELS`), micro-conditioning (:data:`SIZE_LABELS`), or None.
      linear_projection: whether the projections around the UNet's attention are linear rather than convolutions.
      penultimate_text: whether prompts are encoded by the penultimate layer, so that the last one is unused.
      epsilon_sizes: (latent, image) ``sample_size`` of the family's checkpoints that predict noise, where the family
        predicts v; or None.
      epsilon_channels: numbers of UNet input channels whose checkpoints predict noise, where the family predicts v.
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
    epsilon_channels: Collection[int] = ()
    others: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)

    @property
    def places(self) -> dict[str, tuple[str, str]]:
        """Component name -> (prefix in the file, name of the table), for every network."""
        return {"unet": (UNET, "unet"), "vae": (VAE, "vae"), **self.text, **self.others}


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
    pipelines={4: "StableDiffusionPipeline", 9: "StableDiffusionInpaintPipeline"},
    heads=None,
    prediction_type="v_prediction",
    latent_size=96,
    image_size=768,
    vae_scale=0.18215,
    scheduler=DDIM,
    penultimate_text=True,
    epsilon_sizes=(64, 512),
    epsilon_channels=(9,),
)
V2_EPSILON = dataclasses.replace(
    V2, prediction_type="epsilon", latent_size=64, image_size=512, epsilon_sizes=None, epsilon_channels=()
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
        epsilon_channels=(),
    ),
    "v2": V2,
    "v2-depth": dataclasses.replace(
        V2_EPSILON,
        pipelines={5: "StableDiffusionDepth2ImgPipeline"},
        scheduler=PNDM,
        others={"depth_estimator": ("depth_model.model.", "midas")},
    ),
    "v2-turbo": dataclasses.replace(
        V2_EPSILON,
        text={"text_encoder": ("conditioner.embedders.0.model.", "openclip")},
        pipelines={4: "StableDiffusionPipeline"},
        scheduler=TRAILING_EULER,
    ),
    "v1": V1,
}
"""Families by name; if a file fits several equally well, the first is taken."""

MARKERS = {
    "unet": ("input_blocks.0.0.weight", "time_embed.0.weight", "input_blocks.1.0.in_layers.2.weight", "out.2.weight"),
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
    "midas": (
        "pretrained.model.cls_token",
        "pretrained.model.pos_embed",
        "scratch.layer1_rn.weight",
        "scratch.output_conv.0.weight",
    ),
}
"""Name of a table -> keys that every network of its kind has. Half of them are enough to count as present; if the
network is incomplete, the error comes when its tensors are matched against its shapes."""

EPSILON_STEPS = {875000}
"""``global_step`` of the files that predict noise in a family with ``epsilon_sizes`` (``2-base``)."""


def identify(
    tensors: Mapping[str, np.ndarray], given: Mapping[str, Mapping[str, Any]]
) -> tuple[str | None, dict[str, list[str]]]:
    """The family of a single file, and what the file lacks for each family.

    Args:
      tensors: the file's tensors.
      given: component name -> configuration (may be empty) of the components that the caller provides; the file need
        not contain these.

    Returns:
      A name of :data:`FAMILIES`, or None if something is missing for every family; and a dict from each name to
      descriptions of what is missing.
    """
    lacks = {name: _lacks(family, tensors, given) for name, family in FAMILIES.items()}
    fitting = [name for name, missing in lacks.items() if not missing]
    # One family's networks may be a subset of another's, and the caller may provide all text encoders.
    best = max(fitting, key=lambda name: _fit(FAMILIES[name], tensors, given), default=None)
    return best, lacks


def _lacks(family: Family, tensors: Mapping[str, np.ndarray], given: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a file lacks to belong to a family."""
    missing = [
        f"{part} ({prefix}*)"
        for part, (prefix, table) in family.places.items()
        if part not in given and not _is_there(tensors, prefix, table)
    ]
    missing += [f"a place for {part}" for part in given if part.startswith("text_encoder") and part not in family.text]
    labels = _labels(tensors, given)
    if labels is not None and family.labels is not None and family.labels not in labels:
        missing.append(family.labels)
    missing += [f"a place for {label}" for label in labels or () if label != family.labels]
    return missing


def _labels(tensors: Mapping[str, np.ndarray], given: Mapping[str, Mapping[str, Any]]) -> Collection[str] | None:
    """The UNet's conditioning besides time and text, from its keys or its configuration; None if unknown."""
    if "unet" not in given:
        return {CLASS_LABELS, SIZE_LABELS} & tensors.keys()
    config = given["unet"]
    sizes, classes = config.get("addition_embed_type") == "text_time", config.get("num_class_embeds") is not None
    return [SIZE_LABELS] * sizes + [CLASS_LABELS] * classes if config else None


def _is_there(tensors: Mapping[str, np.ndarray], prefix: str, table: str) -> bool:
    """Whether a file has a network of this kind under a prefix, judged by several of its keys."""
    markers = MARKERS[table]
    # Some text encoders have a ``text_model`` level in their names, others do not.
    found = [prefix + marker in tensors or f"{prefix}text_model.{marker}" in tensors for marker in markers]
    return 2 * sum(found) >= len(markers)


def _fit(
    family: Family, tensors: Mapping[str, np.ndarray], given: Mapping[str, Mapping[str, Any]]
) -> tuple[int, bool, bool]:
    """How well a complete file fits a family: the number of its networks, and whether the kind and the input channels
    of its UNet agree."""
    networks = sum(_is_there(tensors, prefix, table) for prefix, table in family.places.values())
    projections = (a for key, a in tensors.items() if key.startswith(UNET) and key.endswith(".proj_in.weight"))
    projection, first = next(projections, None), tensors.get(f"{UNET}input_blocks.0.0.weight")
    channels = given.get("unet", {}).get("in_channels") if first is None or first.ndim != 4 else first.shape[1]
    linear = projection is not None and (projection.ndim == 2) == family.linear_projection
    return networks, linear, channels in family.pipelines


def family_for(
    networks: Mapping[str, Mapping[str, Any]], schedulers: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """The family that a pipeline's configurations (component name -> ``config.json``) belong to.

    Args:
      networks: the configurations of its networks.
      schedulers: those of its schedulers, which distinguish families with the same networks.

    Raises:
      WeightsError: the original layout cannot hold such a pipeline.
    """
    labels = networks.get("unet", {}).get("num_class_embeds")
    fitting = []
    for name, family in FAMILIES.items():
        if networks.keys() != family.places.keys() or (labels is not None) != (family.labels == CLASS_LABELS):
            continue
        if all(_text_table(networks[part]) == table for part, (_, table) in family.text.items()):
            fitting.append(name)
    if not fitting:
        raise WeightsError(
            f"the components {', '.join(sorted(networks))} fit none of the single-file layouts {', '.join(FAMILIES)}"
        )
    sampler = (schedulers or {}).get("scheduler", {})
    predicts = sampler.get("prediction_type", "epsilon")
    own = (
        name
        for name in fitting
        if FAMILIES[name].prediction_type == predicts and FAMILIES[name].scheduler.items() <= sampler.items()
    )
    return next(own, fitting[0])


def _text_table(config: Mapping[str, Any]) -> str:
    """The kind of text encoder that a ``config.json`` describes; only OpenAI's CLIP uses ``quick_gelu``."""
    return "clip" if config.get("hidden_act") == "quick_gelu" else "openclip"
