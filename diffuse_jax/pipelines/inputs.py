"""From what a user gives to arrays: prompts to token ids, images to pixels, one value or a list to one per image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from diffuse_jax.adapters.tokens import spelled
from diffuse_jax.images import rgb, upright, upright_size
from diffuse_jax.messages import warn
from diffuse_jax.pipelines.method import Rows
from diffuse_jax.sharding import spans_processes
from diffuse_jax.text.tokenizer import padded_ids, padded_mask, unpadded_ids

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
    """A number, or one per image, as float32 ``[images]``."""
    array = np.asarray(value, np.float32)
    if array.shape not in ((), (images,)):
        raise ValueError(f"{name} has {array.size} entries for {images} images; give one number, or one for each")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {value!r}")
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
    for ids in unpadded_ids(tokenizer, prompts):
        if len(ids) > length:
            rest = tokenizer.decode(ids[length - 1 : -1])
            warn(f"the prompt is {len(ids) - length} tokens too long ({length} fit); cut: {rest!r}")
    padded = padded_ids(tokenizer, prompts, length)
    if padded.max() >= vocabulary:  # which is not an error in JAX
        raise ValueError(
            f"the tokenizer gives id {padded.max()} and the text encoder has {vocabulary} embeddings: "
            "the tokenizer is another model's, or has words that the encoder was not taught"
        )
    return padded


def token_mask(tokenizer: Any, prompts: Sequence[str], max_length: int) -> np.ndarray:
    """Where the tokens of :func:`tokenize` are no padding, bool ``[B,L]``."""
    length = min(max_length, int(tokenizer.model_max_length))
    return padded_mask(tokenizer, [spelled(prompt, tokenizer) for prompt in prompts], length)


def image_seeds(seed: int | Sequence[int] | None, images: int) -> tuple[np.ndarray, np.ndarray]:
    """``(seeds, indices)``, both uint32 ``[images]``: image ``i`` draws from ``fold_in(key(seeds[i]), indices[i])``.

    One seed serves all images, which then differ by their index. A list has one seed per image and every index is 0, so
    an image is the same alone and in a list. Without a seed the operating system chooses one.
    """
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1)[0])
    given = _plain(seed)
    alike = not isinstance(given, list)
    values = [given] * images if alike else [_plain(value) for value in given]
    if len(values) != images:
        raise ValueError(f"seed has {len(values)} entries for {images} images; give one int, or one for each image")
    if any(not isinstance(v, int) or not 0 <= v < 2**32 for v in values):
        raise ValueError(f"a seed must be an integer from 0 to 4294967295, got {seed!r}; a key of JAX goes to key=")
    return np.array(values, np.uint32), np.arange(images, dtype=np.uint32) * np.uint32(alike)


def _plain(value: Any) -> Any:
    """A scalar of Python, NumPy or JAX as Python's; what holds several as a list."""
    if isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
        return value
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


def noise_rows(
    images: int,
    options: Mapping[str, Any],
    latent_shape: tuple[int, ...],
    mesh: Any = None,
) -> tuple[Rows, list[int] | None]:
    """The rows that noise comes from, and the seed of each image.

    Args:
      images: how many.
      options: ``seed``, ``key`` and ``latents`` (standard normal noise to use) of a call.
      latent_shape: of one sample.
      mesh: where the run takes place.

    Raises:
      ValueError: the shape of ``latents`` does not fit, both ``seed`` and ``key`` were given, or neither although the
        processes of the mesh would draw different ones.
    """
    seed, key, latents = (options.get(name) for name in ("seed", "key", "latents"))
    if seed is None and key is None and spans_processes(mesh):
        raise ValueError("the mesh spans several processes; give them the same seed (or key), for example seed=0")
    if seed is not None and key is not None:
        raise ValueError("give seed or key, not both")
    rows: Rows = {}
    if latents is not None:
        rows["noise"] = np.asarray(latents, np.float32)
        if rows["noise"].shape != (images, *latent_shape):
            raise ValueError(f"latents must be {(images, *latent_shape)} (channel-last), got {rows['noise'].shape}")
    if key is not None:
        check_key(key)
        each = jax.vmap(lambda i: jax.random.fold_in(key, i))(np.arange(images, dtype=np.uint32))
        return rows | {"key": each}, None
    seeds, indices = image_seeds(seed, images)
    return rows | {"seed": seeds, "index": indices}, [int(s) for s in seeds]


def check_key(key: Any) -> None:
    """Refuse what is not a single typed key.

    Raises:
      TypeError: it says how to make one.
    """
    if not isinstance(key, jax.Array) or not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim:
        given = f"{key.dtype} {key.shape}" if isinstance(key, jax.Array | np.ndarray) else repr(key)
        raise TypeError(f"key must be one typed key, as jax.random.key(0) makes it, got {given}")


# Images

ImageInput = Any
"""A ``PIL.Image``, an array ``[H,W,C]`` or ``[B,H,W,C]`` (uint8, or floating point in [0, 1]), or a list of these."""


def pixels(images: ImageInput, size: tuple[int, int] | None, name: str, *, multiple: int = 1) -> np.ndarray:
    """RGB images as float32 ``[N,H,W,3]`` in [0, 1].

    Args:
      images: see :data:`ImageInput`; PIL images are converted as :func:`diffuse_jax.images.rgb` says, and resized with
        Lanczos.
      size: (height, width) to have; None takes the first image's, rounded down to the ``multiple``.
      name: of the argument.
      multiple: what height and width must be divisible by.

    Raises:
      TypeError: something is no image.
      ValueError: an array has another shape than (height, width, 3) or values outside [0, 1], or a PIL image has values
        of unknown range.
    """
    found = listed(images, name)
    size = image_size(images, name, multiple) if size is None else size
    return np.stack([_pixels(image, size, "RGB", name) for image in found])


def mask_pixels(masks: ImageInput, size: tuple[int, int], name: str) -> np.ndarray:
    """Masks as float32 ``[N,H,W,1]``: 1 where a value is at least one half (paint there), 0 elsewhere.

    Beside what :func:`pixels` takes, a mask may be an array of bools, or of the integers 0 and 1.

    Raises:
      ValueError, TypeError: as :func:`pixels`; or a PIL image holds 0 and 1 where white is 255.
    """
    grey = np.stack([_pixels(_unlabelled(mask, name), size, "L", name) for mask in listed(masks, name)])
    return (grey >= 0.5).astype(np.float32)


def _unlabelled(mask: Any, name: str) -> Any:
    """A mask whose values are classes (False and True, 0 and 1) as one whose values are shades."""
    if isinstance(mask, Image.Image):
        if mask.mode == "L" and mask.getextrema()[1] == 1:
            raise ValueError(f"{name} has values from 0 to 1 where white is 255, so it is black; multiply it by 255")
        return mask
    array = np.asarray(mask)
    classes = array.dtype == bool or (np.issubdtype(array.dtype, np.integer) and np.isin(array, (0, 1)).all())
    return array.astype(np.float32) if classes else array


def listed(images: ImageInput, name: str) -> list[Any]:
    """One image, several, or a batch, as a list of ``PIL.Image`` and of arrays ``[H,W,C]`` or ``[H,W]``.

    Raises:
      TypeError: there is none, or something else.
    """
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, Sequence) and not isinstance(images, str) and images:
        return [image for item in images for image in listed(item, name)]
    if isinstance(images, np.ndarray | jax.Array) and images.ndim in (2, 3, 4):
        return list(np.asarray(images)) if images.ndim == 4 else [np.asarray(images)]
    given = f"an array of {images.ndim} axes" if hasattr(images, "ndim") else type(images).__name__
    raise TypeError(f"{name} must be a PIL image, an array [H,W,3] or [B,H,W,3], or a list of them, got {given}")


def image_size(images: ImageInput, name: str, multiple: int) -> tuple[int, int]:
    """Height and width of the first image, rounded down to a multiple.

    Raises:
      ValueError: it is smaller than that.
    """
    first = listed(images, name)[0]
    height, width = upright_size(first) if isinstance(first, Image.Image) else first.shape[:2]
    if height < multiple or width < multiple:
        raise ValueError(f"{name} is {height}x{width}; it must be at least {multiple}x{multiple} pixels")
    return height // multiple * multiple, width // multiple * multiple


def _pixels(image: Any, size: tuple[int, int], mode: str, name: str) -> np.ndarray:
    """One image as float32 ``[H,W,C]`` in [0, 1]."""
    height, width = size
    if isinstance(image, Image.Image):
        image = upright(image) if image.mode in ("RGB", "L") else rgb(image, name)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        array = np.asarray(image.convert(mode), np.float32) / 255
        return array[..., None] if array.ndim == 2 else array
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    channels = 3 if mode == "RGB" else 1
    if array.shape != (height, width, channels):
        raise ValueError(
            f"{name} must be {height}x{width} with {channels} channels (channel-last), got an array {array.shape}; "
            "resize it first, or give a PIL image"
        )
    if array.dtype == np.uint8:
        if array.max(initial=0) == 1:
            warn(
                f"{name} as uint8 has values from 0 to 1 where white is 255, so it is black; multiply it by 255, or "
                "give floating point in [0, 1]"
            )
        return array.astype(np.float32) / 255
    if not np.issubdtype(array.dtype, np.floating) or not (array.min() >= 0 and array.max() <= 1):
        raise ValueError(
            f"{name} as an array must be uint8, or floating point in [0, 1]; got {array.dtype} from "
            f"{array.min()} to {array.max()}"
        )
    return array.astype(np.float32)


def per_prompt(array: np.ndarray, images: int, copies: int, name: str) -> np.ndarray:
    """One image for all, one for each prompt, or one for each of the ``images`` of a request, as one row per image.

    Raises:
      ValueError: there are as many as neither.
    """
    prompts = images // copies
    if len(array) == images:
        return array
    if len(array) not in (1, prompts):
        raise ValueError(
            f"{name} has {len(array)} images for {prompts} prompts with {copies} images each; give one, or one for each"
        )
    return np.repeat(array, copies if len(array) == prompts else images, axis=0)
