"""Rewards: functions that say how good images are, ``(images [B,H,W,3] in [0, 1], prompts) -> [B]``.

The library's own are the size of a JPEG file (Black et al. 2023, arXiv 2305.13301, section 5.1), which only the host
can compute, and an aesthetic predictor on CLIP's image embeddings. Any function of the user's is a reward too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffuse_jax.messages import warn
from diffuse_jax.models import CLIPVisionModelWithProjection, Params
from diffuse_jax.models.clip_vision import unit
from diffuse_jax.processors import CLIPImageProcessor
from diffuse_jax.training.settings import RewardSettings
from diffuse_jax.weights import WeightsError, read_checkpoint

JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward as the trainers call it.

    Attributes:
      name: what messages call it.
      function: ``(params, images, prompts) -> [B]`` with ``images`` float32 ``[B,H,W,3]`` in [0, 1]. DDPO gives it
        arrays and the prompts as a list of texts. DRaFT traces it, with what ``encode`` made of the prompts.
      params: arrays that it needs, which stay as they are.
      encode: ``texts -> {name: array [B, ...]}`` on the host, for rewards with a gradient that depend on the prompts;
        without it, they get None for prompts.
      host: JAX cannot trace it.
    """

    name: str
    function: Callable[[Params, Any, Any], Any]
    params: Params = dataclasses.field(default_factory=dict)
    encode: Callable[[Sequence[str]], Mapping[str, Any]] | None = None
    host: bool = False


def reward_from(settings: RewardSettings) -> Reward:
    """The reward that the settings name.

    Raises:
      ValueError: there is no such function, or it cannot be imported.
      WeightsError: the files of the aesthetic predictor have no, or other networks.
    """
    if settings.reward == "jpeg_incompressibility":
        return Reward(settings.reward, lambda params, images, prompts: jpeg_sizes(images), host=True)
    if settings.reward == "jpeg_compressibility":
        return Reward(settings.reward, lambda params, images, prompts: -jpeg_sizes(images), host=True)
    if settings.reward == "aesthetic":
        assert settings.aesthetic_model_path is not None  # the settings checked it
        assert settings.clip_model_path is not None
        return aesthetic(settings.aesthetic_model_path, settings.clip_model_path)
    function = function_from(settings.reward)
    call = lambda params, images, prompts: function(images, prompts)
    return Reward(settings.reward, call, encode=getattr(function, "encode", None))


def function_from(name: str) -> Callable[..., Any]:
    """The user's function, ``module:function`` or ``path.py:function``.

    Raises:
      ValueError: there is no such module or function, or importing it fails.
    """
    where, _, attribute = name.rpartition(":")
    path = Path(where).expanduser()
    try:
        if path.suffix == ".py":
            if not path.is_file():
                raise ValueError(f"there is no file {path}")
            spec = importlib.util.spec_from_file_location(f"reward_of_{path.stem}", path)
            assert spec is not None
            assert spec.loader is not None
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == where
        advice = f"; if it is a file, give {where.replace('.', '/')}.py:{attribute}" if missing else ""
        raise ValueError(f"the reward {name!r} cannot be imported: {_first_line(error)}{advice}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"the reward {name!r} is no function: {where} has no callable {attribute!r}")
    return function


def jpeg_sizes(images: Any) -> np.ndarray:
    """The sizes of images ``[B,H,W,3]`` in [0, 1] as JPEG files of quality 95, in units of 1000 bytes, float32
    ``[B]``."""
    sizes = []
    for image in np.round(np.asarray(images, np.float32) * 255).clip(0, 255).astype(np.uint8):
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=JPEG_QUALITY)
        sizes.append(len(file.getvalue()) / 1000)
    return np.array(sizes, np.float32)


def aesthetic(path: str | Path, clip: str | Path) -> Reward:
    """An aesthetic predictor: linear layers on CLIP's image embeddings of length one, differentiable.

    Args:
      path: ``.safetensors`` or ``.pth`` file with ``weight [out,in]`` and ``bias [out]`` of the layers under numbered
        names, as in LAION's improved predictor (``layers.0.weight`` ...; Schuhmann et al. 2022), or of one layer.
      clip: folder of a CLIP vision encoder with its projection, as transformers writes it.

    Raises:
      WeightsError: one of them cannot be read or is another network, or the layers do not follow each other or CLIP's
        embeddings; the message names the flag.
    """
    with _named("--clip_model_path must be the folder of a CLIPVisionModelWithProjection"):
        network, params = CLIPVisionModelWithProjection.from_pretrained(clip)
    with _named("--aesthetic_model_path must be a file with linear layers"):
        layers = read_layers(path, network.config.projection_dim)
    edge = network.config.image_size

    @jax.jit
    def rate(params: Params, images: Any) -> jax.Array:
        x = clip_pixels(jnp.asarray(images, jnp.float32), edge)
        x = unit(network.apply({"params": params["clip"]}, x).image_embeds)
        for layer in params["layers"]:
            x = x @ layer["kernel"] + layer["bias"].reshape(1, -1)
        return x[:, 0]

    return Reward("aesthetic", lambda params, images, prompts: rate(params, images), {"clip": params, "layers": layers})


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Errors of reading weights, with what should be there before them."""
    try:
        yield
    except (WeightsError, OSError) as error:
        raise WeightsError(f"{what}: {error}") from error


def read_layers(path: str | Path, width: int) -> list[dict[str, np.ndarray]]:
    """The linear layers of a file in the order of their numbers, ``{"kernel": [in,out], "bias": [out]}``.

    Raises:
      WeightsError: there are none, their sizes do not go from ``width`` to 1, or a bias has another size.
    """
    tensors = read_checkpoint([Path(path)]).tensors
    names = [name.removesuffix("weight") for name, x in tensors.items() if name.endswith("weight") and x.ndim == 2]
    order = lambda name: [int(part) for part in name.split(".") if part.isdigit()]
    layers = []
    for name in sorted(names, key=order):
        kernel = np.asarray(tensors[f"{name}weight"], np.float32).T
        bias = np.asarray(tensors.get(f"{name}bias", np.zeros(kernel.shape[1])), np.float32)
        if bias.shape != kernel.shape[1:]:
            raise WeightsError(f"{path}: {name}bias has the shape {bias.shape}, {name}weight {kernel.shape[::-1]}")
        layers.append({"kernel": np.ascontiguousarray(kernel), "bias": bias})
    sizes = [width, *(layer["kernel"].shape[1] for layer in layers)]
    if not layers or [layer["kernel"].shape[0] for layer in layers] != sizes[:-1] or sizes[-1] != 1:
        found = ", ".join("x".join(map(str, layer["kernel"].shape)) for layer in layers) or "none"
        raise WeightsError(
            f"{path}: an aesthetic predictor has linear layers from CLIP's {width} features to 1; this has {found}"
        )
    return layers


def clip_pixels(images: jax.Array, edge: int) -> jax.Array:
    """Images ``[B,H,W,3]`` in [0, 1] as CLIP sees them: the shorter side resized to ``edge``, the middle square of it,
    normalised."""
    batch, height, width, channels = images.shape
    scale = edge / min(height, width)
    size = max(round(height * scale), edge), max(round(width * scale), edge)
    resized = jnp.clip(jax.image.resize(images, (batch, *size, channels), "cubic"), 0, 1)
    top, left = (size[0] - edge) // 2, (size[1] - edge) // 2
    mean, std = (jnp.array(v, jnp.float32).reshape(1, 1, 1, 3)
                 for v in (CLIPImageProcessor.image_mean, CLIPImageProcessor.image_std))  # fmt: skip
    return (resized[:, top : top + edge, left : left + edge] - mean) / std


def check_reward(reward: Reward, gradient: bool, size: tuple[int, int], prompts: Sequence[str]) -> None:
    """Try a reward on two images of random colours, before anything is trained.

    Args:
      reward: the reward.
      gradient: whether it is to be differentiated.
      size: (height, width) of the images.
      prompts: some prompts.

    Raises:
      ValueError: it fails, returns another shape or values that are not finite, or has no gradient where one is needed.
    """
    texts = [prompts[k % len(prompts)] for k in range(2)]
    images = np.random.default_rng(0).random((2, *size, 3), np.float32)
    if not gradient:
        values_of(reward, images, texts)
        return
    if reward.host:
        raise ValueError(f"--reward {reward.name} is computed on the host and has no gradient: use --method ddpo")
    given = None if reward.encode is None else reward.encode(texts)
    try:
        shape = jax.eval_shape(lambda images: reward.function(reward.params, images, given), images)
    except Exception as error:
        raise ValueError(
            f"the reward {reward.name} cannot be differentiated by JAX ({_first_line(error)}); use --method ddpo, or "
            "write it with jax.numpy; its prompts are what its attribute `encode` makes of them, or None"
        ) from error
    if getattr(shape, "shape", None) != (2,) or not jnp.issubdtype(shape.dtype, jnp.floating):
        raise ValueError(f"the reward {reward.name} must return floating-point [2] for 2 images, got {shape}")

    def total(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = reward.function(reward.params, images, given)
        return values.sum(), values

    (_, values), slope = jax.value_and_grad(total, has_aux=True)(jnp.asarray(images))
    _check_finite(reward, values)
    if not np.isfinite(slope).all():
        raise ValueError(f"the gradient of the reward {reward.name} is not finite; use --method ddpo, or mend it")
    if not np.any(slope):
        warn(f"the gradient of the reward {reward.name} is zero for images of random colours: nothing may be learned")


def values_of(reward: Reward, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """The rewards of images, float32 ``[B]``; for DDPO.

    Raises:
      ValueError: it fails, or does not return one finite number for each image.
    """
    try:
        found = np.asarray(reward.function(reward.params, images, list(prompts)), np.float32)
    except Exception as error:
        raise ValueError(f"the reward {reward.name} failed: {_first_line(error)}") from error
    if found.shape != (len(images),):
        raise ValueError(
            f"the reward {reward.name} must return one number for each of {len(images)} images, got {found.shape}"
        )
    _check_finite(reward, found)
    return found


def _check_finite(reward: Reward, values: Any) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"the reward {reward.name} is not finite: {np.asarray(values).tolist()[:8]}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
