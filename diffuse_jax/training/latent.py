"""What trainers of latent text-to-image models share: networks, prompts, the loss, and what is written.

A trainer differs in which numbers it trains and how they combine with the frozen ones (:data:`Combine`), and in its
pictures. Stable Diffusion 1.x, 2.x and XL differ only in their text encoders and in what the UNet is told of sizes.
"""

from __future__ import annotations

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
from diffuse_jax.pipelines.catalogue import NOT_LOADED
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
"""``(frozen, trainable) -> (networks, parameters)``, both by component: the rule that tells training methods apart."""


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
    """A Stable Diffusion pipeline for training: cut over the mesh, with a :class:`DDPMScheduler`.

    Args:
      source: a folder or a Hub id.
      trainable: components whose parameters are read as float32; those of the others are cast to ``dtype``.
      mesh: where parameters go; each device reads its part only.
      dtype: what networks compute in. The autoencoder of a checkpoint that asks for it (``force_upcast``, SDXL) stays
        in float32.
      vae_source: a folder or Hub id whose ``vae/`` (or which itself) replaces the autoencoder.
      prediction_type: what the UNet shall predict, instead of what the checkpoint says.
      **hub: ``revision``, ``variant``, ``cache_dir`` ... as in :meth:`DiffusionPipeline.from_pretrained`.

    Raises:
      WeightsError: as :meth:`DiffusionPipeline.from_pretrained`.
      ValueError: the folder holds another kind of pipeline.
    """
    folder = weights.resolve(source, **hub)
    index = weights.read_index(folder)
    family_of(index.class_name, source)
    parts: dict[str, Any] = {}
    for name, entry in index.components.items():
        if (kind := catalogue.network(entry)) is not None:
            own = Path(vae_source) if vae_source is not None and name == "vae" else folder
            parts[name] = _open(kind, own, name, name in trainable, mesh, dtype, hub)
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    if prediction_type is not None:
        scheduler = scheduler.replace(prediction_type=prediction_type)
    parts |= {name: None for name in index.components if name in NOT_LOADED}
    return DiffusionPipeline.from_pretrained(folder, mesh=mesh, scheduler=scheduler, **parts)


def family_of(class_name: str, source: Any) -> ClipFamily:
    """The family of a pipeline's class.

    Raises:
      ValueError: it has none that these trainers are for.
    """
    families = {k.__name__: k.family for k in PIPELINES.classes() if isinstance(getattr(k, "family", None), ClipFamily)}
    if class_name not in families:
        raise ValueError(f"{source} is a {class_name}; this trainer is for {', '.join(families)}")
    return families[class_name]


def _open(
    kind: type[Model], source: Path, name: str, trained: bool, mesh: Mesh, dtype: DTypeLike, hub: Mapping[str, Any]
) -> tuple[Model, Params]:
    """One network, computing in ``dtype``, its parameters placed on the mesh."""
    folder = component_folder(source, name, **hub)
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
        variant=hub.get("variant"),
        shardings=param_shardings(model.shapes(), mesh),
    )
    return model, params


def component_folder(source: str | Path, name: str, **hub: Any) -> Path:
    """Where a network lies: in the folder ``name`` of a pipeline, or alone."""
    found = weights.resolve(source, **hub)
    return found / name if (found / name).is_dir() else found


# How trainable numbers combine with frozen ones


def whole(models: Mapping[str, Any]) -> Combine:
    """Trained networks replace the frozen ones of their name: full fine-tuning."""
    return lambda frozen, trainable: (models, {**frozen, **trainable})


def with_lora(models: Mapping[str, Any], scale: float = 1.0) -> Combine:
    """Networks compute with trained low-rank pairs beside their frozen kernels."""

    def combine(frozen: Params, trainable: Params) -> tuple[Mapping[str, Any], Params]:
        return {**models, **{name: Adapted(models[name], pairs, scale) for name, pairs in trainable.items()}}, frozen

    return combine


def with_tokens(models: Mapping[str, Any]) -> Combine:
    """The last rows of text encoders' tables are the trained ones: textual inversion."""

    def combine(frozen: Params, trainable: Params) -> tuple[Mapping[str, Any], Params]:
        return models, {**frozen, **{name: tokens.combine(frozen[name], rows) for name, rows in trainable.items()}}

    return combine


# From examples to the loss


Tokenizers = Mapping[str, tuple[Any, int]]
"""Text encoder -> its tokenizer and the number of tokens."""


def tokenizers_of(pipe: DiffusionPipeline) -> dict[str, tuple[Any, int]]:
    """The tokenizers of a pipeline's text encoders."""
    used = {}
    for name, tokenizer in pipe.family.encoders.items():
        if pipe.components.get(name) is not None:
            own = pipe.components[tokenizer]
            used[name] = own, min(pipe.components[name].config.max_position_embeddings, own.model_max_length)
    return used


def finish(
    tokenizers: Tokenizers,
    told: Callable[[Any], np.ndarray] | None,
    pictures: Callable[[Any], Batch] | None,
    texts: Callable[[Any], Batch] | None,
    example: Any,
) -> Batch:
    """The arrays of one :class:`~diffuse_jax.training.data.Example`; runs in the data workers.

    Args:
      tokenizers: for token ids int32 ``[L]`` under each text encoder's name.
      told: makes ``time_ids`` for SDXL; None for others.
      pictures: what stands in place of ``pixel_values`` uint8 ``[h,w,3]`` (and of ``time_ids``), from a cache.
      texts: what stands in place of token ids, from a cache.
      example: picture and caption.
    """
    if texts is None:
        arrays = {name: token_ids(*tokenizer, example.caption) for name, tokenizer in tokenizers.items()}
    else:
        arrays = texts(example)
    if pictures is not None:
        return arrays | pictures(example)
    arrays["pixel_values"] = example.pixels
    return arrays if told is None else arrays | {"time_ids": told(example)}


def token_ids(tokenizer: Any, length: int, text: str) -> np.ndarray:
    """Ids int32 ``[length]``, cut and padded; new words of several rows are spelled out."""
    return padded_ids(tokenizer, [tokens.expand_words(text, tokenizer)], length)[0]


def sizes_of(true: bool, example: Any) -> np.ndarray:
    """SDXL's ``time_ids [6]`` (Podell et al. 2023, 2.2): original height and width, top and left of the cut, size.

    Unless they shall be true, the picture is said to be whole and to have had this size: what pictures are asked for
    later are told, so that a handful of training pictures does not stand for their own resolution.
    """
    target = example.target_size
    told = (*example.original_size, *example.crop_top_left) if true else (*target, 0, 0)
    return np.array((*told, *target), np.float32)


def denoising_loss(
    family: ClipFamily,
    combine: Combine,
    objective: Objective,
    trainable: Params,
    frozen: Params,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
) -> tuple[jax.Array, Metrics]:
    """Squared error of the UNet at random timesteps of random latents (Rombach et al. 2022, eq. 2).

    ``batch`` has ``pixel_values [B,H,W,3]`` (uint8, or float32 in [-1, 1]) or ``moments [B,h,w,2c]`` of the latents'
    distribution; token ids ``[B,L]`` under each text encoder's name, or ``states [B,L,D]`` and for SDXL ``pooled
    [B,P]``; for SDXL ``time_ids [B,6]``; and with prior preservation ``prior [B]``.
    """
    models, params = combine(frozen, trainable)
    k_latent, k_draw = jax.random.split(key)
    x0 = latents(models["vae"], params.get("vae"), batch, k_latent)
    text = prompt_states(family, models, params, batch)
    added = None
    if "time_ids" in batch:
        added = {"text_embeds": text["pooled"], "time_ids": batch["time_ids"]}
    drawn = draw(objective, k_draw, x0)
    x = noised(objective, x0, drawn)
    prediction = models["unet"].apply({"params": params["unet"]}, x, drawn.t, text["states"], added)
    return errors(objective, prediction, x0, drawn, batch.get("prior"))


def latents(vae: Any, params: Params | None, batch: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
    """Scaled latents ``[B,h,w,c]`` float32, drawn from their distribution."""
    if "moments" in batch:
        moments = jnp.asarray(batch["moments"], jnp.float32)
        posterior = Posterior(*jnp.split(moments, 2, axis=-1))
    else:
        posterior = vae.apply({"params": params}, normalised(batch["pixel_values"]), method="encode")
    return scale_latents(posterior.sample(key), vae.config)


def normalised(pixels: jax.Array) -> jax.Array:
    """uint8 pixels as float32 in [-1, 1]; others as they are."""
    return pixels.astype(jnp.float32) / 127.5 - 1 if pixels.dtype == jnp.uint8 else pixels


def prompt_states(
    family: ClipFamily, models: Mapping[str, Any], params: Params, batch: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """``states [B,L,D]`` and, for SDXL, ``pooled [B,P]`` from token ids, unless they come encoded."""
    if "states" in batch:
        return {name: batch[name] for name in ("states", "pooled") if name in batch}
    nets = tuple(Net(name, models[name]) for name in family.encoders if name in batch and name in models)
    return family.encode(nets).encode(params, {net.name: batch[net.name] for net in nets})


def loss_of(pipe: DiffusionPipeline, combine: Combine, objective: Objective) -> Callable[..., Any]:
    """:func:`denoising_loss` for a pipeline, as :func:`~diffuse_jax.training.state.make_step` takes it."""
    return functools.partial(denoising_loss, pipe.family, combine, objective)


def networks(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The pipeline's networks by name, in the order of its text encoders."""
    names = [*pipe.family.encoders, "unet", "vae"]
    return {name: pipe.components[name] for name in names if pipe.components.get(name) is not None}


# What is written


def save_networks(pipe: DiffusionPipeline, folder: Path, params: Mapping[str, Params]) -> None:
    """Write trained networks in inference format: ``folder/unet`` and so on."""
    for name, own in params.items():
        pipe.components[name].save_pretrained(folder / name, own)


def sample_pictures(pipe: DiffusionPipeline, prompts: Iterable[str], **options: Any) -> list[tuple[str, Any]]:
    """Validation pictures: ``(prompt, PIL picture)`` for each prompt, in one call of the pipeline."""
    asked = list(prompts)
    per = options.get("num_images_per_prompt", 1)
    images = pipe(asked, **options).images
    return [(asked[i // per], image) for i, image in enumerate(images)]
