"""Shared code of trainers of latent text-to-image models: networks, prompts, the loss, and saving.

Trainers differ in which parameters they train, in how these are combined with the frozen ones (:data:`Combine`), and in
their data. Stable Diffusion 1.x, 2.x and XL differ only in their text encoders and in the UNet's micro-conditioning.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from diffuse_jax import weights
from diffuse_jax.adapters import tokens
from diffuse_jax.adapters.lora import Adapted
from diffuse_jax.models import AutoencoderKL, Model, Params
from diffuse_jax.models.autoencoder_kl import Posterior, scale_latents
from diffuse_jax.pipelines import PIPELINES, DiffusionPipeline, Net, catalogue
from diffuse_jax.pipelines.catalogue import NOT_LOADED, OPTIONAL
from diffuse_jax.pipelines.families import ClipFamily
from diffuse_jax.schedulers import DDPMScheduler
from diffuse_jax.sharding import param_shardings
from diffuse_jax.text.tokenizer import padded_ids
from diffuse_jax.training.batches import Batch
from diffuse_jax.training.distributed import say
from diffuse_jax.training.networks import warn_of_dropout
from diffuse_jax.training.objective import Objective, draw, errors, noised
from diffuse_jax.training.state import Metrics

Combine = Callable[[Params, Params], tuple[Mapping[str, Any], Params]]
"""``(frozen, trainable) -> (networks, parameters)``, both by component: the rule that distinguishes training
methods."""


def open_pipeline(
    source: str | Path,
    *,
    trainable: Sequence[str],
    mesh: Mesh,
    dtype: DTypeLike = jnp.float32,
    vae_source: str | Path | None = None,
    prediction_type: str | None = None,
    **hub: Any,
) -> DiffusionPipeline:
    """Open a Stable Diffusion pipeline for training: sharded over the mesh, with a :class:`DDPMScheduler`.

    Args:
      source: a folder or a Hub id.
      trainable: components whose parameters are loaded as float32; those of the others are cast to ``dtype``.
      mesh: the mesh that holds the parameters; each device loads only its shard.
      dtype: the dtype in which the networks compute. The autoencoder stays in float32 if the checkpoint requires it
        (``force_upcast``, SDXL).
      vae_source: a folder or Hub id of an autoencoder, or of a pipeline whose ``vae/`` is used instead.
      prediction_type: overrides the prediction type of the checkpoint's scheduler.
      **hub: ``revision``, ``variant``, ``cache_dir`` ... as in :meth:`DiffusionPipeline.from_pretrained`.

    Raises:
      WeightsError: as for :meth:`DiffusionPipeline.from_pretrained`.
      ValueError: the folder contains another kind of pipeline.
    """

    def opened(kind: type[Model], folder: Path, name: str) -> tuple[Model, Params]:
        return _open(kind, folder, name, name in trainable, mesh, dtype, hub.get("variant"))

    return _assembled(source, opened, mesh, vae_source, prediction_type, hub)


def pipeline_of_shapes(
    source: str | Path, *, vae_source: str | Path | None = None, prediction_type: str | None = None, **hub: Any
) -> DiffusionPipeline:
    """The pipeline of :func:`open_pipeline` with the shapes of its parameters in their place.

    It cannot run, but whatever depends on configurations can be checked with it before weights are downloaded or read.
    """

    def shapes(kind: type[Model], folder: Path, name: str) -> tuple[Model, Params]:
        model = kind.from_config(folder)
        return model, model.shapes()

    return _assembled(source, shapes, None, vae_source, prediction_type, hub | {"only_small": True})


def _assembled(
    source: str | Path,
    open_network: Callable[[type[Model], Path, str], tuple[Model, Params]],
    mesh: Mesh | None,
    vae_source: str | Path | None,
    prediction_type: str | None,
    hub: Mapping[str, Any],
) -> DiffusionPipeline:
    """A pipeline of the networks that ``open_network(class, folder, name)`` opens."""
    folder = weights.resolve(source, **hub)
    index = weights.read_index(folder)
    family_of(index.class_name, source)
    refuse_other_inputs(index, source)
    parts: dict[str, Any] = {name: None for name in index.components if name in {*NOT_LOADED, *OPTIONAL}}
    for name, entry in index.components.items():
        if name not in parts and (kind := catalogue.network(entry)) is not None:
            origin = Path(vae_source) if vae_source is not None and name == "vae" else folder
            parts[name] = open_network(kind, component_folder(origin, name, **hub), name)
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    if prediction_type is not None:
        scheduler = scheduler.replace(prediction_type=prediction_type)
    unchecked: dict[str, Any] = {"requires_safety_checker": False}  # images of training are not shown to others
    pipe = DiffusionPipeline.from_pretrained(folder, mesh=mesh, scheduler=scheduler, **unchecked, **parts)
    return dataclasses.replace(pipe, options=index.options)


def family_of(class_name: str, source: Any) -> ClipFamily:
    """The family of a pipeline class.

    Raises:
      ValueError: these trainers do not support the class.
    """
    found = {k.__name__: getattr(k, "family", None) for k in PIPELINES.classes()}
    families = {name: family for name, family in found.items() if isinstance(family, ClipFamily) and family.encoders}
    if class_name not in families:
        raise ValueError(f"{source} is a {class_name}; this trainer supports {', '.join(families)}")
    return families[class_name]


def refuse_other_inputs(index: weights.PipelineIndex, source: Any) -> None:
    """Refuse a checkpoint whose UNet takes more than noisy latents, by its configurations.

    Raises:
      ValueError: it is one for inpainting, editing, depth maps or upscaling.
    """
    kinds = {name: catalogue.network(index.components[name]) for name in ("unet", "vae") if name in index.components}
    found: dict[str, Any] = {
        name: kind.from_config(index.components[name].folder).config for name, kind in kinds.items() if kind
    }
    takes, latents = (found.get(name) for name in ("unet", "vae"))
    if takes and latents and takes.in_channels != latents.latent_channels:
        raise ValueError(
            f"{source} is a {index.class_name} whose UNet has {takes.in_channels} input channels; this trainer gives "
            f"it noisy latents alone ({latents.latent_channels}), as a checkpoint for text to image takes"
        )


def _open(
    kind: type[Model], folder: Path, name: str, trained: bool, mesh: Mesh, dtype: DTypeLike, variant: str | None
) -> tuple[Model, Params]:
    """Open one network that computes in ``dtype``, with its parameters placed on the mesh."""
    model = kind.from_config(folder, dtype=jnp.dtype(dtype))
    say(f"loading {name} ({kind.__name__}) from {folder}")
    if trained:
        warn_of_dropout(model)
    if isinstance(model, AutoencoderKL) and model.config.force_upcast:
        model = model.clone(dtype=jnp.float32)
    kept = jnp.float32 if trained else model.dtype
    _, params = type(model).from_pretrained(
        folder,
        dtype=model.dtype,
        param_dtype=kept,
        variant=variant,
        shardings=param_shardings(model.shapes(), mesh),
    )
    return model, params


def component_folder(source: str | Path, name: str, **hub: Any) -> Path:
    """The folder of a network: the subfolder ``name`` of a pipeline, or ``source`` itself."""
    found = weights.resolve(source, **hub)
    return found / name if (found / name).is_dir() else found


# Combining trainable and frozen parameters


def whole(models: Mapping[str, Any]) -> Combine:
    """Trained networks replace the frozen ones of the same name: full fine-tuning."""
    return lambda frozen, trainable: (models, {**frozen, **trainable})


def with_lora(models: Mapping[str, Any], scale: float = 1.0) -> Combine:
    """Trained low-rank pairs are added to the frozen kernels: LoRA."""

    def combine(frozen: Params, trainable: Params) -> tuple[Mapping[str, Any], Params]:
        return {**models, **{name: Adapted(models[name], pairs, scale) for name, pairs in trainable.items()}}, frozen

    return combine


def with_tokens(models: Mapping[str, Any]) -> Combine:
    """The trained rows are the last token embeddings of the text encoders: textual inversion."""

    def combine(frozen: Params, trainable: Params) -> tuple[Mapping[str, Any], Params]:
        return models, {**frozen, **{name: tokens.combine(frozen[name], rows) for name, rows in trainable.items()}}

    return combine


# From examples to the loss


Tokenizers = Mapping[str, tuple[Any, int]]
"""Name of a text encoder -> its tokenizer and its number of tokens."""


def tokenizers_of(pipe: DiffusionPipeline) -> dict[str, tuple[Any, int]]:
    """The tokenizers of a pipeline's text encoders."""
    used = {}
    for name, tokenizer in pipe.family.encoders.items():
        if pipe.components.get(name) is not None:
            found = pipe.components[tokenizer]
            used[name] = found, min(pipe.components[name].config.max_position_embeddings, found.model_max_length)
    return used


def finish(
    tokenizers: Tokenizers,
    time_ids: Callable[[Any], np.ndarray] | None,
    latents: Callable[[Any], Batch] | None,
    texts: Callable[[Any], Batch] | None,
    example: Any,
) -> Batch:
    """The arrays of one :class:`~diffuse_jax.training.data.Example`; runs in the data workers.

    Args:
      tokenizers: the tokenizers, which make token ids int32 ``[L]`` under each text encoder's name.
      time_ids: makes SDXL's ``time_ids``; None for other models.
      latents: a cache that replaces ``pixel_values`` and ``conditioning`` uint8 ``[h,w,3]`` (and ``time_ids``); None
        without one.
      texts: a cache that replaces the token ids; None without one.
      example: the image and its caption.
    """
    arrays: Batch = {}
    if example.keeps_conditioning is not None:
        arrays["keeps_conditioning"] = np.bool_(example.keeps_conditioning)
    if texts is None:
        arrays |= {name: token_ids(*tokenizer, example.caption) for name, tokenizer in tokenizers.items()}
    else:
        arrays |= texts(example)
    if latents is not None:
        return arrays | latents(example)
    arrays["pixel_values"] = example.pixels
    if example.conditioning is not None:
        arrays["conditioning"] = example.conditioning
    return arrays if time_ids is None else arrays | {"time_ids": time_ids(example)}


def token_ids(tokenizer: Any, length: int, text: str) -> np.ndarray:
    """Token ids int32 ``[length]``, truncated and padded; words with several embeddings are expanded to all tokens."""
    return padded_ids(tokenizer, [tokens.expand_words(text, tokenizer)], length)[0]


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


def denoising_loss(
    family: ClipFamily,
    combine: Combine,
    objective: Objective,
    trainable: Params,
    frozen: Params,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
) -> tuple[jax.Array, Metrics]:
    """Squared error of the UNet at random timesteps of sampled latents (Rombach et al. 2022, eq. 2).

    ``batch`` has ``pixel_values [B,H,W,3]`` (uint8, or float32 in [-1, 1]) or ``moments [B,h,w,2c]`` of the latents'
    distribution; token ids ``[B,L]`` under each text encoder's name, or the prompt embeddings ``states [B,L,D]`` and,
    for SDXL, ``pooled [B,P]``; for SDXL ``time_ids [B,6]``; with prior preservation ``prior [B]``; for a ControlNet or
    T2I-Adapter the images ``conditioning [B,H,W,3]`` uint8; and for a UNet that edits images what
    :func:`beside_condition` reads.
    """
    models, params = combine(frozen, trainable)
    k_latent, k_draw = jax.random.split(key)
    x0 = latents(models["vae"], params.get("vae"), batch, k_latent)
    text = prompt_embeddings(family, models, params, batch)
    added = None
    if "time_ids" in batch:
        added = {"text_embeds": text["pooled"], "time_ids": batch["time_ids"]}
    drawn = draw(objective, k_draw, x0)
    x = noised(objective, x0, drawn)
    inputs = beside_condition(models, params, batch, x), drawn.t, text["states"]
    control = control_residuals(models, params, batch, inputs, added)
    prediction = models["unet"].apply({"params": params["unet"]}, *inputs, added, **control)
    return errors(objective, prediction, x0, drawn, batch.get("prior"))


def control_residuals(
    models: Mapping[str, Any],
    params: Params,
    batch: Mapping[str, jax.Array],
    inputs: tuple[jax.Array, jax.Array, jax.Array],
    added: Mapping[str, jax.Array] | None,
) -> dict[str, Any]:
    """What the ControlNet or T2I-Adapter adds inside the UNet, by the names of the UNet's arguments; nothing without
    control images.

    ``inputs`` and ``added`` are those of the UNet: the sample, the timesteps and the prompt embeddings, and SDXL's.
    """
    if "conditioning" not in batch or not reads_control(models):
        return {}
    images = batch["conditioning"].astype(jnp.float32) / 255
    if "adapter" in models:
        features = models["adapter"].apply({"params": params["adapter"]}, images)
        return {"down_intrablock_additional_residuals": features}
    down, middle = models["controlnet"].apply({"params": params["controlnet"]}, *inputs, images, added)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def reads_control(models: Mapping[str, Any]) -> bool:
    """Whether a ControlNet or T2I-Adapter reads the control images; otherwise the UNet reads their latents."""
    return "controlnet" in models or "adapter" in models


def beside_condition(
    models: Mapping[str, Any], params: Params, batch: Mapping[str, jax.Array], x: jax.Array
) -> jax.Array:
    """Noisy latents ``[B,h,w,c]`` and the original images as a UNet that edits takes them (Brooks et al. 2023):
    ``[B,h,w,2c]``; the noisy latents alone without such images.

    ``batch`` has the images ``conditioning [B,H,W,3]`` uint8, or from a cache ``image_condition [B,h,w,c]``, the most
    likely latents, not scaled. Where ``keeps_conditioning [B]`` is False, these are zero.
    """
    if "image_condition" in batch:
        found = jnp.asarray(batch["image_condition"], jnp.float32)
    elif "conditioning" in batch and not reads_control(models):
        found = encoded_condition(models["vae"], params["vae"], batch["conditioning"])
    else:
        return x
    if "keeps_conditioning" in batch:
        found = jnp.where(batch["keeps_conditioning"][:, None, None, None], found, 0.0)
    return jnp.concatenate([x, found], -1)


def encoded_condition(vae: Any, params: Params | None, images: jax.Array) -> jax.Array:
    """The most likely latents ``[B,h,w,c]`` float32 of images uint8 ``[B,H,W,3]``, not scaled."""
    return vae.apply({"params": params}, normalised(images), method="encode").mode().astype(jnp.float32)


def latents(vae: Any, params: Params | None, batch: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
    """Scaled latents ``[B,h,w,c]`` float32, sampled from their distribution."""
    if "moments" in batch:
        moments = jnp.asarray(batch["moments"], jnp.float32)
        posterior = Posterior(*jnp.split(moments, 2, axis=-1))
    else:
        posterior = vae.apply({"params": params}, normalised(batch["pixel_values"]), method="encode")
    return scale_latents(posterior.sample(key), vae.config)


def normalised(pixels: jax.Array) -> jax.Array:
    """uint8 pixels as float32 in [-1, 1]; other dtypes unchanged."""
    return pixels.astype(jnp.float32) / 127.5 - 1 if pixels.dtype == jnp.uint8 else pixels


def prompt_embeddings(
    family: ClipFamily, models: Mapping[str, Any], params: Params, batch: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Prompt embeddings ``states [B,L,D]`` and, for SDXL, ``pooled [B,P]``: those of the batch, or from its token
    ids."""
    if "states" in batch:
        return {name: batch[name] for name in ("states", "pooled") if name in batch}
    nets = tuple(Net(name, models[name]) for name in family.encoders if name in batch and name in models)
    return family.encode(nets).encode(params, {"ids": {net.name: batch[net.name] for net in nets}})


def loss_of(pipe: DiffusionPipeline, combine: Combine, objective: Objective) -> Callable[..., Any]:
    """:func:`denoising_loss` of a pipeline, in the form that :func:`~diffuse_jax.training.state.make_step` takes."""
    return functools.partial(denoising_loss, pipe.family, combine, objective)


def networks(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The pipeline's networks by name: the text encoders in their order, the UNet, the autoencoder and, if it has one,
    the ControlNet or T2I-Adapter."""
    names = [*pipe.family.encoders, "unet", "vae", "controlnet", "adapter"]
    return {name: pipe.components[name] for name in names if pipe.components.get(name) is not None}


# Saving and validation


def save_networks(pipe: DiffusionPipeline, folder: Path, params: Mapping[str, Params]) -> None:
    """Write trained networks in inference format to ``folder/unet`` and so on."""
    for name, network_params in params.items():
        pipe.components[name].save_pretrained(folder / name, network_params)


def sample_images(pipe: DiffusionPipeline, prompts: Iterable[str], **options: Any) -> list[tuple[str, Any]]:
    """Generate validation images in one call of the pipeline, as pairs ``(prompt, PIL image)``."""
    texts = list(prompts)
    per = options.get("num_images_per_prompt", 1)
    images = pipe(texts, **options).images
    return [(texts[i // per], image) for i, image in enumerate(images)]
