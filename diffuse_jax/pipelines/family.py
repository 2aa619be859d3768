"""A family: how a kind of checkpoint is conditioned. Add one as a file in ``families/``; every task works with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from diffuse_jax.messages import brief
from diffuse_jax.pipelines.inputs import LONGEST_SIDE, noise_rows, number_of_prompts, pixel_size
from diffuse_jax.pipelines.method import Method, Rows
from diffuse_jax.pipelines.options import check_names
from diffuse_jax.pipelines.running import Request
from diffuse_jax.schedulers import Scheduler
from diffuse_jax.schedulers.plan import Plan

STEPS = 50


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of a call, after the checks that all families share.

    Attributes:
      options: every argument by name, including prompts; arguments that are None are left out.
      prompts: number of prompts.
      copies: images per prompt.
      size: (height, width) in pixels.
    """

    options: Mapping[str, Any]
    prompts: int
    copies: int
    size: tuple[int, int]

    @property
    def images(self) -> int:
        """Number of images."""
        return self.prompts * self.copies

    def get(self, name: str, default: Any = None) -> Any:
        """The value of an argument, or ``default`` if it was not given."""
        return self.options.get(name, default)


class Family(Protocol):
    """How a kind of checkpoint is conditioned: Stable Diffusion, SDXL ..."""

    @property
    def options(self) -> type:
        """A ``TypedDict`` of the arguments that its calls take."""

    @property
    def plan_options(self) -> tuple[str, ...]:
        """The names of the arguments that are passed on to the sampler's plan."""

    def rows(self, pipe: Any, call: Call) -> Rows:
        """The network's conditioning, one row per image."""

    def method(self, pipe: Any, call: Call, rows: Rows) -> Method:
        """The text-to-image method for these rows."""


def text_to_image(
    pipe: Any,
    options: Mapping[str, Any],
    size: tuple[int, int],
    *,
    scheduler: Scheduler | None = None,
    **plan_options: Any,
) -> Request:
    """The text-to-image request of a pipeline, starting from noise; the other tasks modify it.

    Args:
      pipe: a pipeline with a ``family``.
      options: the arguments of the call, including prompts and guidance scale.
      size: (height, width) in pixels.
      scheduler: the sampler; the pipeline's if None.
      **plan_options: further arguments of the sampler's plan, for example ``strength``.

    Raises:
      ValueError, TypeError: an argument is invalid or contradicts another one.
    """
    family = pipe.family
    named = {"prompt", "prompt_2", "guidance_scale"}
    check_names(type(pipe), {k: v for k, v in options.items() if k not in named}, family.options)
    given = {name: value for name, value in options.items() if value is not None}
    prompts = number_of_prompts(given.get("prompt"), given.get("prompt_embeds"))
    return request_of(pipe, given, prompts, size, scheduler=scheduler, **plan_options)


def request_of(
    pipe: Any,
    given: Mapping[str, Any],
    prompts: int,
    size: tuple[int, int],
    *,
    family: Family | None = None,
    scheduler: Scheduler | None = None,
    **plan_options: Any,
) -> Request:
    """The request for a number of prompts, from arguments that are not None; see :func:`text_to_image`.

    A stage of a pipeline has a ``family`` of its own; otherwise it is the pipeline's.

    Raises:
      ValueError: ``num_images_per_prompt`` is not positive, or as :func:`text_to_image`.
    """
    family, copies = family or pipe.family, given.get("num_images_per_prompt", 1)
    if copies < 1:
        raise ValueError(f"num_images_per_prompt must be at least 1, got {copies}")
    call = Call(given, prompts, copies, size)
    rows = family.rows(pipe, call)
    method = family.method(pipe, call, rows)
    noise, seeds = noise_rows(call.images, given, method.latent_shape, pipe.mesh)
    to_plan = {name: given[name] for name in family.plan_options if name in given}
    plan = make_plan(scheduler or pipe.scheduler, given, STEPS, **to_plan, **plan_options)
    return Request(method, rows | noise, plan, given.get("output_type", "pil"), seeds, copies)


def make_plan(scheduler: Scheduler, options: Mapping[str, Any], default_steps: int, **more: Any) -> Plan:
    """The sampler's plan for the ``num_inference_steps``, ``timesteps``, ``sigmas`` and ``eta`` of a call."""
    steps, timesteps, sigmas = (options.get(name) for name in ("num_inference_steps", "timesteps", "sigmas"))
    if steps is None and timesteps is None and sigmas is None:
        steps = default_steps
    more = {name: value for name, value in (more | {"eta": options.get("eta")}).items() if value is not None}
    return scheduler.plan(steps, timesteps=timesteps, sigmas=sigmas, **more)


def default_steps(options: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The options with a number of steps, unless they say how many or which."""
    given = any(options.get(name) is not None for name in ("num_inference_steps", "timesteps", "sigmas"))
    return dict(options) if given else {**options, "num_inference_steps": steps}


OUTPUTS = ("pil", "np", "jax", "latent")


def check_output(output_type: str) -> str:
    """Return ``output_type`` if it is one of ``OUTPUTS``.

    Raises:
      ValueError: it is not.
    """
    if not isinstance(output_type, str) or output_type not in OUTPUTS:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUTS)}, got {brief(output_type)}")
    return output_type


def output_size(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """The image size (height, width) in pixels; a side that is None defaults to the checkpoint's.

    Raises:
      ValueError: a side is not a positive multiple of the autoencoder's downsampling factor, or without an autoencoder
        of the UNet's (the message gives the nearest valid sizes); it is too large (:func:`pixel_size
        <diffuse_jax.pipelines.inputs.pixel_size>`); or the checkpoint has no default.
    """
    vae = pipe.components.get(autoencoder_name(pipe))
    scale = 1 if vae is None else vae.config.scale
    multiple = pipe.components["unet"].config.divisor if vae is None else scale
    default = pipe.components["unet"].config.sample_size
    default = (default, default) if default is None or isinstance(default, int) else default
    sizes = []
    for name, given, latents in zip(("height", "width"), (height, width), default, strict=True):
        if given is None and latents is None:
            raise ValueError(f"the checkpoint has no default size (sample_size); give {name}")
        size = latents * scale if given is None else given
        if size > LONGEST_SIDE:
            raise ValueError(f"{name} must be at most {LONGEST_SIDE}, got {brief(size)}")
        if size < multiple or size % multiple:
            below = max(multiple, size // multiple * multiple)
            raise ValueError(f"{name} must be a multiple of {multiple}, got {size}; try {below} or {below + multiple}")
        sizes.append(int(size))
    return pixel_size(*sizes)


def autoencoder_name(pipe: Any) -> str:
    """The name of the component that encodes and decodes latents: the family's ``autoencoder``, or ``vae``."""
    return getattr(pipe.family, "autoencoder", "vae")


def one_width(pipe: Any, fields: Mapping[str, str]) -> int:
    """The width of the embeddings that components exchange.

    Args:
      pipe: the pipeline.
      fields: component -> the field of its configuration; those that the pipeline does not have are left out.

    Raises:
      ValueError: two of them have different widths.
    """
    there = {name: pipe.components[name] for name in fields if pipe.components.get(name) is not None}
    widths = {name: getattr(network.config, fields[name]) for name, network in there.items()}
    first, width = next(iter(widths.items()))
    for name, found in widths.items():
        if found != width:
            raise ValueError(f"the {name} has embeddings of width {found}, and the {first} of width {width}")
    return int(width)


def asks_for_guidance(call: Call) -> bool:
    """Whether a guidance scale is above 1; at 1 and below there is no guidance."""
    return bool(np.any(np.asarray(call.get("guidance_scale")) > 1))


def given_rows(rows: Mapping[str, Any] | None, images: int) -> Rows:
    """The rows that the caller passed, as arrays, or as trees of them (dicts, ``Branches``).

    Raises:
      ValueError: a row does not have one entry per image, or holds no numbers.
    """
    is_array = lambda value: isinstance(value, list | tuple)
    found = {name: jax.tree.map(_as_array, value, is_leaf=is_array) for name, value in (rows or {}).items()}
    for path, value in jax.tree_util.tree_leaves_with_path(found):
        name = f"rows{jax.tree_util.keystr(path)}"
        if value.ndim == 0 or len(value) != images:
            raise ValueError(f"{name} must have one entry for each of {images} images, got {value.shape}")
        if isinstance(value, np.ndarray) and value.dtype.kind in "OUSMm":
            raise ValueError(f"{name} must be numbers, got {value!r}")
    return found


def _as_array(value: Any) -> Any:
    """An array on the host; keys of JAX cannot be there."""
    is_key = isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
    return value if is_key else np.asarray(value)
