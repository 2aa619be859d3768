"""Custom Diffusion (Kumari et al. 2023, arXiv 2212.04488): several concepts from a few images of each.

Only the projections of the UNet's cross-attention and the embeddings of new words are trained (section 3). Images get
random sizes, and what they leave empty has no weight in the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffuse_jax.adapters import custom_diffusion, tokens
from diffuse_jax.limits import open_regular, parse_json
from diffuse_jax.models import Model, Params
from diffuse_jax.models.intercept import Call, changed_layers
from diffuse_jax.pipelines import DiffusionPipeline, StableDiffusionPipeline
from diffuse_jax.training.data import DataSettings, FolderSource, Record, Source
from diffuse_jax.training.data.sources import METADATA, Joined, fingerprint
from diffuse_jax.training.dreambooth import (
    FixedPrompts,
    Repeated,
    check_dreambooth,
    images_in,
    make_class_images,
    repeated,
)
from diffuse_jax.training.families import trained_family
from diffuse_jax.training.latent import Combine
from diffuse_jax.training.settings import BatchSettings, CustomSettings, DreamBoothSettings, ModelSettings
from diffuse_jax.training.settings.methods import CONCEPT

Trained = Mapping[str, Any]
"""What is trained: ``unet``, the tree of its new leaves, and ``text_encoder``, the rows ``[n,D]`` of the new words."""

# Concepts and their images


def concepts_of(settings: CustomSettings) -> tuple[DreamBoothSettings, ...]:
    """The concepts, each as a single instance and its class.

    Raises:
      FileNotFoundError: there is no such list.
      ValueError: it is not a list of concepts, or one of them lacks something.
    """
    prior = {field.name: getattr(settings, field.name) for field in dataclasses.fields(DreamBoothSettings)
             if field.name not in CONCEPT}  # fmt: skip
    if settings.concepts_list is None:
        return (DreamBoothSettings(**prior, **{name: getattr(settings, name) for name in CONCEPT}),)
    path = Path(settings.concepts_list)
    if not path.is_file():
        raise FileNotFoundError(f"--concepts_list {path} does not exist")
    with open(open_regular(path), encoding="utf-8") as file:
        entries = parse_json(path, file.read(), what="the list of concepts", unique=True)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"--concepts_list {path} must be a JSON list of concepts, each with {', '.join(CONCEPT)}")
    found = []
    for number, entry in enumerate(entries, 1):
        where = f"--concepts_list {path}: concept {number}"
        if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
            raise ValueError(f"{where} must be a dict of texts with the keys {', '.join(CONCEPT)}")
        needed = CONCEPT if settings.with_prior_preservation else CONCEPT[:2]
        if missing := [name for name in needed if not entry.get(name)]:
            raise ValueError(f"{where} lacks {' and '.join(missing)}")
        if unknown := [name for name in entry if name not in CONCEPT]:
            raise ValueError(f"{where} has {unknown[0]!r}; the keys are {', '.join(CONCEPT)}")
        found.append(DreamBoothSettings(**prior, **entry))
    return tuple(found)


def check_custom(settings: CustomSettings, data: DataSettings) -> tuple[DreamBoothSettings, ...]:
    """Check the settings before anything is loaded, and return the concepts.

    Raises:
      ValueError, FileNotFoundError: a concept has no images, a new word is in no prompt, class images would have to be
        retrieved, or images are to have random sizes where they cannot.
    """
    concepts = concepts_of(settings)
    for concept in concepts:
        check_dreambooth(concept, data)
        if settings.real_prior:
            real_images(concept)
    for word in settings.modifiers:
        if not any(word in concept.instance_prompt for concept in concepts):
            raise ValueError(f"--modifier_token {word} is in no instance prompt, so it would not be trained")
    for name in ("cache_latents", "cache_text_embeddings"):
        if getattr(data.caches, name) and not settings.noaug:
            raise ValueError(f"--{name} needs images and prompts that stay the same; add --noaug, or leave it out")
    return concepts


class Listed:
    """Photographs of a class as diffusers' script for retrieving them stores them: ``images/``, their paths in
    ``images.txt`` and their captions in ``caption.txt``, one per line."""

    def __init__(self, folder: Path) -> None:
        paths, captions = (filled_lines(folder / name) for name in (IMAGES, CAPTIONS))
        self._rows = [(folder / "images" / Path(path).name, text) for path, text in zip(paths, captions, strict=False)]
        if len(paths) != len(captions):
            raise ValueError(f"{folder} has {len(paths)} lines in {IMAGES} and {len(captions)} in {CAPTIONS}")
        if missing := [path for path, _ in self._rows if not path.is_file()]:
            raise FileNotFoundError(f"{folder / IMAGES} names {missing[0]}, which does not exist")
        self.fingerprint = fingerprint(
            "listed", [f"{path.stat().st_mtime_ns} {path} {text}" for path, text in self._rows]
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        path, text = self._rows[index]
        return Record(str(path), (text,), str(path))


IMAGES, CAPTIONS = "images.txt", "caption.txt"


def filled_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    with open(open_regular(path), encoding="utf-8") as file:
        return [line.strip() for line in file if line.strip()]


def real_images(concept: DreamBoothSettings) -> Source:
    """The photographs of the class of a concept, with their captions or, if they have none, the class prompt.

    Raises:
      ValueError: there are too few; they are not retrieved.
      FileNotFoundError: an image that a list names does not exist.
    """
    assert concept.class_data_dir is not None  # checked by the settings
    assert concept.class_prompt is not None
    folder, wanted = Path(concept.class_data_dir), concept.num_class_images
    have = len(images_in(folder)) if folder.is_dir() else 0
    if have < wanted:
        raise ValueError(
            f"--real_prior: {folder} has {have} of {wanted} images, and none are retrieved from the network; put as "
            "many photographs there, with captions in metadata.jsonl (a file_name and a text per line) or in "
            f"{CAPTIONS} and {IMAGES}, give a smaller --num_class_images, or leave out --real_prior to generate images"
        )
    if (folder / IMAGES).is_file() and (folder / CAPTIONS).is_file():
        return Listed(folder)
    if any((folder / name).is_file() for name in METADATA):
        return FolderSource(folder)
    return FixedPrompts(folder, (concept.class_prompt,))


def instance_images(concepts: Sequence[DreamBoothSettings], batch: BatchSettings, mesh: Mesh) -> Repeated:
    """The images of all concepts, each with its prompt."""
    sources = [FixedPrompts(concept.instance_data_dir, (concept.instance_prompt,)) for concept in concepts]
    return repeated(Joined(sources), batch, mesh)


def class_images(
    settings: CustomSettings, concepts: Sequence[DreamBoothSettings], batch: BatchSettings, mesh: Mesh
) -> Repeated | None:
    """The images of all classes; None without prior preservation."""
    if not settings.with_prior_preservation:
        return None
    folder = lambda concept: FixedPrompts(concept.class_data_dir, (concept.class_prompt,))
    return repeated(Joined([(real_images if settings.real_prior else folder)(one) for one in concepts]), batch, mesh)


def make_classes(
    settings: CustomSettings,
    concepts: Sequence[DreamBoothSettings],
    model: ModelSettings,
    pipe: DiffusionPipeline,
    seed: int,
) -> None:
    """Generate the class images that are missing, unless they are photographs."""
    for concept in () if settings.real_prior else concepts:
        make_class_images(concept, model, pipe, seed)


def cell_of(settings: CustomSettings, pipe: DiffusionPipeline) -> int | None:
    """Pixels per side of a latent, for images of random size; None if they are to keep their size."""
    return None if settings.noaug else trained_family(pipe).cell(pipe)


# What is trained


def new_words(settings: CustomSettings, pipe: DiffusionPipeline) -> tuple[Any, list[int]]:
    """The tokenizer with the new words, and the ids of the tokens that they start from.

    Raises:
      ValueError: the pipeline has another number of text encoders than one, or as for
        :func:`~diffuse_jax.adapters.tokens.with_words` and :func:`~diffuse_jax.adapters.tokens.token_id`.
    """
    if not isinstance(pipe, StableDiffusionPipeline):
        raise ValueError(
            f"Custom Diffusion supports one text encoder; {type(pipe).__name__} has two: give a Stable Diffusion 1.x "
            "or 2.x"
        )
    tokenizer = pipe.components["tokenizer"]
    starts = [tokens.token_id(tokenizer, word) for word in settings.initializers[: len(settings.modifiers)]]
    for word in settings.modifiers:
        tokenizer = tokens.with_words(tokenizer, word, 1, "modifier_token")
    return tokenizer, starts


def trained_shapes(settings: CustomSettings, pipe: DiffusionPipeline) -> dict[str, Any]:
    """The shapes of what :func:`with_concepts` trains; no weights are needed.

    Raises:
      ValueError: as for :func:`new_words`.
    """
    _, starts = new_words(settings, pipe)
    single = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    leaves = custom_diffusion.leaves_of(pipe.components["unet"].shapes(), settings.freeze_model)
    shapes = {"unet": jax.tree.map(lambda leaf: single(leaf.shape), leaves)}
    width = pipe.components["text_encoder"].config.hidden_size
    return shapes | ({"text_encoder": single((len(starts), width))} if starts else {})


def with_concepts(settings: CustomSettings, pipe: DiffusionPipeline) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """The pipeline with the new words, whose UNet is in its compute dtype, and what is trained, float32.

    Args:
      settings: what is trained.
      pipe: the pipeline; its UNet is float32.

    Raises:
      ValueError: as for :func:`new_words`.
    """
    tokenizer, starts = new_words(settings, pipe)
    unet, params = pipe.components["unet"], pipe.params["unet"]
    trained: dict[str, Any] = {
        "unet": jax.tree.map(jnp.copy, custom_diffusion.leaves_of(params, settings.freeze_model))
    }
    changed: dict[str, Any] = {"unet": (unet, jax.tree.map(lambda leaf: leaf.astype(unet.dtype), params))}
    if starts:
        encoder, words = pipe.components["text_encoder"], pipe.params["text_encoder"]
        rows = tokens.table_of(words)[jnp.array(starts)]
        trained["text_encoder"] = rows.astype(jnp.float32)
        changed |= {"tokenizer": tokenizer, "text_encoder": tokens.with_rows(encoder, words, rows)}
    return pipe.replace(**changed), trained


class StartFixed(NamedTuple):
    """A UNet whose cross-attention learns nothing from the first token of prompts, which is the same in all."""

    model: Model

    @property
    def config(self) -> Any:
        return self.model.config

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Like ``model.apply``, without gradients of the keys and values of the first token."""
        with changed_layers(start_fixed):
            return self.model.apply(variables, *args, **kwargs)


def start_fixed(call: Call) -> Any:
    """The output of a layer; of a key or value ``[B,L,D]`` of cross-attention, the first token is a constant."""
    y = call.output()
    if call.path[-2:-1] != ("attn2",) or call.name not in ("to_k", "to_v"):
        return y
    return jnp.concatenate([jax.lax.stop_gradient(y[:, :1]), y[:, 1:]], 1)


def with_attention(models: Mapping[str, Any]) -> Combine:
    """Trained leaves replace those of the UNet, and trained rows the last token embeddings: Custom Diffusion."""

    def combine(frozen: Params, trainable: Params) -> tuple[Mapping[str, Any], Params]:
        return {**models, "unet": StartFixed(models["unet"])}, {**frozen, **combined(frozen, trainable)}

    return combine


def combined(params: Mapping[str, Params], trained: Trained) -> dict[str, Params]:
    """The parameters of the networks that are trained, by name, with what is trained, in their own dtypes."""
    put: dict[str, Callable[..., Params]] = {"unet": custom_diffusion.merged, "text_encoder": tokens.combine}
    return {name: put[name](params[name], new) for name, new in trained.items()}


def save_custom(settings: CustomSettings, pipe: DiffusionPipeline, folder: Path, trained: Trained) -> None:
    """Write the weights of the cross-attention, and the embedding of each new word in a file of its name."""
    ending = ".bin" if settings.no_safe_serialization else ".safetensors"
    file = custom_diffusion.OLD_FILE if settings.no_safe_serialization else custom_diffusion.FILE
    custom_diffusion.save_leaves(folder / file, trained["unet"], pipe.components["unet"].shapes())
    for number, word in enumerate(settings.modifiers):
        tokens.save_rows(folder / f"{word}{ending}", word, trained["text_encoder"][number : number + 1])
