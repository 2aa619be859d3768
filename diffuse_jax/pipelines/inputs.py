"""Convert user input to arrays: prompts to token ids, images to pixels, a single value or a list to one per image."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffuse_jax.adapters.tokens import expand_words
from diffuse_jax.bounds import whole
from diffuse_jax.images import rgb, upright, upright_size
from diffuse_jax.limits import SURROGATE
from diffuse_jax.messages import brief, warn
from diffuse_jax.noise import STREAMS
from diffuse_jax.pipelines.method import Rows
from diffuse_jax.sharding import spans_processes
from diffuse_jax.text.tokenizer import padded_ids, padded_mask, unpadded_ids

Prompt = str | Sequence[str]


def as_list(value: Prompt | None, name: str) -> list[str]:
    """A prompt or a list of prompts as a list.

    Raises:
      TypeError: it is neither.
      ValueError: a prompt has half of a surrogate pair, as Python keeps bytes of a command line that are not UTF-8.
    """
    values = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not values or any(not isinstance(v, str) for v in values):
        raise TypeError(f"{name} must be a string or a list of at least one string, got {brief(value)}")
    for text in values:
        if SURROGATE.search(text):
            raise ValueError(f"{name} must be valid Unicode text (UTF-8 on the command line), got {brief(ascii(text))}")
    return values


def number_of_prompts(prompt: Prompt | None, embeds: Any, name: str = "prompt") -> int:
    """The number of prompts, which are given either as text or as embeddings.

    Raises:
      ValueError: both or neither were given, or the embeddings are of no prompt.
    """
    if (prompt is None) == (embeds is None):
        raise ValueError(f"give either {name} or {name}_embeds")
    if prompt is not None:
        return len(as_list(prompt, name))
    with contextlib.suppress(TypeError):  # of what has no length
        if found := len(embeds):
            return found
    raise ValueError(f"{name}_embeds must be an array with an entry for each prompt, got {brief(embeds)}")


def one_per_prompt(value: Prompt | None, prompts: int, name: str) -> list[str]:
    """Further prompts (negative, or for another encoder), one for each of ``prompts``; a single string is used for all.

    Raises:
      ValueError, TypeError: their number is wrong, or they are not text.
    """
    values = as_list("" if value is None else value, name)
    if len(values) not in (1, prompts):
        raise ValueError(f"{name} has {len(values)} entries for {prompts} prompts; give one, or one per prompt")
    return values * (prompts if len(values) == 1 else 1)


def spread_prompts(value: Prompt, count: int, name: str, of: str) -> list[str]:
    """Prompts for ``count`` entries of the argument ``of``, each for as many consecutive ones.

    Raises:
      ValueError, TypeError: they are not text, or their number does not divide ``count``.
    """
    prompts = as_list(value, name)
    if count % len(prompts):
        raise ValueError(f"{name} has {len(prompts)} entries for {count} {of}; give one, or one for each")
    return [prompt for prompt in prompts for _ in range(count // len(prompts))]


LONGEST_SIDE, MOST_PIXELS = 1 << 16, 1 << 28
"""Limits of an image's size: the compiler takes minutes for more, and then memory runs out."""


def pixel_size(height: int, width: int) -> tuple[int, int]:
    """A size in pixels, for networks that take any.

    Raises:
      ValueError: a side is not a whole number from 1 to :data:`LONGEST_SIDE`, or there are more than
        :data:`MOST_PIXELS`.
    """
    for name, side in (("height", height), ("width", width)):
        if not 1 <= whole(side, name) <= LONGEST_SIDE:
            raise ValueError(f"{name} must be from 1 to {LONGEST_SIDE}, got {brief(side)}")
    if height * width > MOST_PIXELS:
        raise ValueError(f"an image may have {MOST_PIXELS} pixels, got {height}x{width}")
    return int(height), int(width)


def one_per_image(value: float | Sequence[float], images: int, name: str) -> np.ndarray:
    """A number, or one per image, as float32 ``[images]``.

    Raises:
      ValueError: their number is wrong, or one is not finite.
      TypeError: one is not a number.
    """
    array = finite(value, name).astype(np.float32)
    if array.shape not in ((), (images,)):
        raise ValueError(f"{name} has {array.size} entries for {images} images; give one number, or one per image")
    return np.broadcast_to(array, (images,))


def finite(value: Any, name: str) -> np.ndarray:
    """A number or a list of numbers as float64.

    Raises:
      ValueError: one is not finite.
      TypeError: one is not a number.
    """
    try:
        given, array = np.asarray(value), np.asarray(value, np.float64)
        # NumPy converts text that looks like a number, and None to NaN.
        converted = given.dtype.kind in "US" or None in given.ravel().tolist()
    except (TypeError, ValueError, OverflowError):
        converted = True
    if converted:
        raise TypeError(f"{name} must be a number, or a list of numbers, got {brief(value)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {brief(value)}")
    return array


def number_array(value: Any, name: str) -> np.ndarray:
    """An array, or nested lists of one shape, as a NumPy array of its own dtype.

    Raises:
      TypeError: it is something else, as text or lists of several lengths are.
      ValueError: a number is infinite or NaN.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of a tensor with a gradient
        array = np.asarray(None)
    if not any(jax.dtypes.issubdtype(array.dtype, kind) for kind in (np.floating, np.integer)):
        raise TypeError(f"{name} must be an array of numbers, got {brief(value)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite; {np.sum(~np.isfinite(array))} of {array.size} numbers are not")
    return array


def joined_array(value: Any, name: str) -> np.ndarray:
    """As :func:`number_array`; a list or tuple of arrays is joined along their first axis.

    Raises:
      TypeError: one is no array of numbers.
      ValueError: there are none, or they do not have one shape.
    """
    if not isinstance(value, list | tuple):
        return number_array(value, name)
    parts = [number_array(part, name) for part in value]
    if not all(part.ndim for part in parts) or len({part.shape[1:] for part in parts}) != 1:
        raise ValueError(f"{name} as a list must have arrays of one shape, got {brief(value)}")
    return np.concatenate(parts)


def embeddings(value: Any, width: int, name: str) -> np.ndarray:
    """Embeddings ``[N,width]`` float32; lists of ``[n,width]`` are joined.

    Raises:
      ValueError: they are not floating-point of this width, or there are none.
      TypeError: they are no arrays of numbers.
    """
    array = joined_array(value, name)
    if array.ndim != 2 or array.shape[1] != width or not jnp.issubdtype(array.dtype, jnp.floating) or not len(array):
        raise ValueError(f"{name} must be floating-point [N,{width}], got {array.dtype} {list(array.shape)}")
    return array.astype(np.float32)


def tokenize(
    tokenizer: Any, prompts: Sequence[str], max_length: int, vocabulary: int, *, advice: str = ""
) -> np.ndarray:
    """Token ids ``[B,L]`` int32, padded to ``L``; a prompt that is too long is cut, with a warning that shows what was
    cut.

    Args:
      tokenizer: a transformers tokenizer.
      prompts: one text per image.
      max_length: the encoder's number of positions; ``L`` is the smaller of this and the tokenizer's own limit.
      vocabulary: the encoder's number of token embeddings.
      advice: the end of the warning.

    A word with several embeddings (textual inversion) is expanded to all its tokens.

    Raises:
      ValueError: the encoder has no embedding for an id, because the tokenizer belongs to another model.
    """
    prompts = [expand_words(prompt, tokenizer) for prompt in prompts]
    length = min(max_length, int(tokenizer.model_max_length))
    for ids in unpadded_ids(tokenizer, prompts):
        warn_of_cut(tokenizer, ids[1:-1], length, advice)
    padded = padded_ids(tokenizer, prompts, length)
    check_vocabulary(padded, vocabulary)
    return padded


def warn_of_cut(tokenizer: Any, ids: Sequence[int], length: int, advice: str) -> None:
    """Warn if the tokens of a text, without start and end, do not fit into ``length`` with them; ``advice`` is the end
    of the warning."""
    if (excess := len(ids) + 2 - length) > 0:
        rest = tokenizer.decode(list(ids[length - 2 :]))
        warn(f"the prompt is {excess} tokens too long ({length} fit); cut: {rest!r}{advice}")


def check_vocabulary(ids: np.ndarray, vocabulary: int) -> None:
    """Check that the encoder has an embedding for every id; an index out of range is not an error in JAX.

    Raises:
      ValueError: it has not.
    """
    if ids.max() >= vocabulary:
        raise ValueError(
            f"the tokenizer produces id {ids.max()}, but the text encoder has only {vocabulary} embeddings: "
            "the tokenizer belongs to another model, or has words that the encoder does not"
        )


def token_mask(tokenizer: Any, prompts: Sequence[str], max_length: int) -> np.ndarray:
    """Attention mask of :func:`tokenize`, bool ``[B,L]``: true for tokens, false for padding."""
    length = min(max_length, int(tokenizer.model_max_length))
    return padded_mask(tokenizer, [expand_words(prompt, tokenizer) for prompt in prompts], length)


def image_seeds(seed: int | Sequence[int] | None, images: int, limit: int = 2**32) -> tuple[np.ndarray, np.ndarray]:
    """``(seeds, indices)``, uint64 and uint32 ``[images]``: image ``i`` uses the key ``fold_in(key(seeds[i]),
    indices[i])``; seeds are below ``limit``.

    A single seed is used for all images, which then differ in their index. A list has one seed per image and every
    index is 0, so an image is the same alone and in a list. Without a seed, a random one from the operating system is
    used.

    Raises:
      ValueError: the number of seeds is wrong, or a seed is not an integer from 0 to 2**32 - 1.
    """
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1)[0])
    given = _plain(seed)
    shared = not isinstance(given, list)
    values = [given] * images if shared else [_plain(value) for value in given]
    if len(values) != images:
        raise ValueError(f"seed has {len(values)} entries for {images} images; give one int, or one per image")
    if any(not isinstance(v, int) or isinstance(v, bool) or not 0 <= v < limit for v in values):
        large = any(isinstance(v, int) and v >= limit for v in values) and limit == 2**32
        advice = '; noise="torch" takes seeds up to 2**64 - 1, and key= a key of JAX' if large else ""
        if any(jnp.issubdtype(getattr(v, "dtype", int), jax.dtypes.prng_key) for v in values):
            advice = "; give a key of JAX as key="
        raise ValueError(f"a seed must be an integer from 0 to {limit - 1}, got {brief(seed)}{advice}")
    return np.array(values, np.uint64), np.arange(images, dtype=np.uint32) * np.uint32(shared)


def _plain(value: Any) -> Any:
    """A Python, NumPy or JAX scalar as a Python scalar, anything iterable as a list."""
    if isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
        return value
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes) else value


def noise_rows(
    images: int,
    options: Mapping[str, Any],
    latent_shape: tuple[int, ...],
    mesh: Any = None,
) -> tuple[Rows, list[int] | None]:
    """The rows that determine the noise, and the seed of each image.

    Args:
      images: number of images.
      options: ``seed``, ``key``, ``noise`` and ``latents`` (the standard normal noise to use) of the call.
      latent_shape: shape of one sample.
      mesh: the mesh of the run.

    Raises:
      ValueError: ``latents`` has the wrong shape, both ``seed`` and ``key`` were given, or neither although the mesh
        spans several processes, which would choose different seeds; or there is no such ``noise``.
    """
    seed, key, latents, kind = (options.get(name) for name in ("seed", "key", "latents", "noise"))
    if kind is not None and (not isinstance(kind, str) or kind not in STREAMS):
        given, known = repr(kind) if isinstance(kind, str) else type(kind).__name__, ", ".join(map(repr, STREAMS))
        raise ValueError(f"noise must be one of {known}, got {given}; an array goes to latents=")
    if kind is not None and key is not None:
        raise ValueError(f'noise="{kind}" takes a seed, not a key of JAX')
    if seed is None and key is None and spans_processes(mesh):
        raise ValueError("the mesh spans several processes; give them the same seed (or key), for example seed=0")
    if seed is not None and key is not None:
        raise ValueError("give seed or key, not both")
    rows: Rows = {}
    if latents is not None:
        rows["noise"] = number_array(latents, "latents").astype(np.float32)
        if rows["noise"].shape != (images, *latent_shape):
            raise ValueError(f"latents must be {(images, *latent_shape)} (channel-last), got {rows['noise'].shape}")
    if key is not None:
        check_key(key)
        each = jax.vmap(lambda i: jax.random.fold_in(key, i))(np.arange(images, dtype=np.uint32))
        return rows | {"key": each}, None
    seeds, indices = image_seeds(seed, images, 2**32 if kind is None else 2**64)
    return rows | {"seed": seeds.astype(np.uint32), "index": indices}, [int(s) for s in seeds]


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
"""A ``PIL.Image``, an array ``[H,W,C]`` or ``[B,H,W,C]`` (uint8, or floating-point in [0, 1]), or a list of these."""


def pixels(
    images: ImageInput,
    size: tuple[int, int] | None,
    name: str,
    *,
    multiple: int = 1,
    holes: bool = False,
    channels: int = 3,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> Any:
    """Images as float32 ``[N,H,W,channels]`` in [0, 1]; a batch that is on a device in this size stays there.

    Args:
      images: see :data:`ImageInput`; PIL images are converted with :func:`diffuse_jax.images.rgb`, and resized.
      size: the target (height, width); None means that of the first image, rounded down to ``multiple``.
      name: name of the argument, for error messages.
      multiple: height and width must be divisible by this.
      holes: arrays may also have pixels of -1 (:func:`~diffuse_jax.control_images.inpaint_condition`).
      channels: 3, or 1 for images in grey; only arrays have other numbers.
      resample: Pillow's filter.

    Raises:
      TypeError: an element is not an image.
      ValueError: an array does not have the shape (height, width, channels) or has values outside [0, 1], or a PIL
        image has values of unknown range.
    """
    size = image_size(images, name, multiple) if size is None else size
    if stays_on_device(images) and images.shape[1:] == (*size, channels):
        return _pixels_on_device(images, name, holes)
    return np.stack([_pixels(image, size, channels, name, holes, resample) for image in image_list(images, name)])


def eight_bit(images: ImageInput, name: str) -> list[np.ndarray]:
    """Images as uint8 ``[H,W,3]``, each in its own size, as image processors take them; errors as of :func:`pixels`."""
    return [np.rint(np.asarray(pixels(one, None, name)[0]) * 255).astype(np.uint8) for one in image_list(images, name)]


def stays_on_device(array: Any) -> bool:
    """Whether an array can go from its device to the program. Those on explicit axes go through host memory, because
    operations on them would have to say how their results are sharded."""
    mesh = getattr(getattr(array, "sharding", None), "mesh", None)
    return isinstance(array, jax.Array) and (mesh is None or mesh.are_all_axes_auto or len(array.devices()) == 1)


def _pixels_on_device(images: jax.Array, name: str, holes: bool) -> jax.Array:
    """A batch ``[N,H,W,C]`` as float32 in [0, 1], with ``holes`` also -1. Only one bool leaves the device."""
    if images.dtype == np.uint8:
        return _to_unit(images)
    if not jax.numpy.issubdtype(images.dtype, np.floating) or not bool(jax.device_get(_in_range(images, holes))):
        raise ValueError(f"{name} as an array must be uint8, or floating-point in [0, 1]; got {images.dtype}")
    return images.astype(np.float32)


_to_unit = jax.jit(lambda x: x.astype(np.float32) / 255)
_in_range = jax.jit(lambda x, holes: jax.numpy.all(((x >= 0) & (x <= 1)) | (holes & (x == -1))), static_argnums=1)
_signed = jax.jit(lambda x: x * 2 - 1)
_repeat = jax.jit(lambda x, times: jax.numpy.repeat(x, times, axis=0), static_argnums=1)
"""Compiled, so that numbers in them are no transfers to the device."""


def signed(images: Any) -> Any:
    """Images in [0, 1] as networks take them, in [-1, 1]; on the device if they are there."""
    return _signed(images) if isinstance(images, jax.Array) else images * 2 - 1


def mask_pixels(
    masks: ImageInput,
    size: tuple[int, int],
    name: str,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> np.ndarray:
    """Masks as float32 ``[N,H,W,1]``: 1 where a value is at least one half (the region to repaint), 0 elsewhere.

    Masks are given like the images of :func:`pixels`, or as arrays of bools or of the integers 0 and 1.

    Raises:
      ValueError, TypeError: as for :func:`pixels`, or a PIL mask has the values 0 and 1, where white would be 255.
    """
    return (mask_shades(masks, size, name, resample) >= 0.5).astype(np.float32)


def mask_shades(
    masks: ImageInput,
    size: tuple[int, int],
    name: str,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> np.ndarray:
    """Masks as float32 ``[N,H,W,1]`` from 0 to 1, as they are given; errors as of :func:`mask_pixels`."""
    shades = lambda mask: _pixels(_binary_as_float(mask, name), size, 1, name, resample=resample)
    return np.stack([shades(mask) for mask in image_list(masks, name)])


def _binary_as_float(mask: Any, name: str) -> Any:
    """A binary mask (False and True, or the integers 0 and 1) as float32 in [0, 1]; other masks unchanged."""
    if isinstance(mask, Image.Image):
        if mask.mode == "L" and mask.getextrema()[1] == 1:
            raise ValueError(
                f"{name} has values from 0 to 1, where white is 255, so it would be black; multiply it by 255"
            )
        return mask
    array = np.asarray(mask)
    binary = array.dtype == bool or (np.issubdtype(array.dtype, np.integer) and np.isin(array, (0, 1)).all())
    return array.astype(np.float32) if binary else array


def image_list(images: ImageInput, name: str) -> list[Any]:
    """One image, several, or a batch, as a list of ``PIL.Image`` and of arrays ``[H,W,C]`` or ``[H,W]``.

    Raises:
      TypeError: there is no image, or something that is not an image.
    """
    return [one for found in whole_images(images, name) for one in (found if is_batch(found) else [found])]


def image_sizes(images: ImageInput, name: str) -> list[tuple[int, int]]:
    """Height and width in pixels of each of the images of :func:`image_list`; batches on a device are not touched."""
    sizes: list[tuple[int, int]] = []
    for found in whole_images(images, name):
        if isinstance(found, Image.Image):
            sizes.append(upright_size(found))
        else:
            sizes += [found.shape[1:3]] * len(found) if is_batch(found) else [found.shape[:2]]
    return sizes


def is_batch(image: Any) -> bool:
    """Whether it is an array ``[B,H,W,C]``."""
    return not isinstance(image, Image.Image) and image.ndim == 4


def whole_images(images: ImageInput, name: str) -> list[Any]:
    """The ``PIL.Image`` and arrays ``[H,W]``, ``[H,W,C]`` or ``[B,H,W,C]`` that were given, as one list.

    Raises:
      TypeError: as of :func:`image_list`.
    """
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, Sequence) and not isinstance(images, str) and images:
        return [image for item in images for image in whole_images(item, name)]
    if isinstance(images, np.ndarray | jax.Array) and (images.ndim in (2, 3) or (images.ndim == 4 and len(images))):
        return [images]
    given = f"an array of shape {tuple(images.shape)}" if hasattr(images, "shape") else type(images).__name__
    given = f"an empty {given}" if isinstance(images, list | tuple) else given
    if type(images).__module__ == "torch":
        given = "a tensor of PyTorch; channel-last it is an array: x.permute(0, 2, 3, 1).numpy(), with values in [0, 1]"
    raise TypeError(f"{name} must be a PIL image, an array [H,W,3] or [B,H,W,3], or a list of them, got {given}")


def image_size(images: ImageInput, name: str, multiple: int) -> tuple[int, int]:
    """Height and width of the first image in pixels, rounded down to a multiple of ``multiple``.

    Raises:
      ValueError: a side is smaller than ``multiple``.
    """
    height, width = image_sizes(images, name)[0]
    if height < multiple or width < multiple:
        raise ValueError(f"{name} is {height}x{width}; it must be at least {multiple}x{multiple} pixels")
    return height // multiple * multiple, width // multiple * multiple


MODES = {1: "L", 3: "RGB"}
"""Number of channels -> Pillow's mode."""


def _pixels(
    image: Any,
    size: tuple[int, int],
    channels: int,
    name: str,
    holes: bool = False,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> np.ndarray:
    """One image as float32 ``[H,W,C]`` in [0, 1], with ``holes`` also -1."""
    height, width = size
    if isinstance(image, Image.Image):
        if channels not in MODES:
            raise ValueError(f"{name} must be an array of {channels} channels, got a PIL image of mode {image.mode!r}")
        image = upright(image) if image.mode in ("RGB", "L") else rgb(image, name)
        if image.size != (width, height):
            image = image.resize((width, height), resample)
        array = np.asarray(image.convert(MODES[channels]), np.float32) / 255
        return array[..., None] if array.ndim == 2 else array
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    if array.shape != (height, width, channels):
        raise ValueError(
            f"{name} must be {height}x{width} with {channels} channels (channel-last), got an array of shape "
            f"{array.shape}; resize it first, or pass a PIL image"
        )
    if array.dtype == np.uint8:
        if array.max(initial=0) == 1:
            warn(
                f"{name} as uint8 has values from 0 to 1, where white is 255, so it is almost black; multiply it by "
                "255, or pass floating-point values in [0, 1]"
            )
        return array.astype(np.float32) / 255
    shades = array[array != -1] if holes else array
    if not np.issubdtype(array.dtype, np.floating) or not np.all((shades >= 0) & (shades <= 1)):
        raise ValueError(
            f"{name} as an array must be uint8, or floating-point in [0, 1]; got {array.dtype} from "
            f"{array.min()} to {array.max()}"
        )
    return array.astype(np.float32)


def per_prompt(array: Any, images: int, copies: int, name: str) -> Any:
    """One row per image, from an array with a single row for all, one per prompt, or one for each of the ``images``.

    Raises:
      ValueError: the number of rows is none of these.
    """
    prompts = images // copies
    if len(array) == images:
        return array
    if len(array) not in (1, prompts):
        raise ValueError(
            f"{name} has {len(array)} images for {prompts} prompts with {copies} images each; give one, or one "
            "per prompt"
        )
    times = copies if len(array) == prompts else images
    return _repeat(array, times) if isinstance(array, jax.Array) else np.repeat(array, times, axis=0)
