"""From what a user types to arrays: prompts to token ids, one value or a list to one value per picture."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffuse_jax.adapters.tokens import spelled

Prompt = str | Sequence[str]


def as_list(value: Prompt, name: str) -> list[str]:
    """A prompt or a list of prompts as a list; anything else is a ``TypeError``."""
    values = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not values or any(not isinstance(v, str) for v in values):
        raise TypeError(f"{name} must be a string or a list of at least one string, got {value!r}")
    return values


def number_of_prompts(prompt: Prompt | None, embeds: Any, images_per_prompt: int) -> int:
    """How many prompts there are; they come as text or encoded, not as both."""
    if (prompt is None) == (embeds is None):
        raise ValueError("give either prompt or prompt_embeds")
    if images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt must be at least 1, got {images_per_prompt}")
    return len(embeds) if prompt is None else len(as_list(prompt, "prompt"))


def one_per_prompt(value: Prompt | None, prompts: int, name: str) -> list[str]:
    """A second prompt (negative, or for another encoder) for each of ``prompts``; one string serves them all."""
    values = as_list("" if value is None else value, name)
    if len(values) not in (1, prompts):
        raise ValueError(f"{name} has {len(values)} entries for {prompts} prompts; give one, or one for each prompt")
    return values * (prompts if len(values) == 1 else 1)


def one_per_image(value: float | Sequence[float], images: int, name: str) -> np.ndarray:
    """A number, or one per picture, as float32 ``[images]``."""
    array = np.asarray(value, np.float32)
    if array.shape not in ((), (images,)):
        raise ValueError(f"{name} has {array.size} entries for {images} pictures; give one number or one each")
    return np.broadcast_to(array, (images,))


def tokenize(tokenizer: Any, prompts: Sequence[str], max_length: int, vocabulary: int) -> np.ndarray:
    """Token ids ``[B,L]`` int32, padded to ``L``; a prompt that is too long is cut, with a warning that names the rest.

    Args:
      tokenizer: a transformers tokenizer.
      max_length: the encoder's number of positions; the tokenizer's own limit counts too.
      vocabulary: the encoder's number of token embeddings.

    A new word of several embeddings (textual inversion) is spelled out as all of them.

    Raises:
      ValueError: the encoder has no embedding for an id; the tokenizer is another model's.
    """
    prompts = [spelled(prompt, tokenizer) for prompt in prompts]
    length = min(max_length, int(tokenizer.model_max_length))
    full = tokenizer(list(prompts), truncation=False, padding=False, verbose=False)["input_ids"]
    for ids in full:
        if len(ids) > length:
            rest = tokenizer.decode(ids[length - 1 : -1])
            warnings.warn(
                f"the prompt is {len(ids) - length} tokens too long ({length} fit); cut: {rest!r}", stacklevel=4
            )
    padded = tokenizer(list(prompts), truncation=True, padding="max_length", max_length=length, return_tensors="np")
    ids = padded["input_ids"].astype(np.int32)
    if ids.max() >= vocabulary:  # which is not an error in JAX
        raise ValueError(
            f"the tokenizer gives id {ids.max()} and the text encoder has {vocabulary} embeddings: "
            "the tokenizer is another model's, or has words that the encoder was not taught"
        )
    return ids


def image_seeds(seed: int | Sequence[int] | None, images: int) -> tuple[np.ndarray, np.ndarray]:
    """``(seeds, indices)``, both uint32 ``[images]``: picture ``i`` draws from ``fold_in(key(seeds[i]), indices[i])``.

    One seed serves all pictures, which then differ by their index. A list has one seed per picture and every index is
    0, so a picture is the same alone and in a list. Without a seed the operating system chooses one.
    """
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1)[0])
    values = [seed] * images if isinstance(seed, int | np.integer) else list(seed)
    if len(values) != images:
        raise ValueError(f"seed has {len(values)} entries for {images} pictures; give one int, or one for each picture")
    if any(not isinstance(v, int | np.integer) or not 0 <= v < 2**32 for v in values):
        raise ValueError(f"a seed must be an integer from 0 to 4294967295, got {seed!r}")
    alike = isinstance(seed, int | np.integer)
    return np.array(values, np.uint32), np.arange(images, dtype=np.uint32) * np.uint32(alike)
