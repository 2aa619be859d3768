"""Run a request: pad to one of a few batch sizes, place on the mesh, run as one program or step by step, trim."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from PIL import Image

from diffuse_jax.bounds import whole
from diffuse_jax.messages import brief
from diffuse_jax.pipelines import method as methods
from diffuse_jax.pipelines.adapting import live_part
from diffuse_jax.pipelines.method import Method, Params, Rows
from diffuse_jax.pipelines.parts.safety import FLAGGED, warn_of_flagged
from diffuse_jax.pipelines.placement import REPLICATED, ROWS, params_on_devices, place_plan, place_rows
from diffuse_jax.pipelines.programs import signature_of
from diffuse_jax.rounding import power_of_two
from diffuse_jax.schedulers.plan import Plan
from diffuse_jax.sharding import readable

StepCallback = Callable[[Any, int, float, dict[str, jax.Array]], dict[str, jax.Array] | None]
"""``callback(pipe, step, timestep, {"latents": [B, ...]})``. If it returns a dict with "latents", they replace the
latents. ``B`` is the number of images in the device call: all of them, or at most ``batch_size``."""


class Request(NamedTuple):
    """A checked call, ready to run. As a pure function, the run of a request ``r`` is
    ``diffuse_jax.sample(r.method, pipe.params, r.rows, r.plan)``.

    Attributes:
      method: the parts that make up the run.
      rows: the data, one row per image, in host memory.
      plan: the sampler's plan.
      output_type: the form in which images are returned: "pil", "np", "jax" or "latent".
      seeds: the seed of each image; None if the caller gave ``key``.
      copies: number of images per prompt.
      finish: ``images -> images``, what the host does to the images at the end (a list of PIL images, or an array
        ``[B,H,W,3]``); None if nothing.
    """

    method: Method
    rows: Rows
    plan: Plan
    output_type: str = "pil"
    seeds: list[int] | None = None
    copies: int = 1
    finish: Callable[[Any], Any] | None = None

    @property
    def images(self) -> int:
        """The number of images."""
        return len(jax.tree.leaves(self.rows)[0])


Modifier = Callable[[Request, Any], Request]
"""``(request, pipe) -> request``: what a call changes about a run; see :mod:`~diffuse_jax.pipelines.modifiers`."""


@dataclasses.dataclass(frozen=True)
class Output:
    """The output of a call. Results are attributes: ``out.images``, and whatever else the method's decoder returns.

    Attributes:
      results: name -> result. Depending on ``output_type``, ``images`` is a list of ``PIL.Image`` ("pil"), float32
        ``[B,H,W,3]`` in [0, 1] ("np", or as a ``jax.Array`` that stays on the device with "jax"), or a ``jax.Array`` of
        latents ``[B,h,w,c]`` ("latent"). Other results are ``jax.Array`` with one row per image, those of pipelines
        that make no images NumPy's with "np"; ``trajectory`` is float32 ``[B,evaluations + 1, ...]``.
        ``nsfw_content_detected`` is a list with a bool per image, or None if the images were not checked.
      seeds: the seed of each image; None if the caller gave ``key``.
    """

    results: dict[str, Any]
    seeds: list[int] | None = None

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name in self.results:
            return self.results[name]
        if name == FLAGGED:
            return None
        raise AttributeError(f"the output has no {name!r}; it has {', '.join(self.__dict__.get('results', ()))}")

    def keys(self) -> tuple[str, ...]:
        """The names of the results: ``pipe(**prior(...))`` passes them on as arguments."""
        return tuple(self.results)

    def __getitem__(self, name: str) -> Any:
        return self.results[name]

    def to_tuple(self) -> tuple[Any, ...]:
        """The results in the order of :meth:`keys`."""
        return tuple(self.results.values())

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.results]


def run(
    pipe: Any,
    request: Request,
    *,
    batch_size: int | None = None,
    callback_on_step_end: StepCallback | None = None,
    progress_bar: bool = False,
    return_trajectory: bool = False,
) -> Output:
    """Run a request with a pipeline's networks: as one program, or step by step if the host must act between steps.

    Only the parameters that the method reads are passed to the program. Offloaded ones (see
    :meth:`DiffusionPipeline.offload <diffuse_jax.pipelines.DiffusionPipeline.offload>`) are on the device only during
    the run.

    Args:
      pipe: the pipeline.
      request: the request.
      batch_size: maximum number of images per device call; all at once if None.
      callback_on_step_end: called after each evaluation with the latents of the images, without padding.
      progress_bar: show a progress bar.
      return_trajectory: return the sample before each evaluation and after the last one as ``trajectory``.

    Raises:
      ValueError: the rows do not fit the method, or ``batch_size`` is not positive. Nothing has been compiled.
      TypeError: the callback is no function, likewise.
    """
    check_running(batch_size, callback_on_step_end)
    methods.check_rows(request.method, request.rows)
    params, results = params_on_devices(pipe, request.method.networks), []
    by_steps = callback_on_step_end is not None or progress_bar or return_trajectory
    for images, chunk in chunks(pipe, request.rows, request.images, batch_size):
        rows, plan = place_rows(pipe.mesh, chunk), place_plan(pipe.mesh, request.plan)
        if by_steps:
            callback = None if callback_on_step_end is None else _without_padding(callback_on_step_end, pipe, images)
            found = _run_by_steps(pipe, request.method, params, rows, plan, callback, progress_bar, return_trajectory)
        else:
            program = _program(pipe, methods.sample, request.method, (ROWS, REPLICATED), params, (rows, plan))
            found = program(params, rows, plan)
        results.append(found)
    found = to_output_type(results, request.images, request.output_type)
    if FLAGGED in found:
        found[FLAGGED] = np.asarray(readable(found[FLAGGED])).tolist()
        warn_of_flagged(found[FLAGGED])
    if request.finish is not None:
        found["images"] = request.finish(found["images"])
    return Output(found, request.seeds)


def check_running(batch_size: int | None = None, callback_on_step_end: Any = None, **others: Any) -> None:
    """Check how a request is to be run, before there is one; making it runs the first stage of a pipeline of several.

    Raises:
      ValueError: ``batch_size`` is not positive.
      TypeError: the callback is no function.
    """
    check_callback(callback_on_step_end, "callback_on_step_end")
    if batch_size is not None and whole(batch_size, "batch_size") < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def check_callback(callback: Any, name: str) -> None:
    """Refuse a callback that is no function, by its argument's name, with ``TypeError``."""
    if callback is not None and not callable(callback):
        raise TypeError(f"{name} must be a function, got {brief(callback)}")


def device_call(pipe: Any, request: Request, begin: int, end: int, size: int) -> tuple[Any, Callable[[], Any]]:
    """The program of a device call, compiled, and the call: ``images [begin, end)`` of a request, padded to ``size``.

    The call returns at once with arrays that are being computed, one row per image and for the padding.

    Args:
      pipe: the pipeline.
      request: the request; :func:`~diffuse_jax.pipelines.method.check_rows` has passed it.
      begin, end: the images.
      size: the number of images that the program takes, a multiple of the devices along ``data``.
    """
    params = params_on_devices(pipe, request.method.networks)
    part = jax.tree.map(lambda array: _pad(_part(array, begin, end), size), request.rows)
    rows, plan = place_rows(pipe.mesh, part), place_plan(pipe.mesh, request.plan)
    program = _program(pipe, methods.sample, request.method, (ROWS, REPLICATED), params, (rows, plan))
    return program, lambda: program(params, rows, plan)


def compile_request(pipe: Any, request: Request, batch_size: int | None = None) -> None:
    """Compile the program of a request without running it."""
    methods.check_rows(request.method, request.rows)
    params = params_on_devices(pipe, request.method.networks)
    for _, chunk in chunks(pipe, request.rows, request.images, batch_size):
        arguments = place_rows(pipe.mesh, chunk), place_plan(pipe.mesh, request.plan)
        _program(pipe, methods.sample, request.method, (ROWS, REPLICATED), params, arguments)


def apply(pipe: Any, fn: Callable[..., Any], part: Any, rows: Rows) -> Any:
    """Compile and run ``fn(part, params, rows)`` as a separate program, for work outside a run such as encoding
    prompts.

    Args:
      pipe: the pipeline.
      fn: a module-level function that returns a tree of arrays with one row per image.
      part: the part, which determines the parameters that are passed.
      rows: the data, one row per image.
    """
    part, extra = live_part(pipe, part)
    names = tuple(dict.fromkeys(name for net in methods.networks_of(part) for name in net.reads))
    params, count, results = params_on_devices(pipe, names) | extra, len(jax.tree.leaves(rows)[0]), []
    for _, chunk in chunks(pipe, rows, count, None):
        arguments = (place_rows(pipe.mesh, chunk),)
        results.append(_program(pipe, fn, part, (ROWS,), params, arguments)(params, *arguments))
    return concatenated(results, count)


def _run_by_steps(
    pipe: Any,
    method: Method,
    params: Params,
    rows: Rows,
    plan: Plan,
    callback: Callable[[int, float, jax.Array], jax.Array] | None,
    bar: bool,
    return_trajectory: bool,
) -> dict[str, Any]:
    """The same computation as the single program, with control returning to the host after each step."""
    from tqdm.auto import tqdm

    begin = _program(pipe, methods.begin, method, (ROWS, REPLICATED), params, (rows, plan))
    rows, state = begin(params, rows, plan)
    trajectory = [state.sample]
    step_args = lambda i: (rows, plan, state, np.int32(i))
    advance = _program(pipe, methods.advance, method, (ROWS, REPLICATED, ROWS, REPLICATED), params, step_args(0))
    for i in tqdm(range(int(plan.num_evaluations)), disable=not bar):
        state = advance(params, *step_args(i))
        if callback is not None:
            state = state._replace(sample=callback(i, float(plan.timesteps[i]), state.sample))
        trajectory += [state.sample] if return_trajectory else []
    finish = _program(pipe, methods.finish, method, (ROWS, ROWS), params, (rows, state))
    results = finish(params, rows, state)
    return results | {"trajectory": jnp.stack(trajectory, 1)} if return_trajectory else results


def _without_padding(callback: StepCallback, pipe: Any, images: int) -> Callable[[int, float, jax.Array], jax.Array]:
    """The user's callback as ``(i, timestep, sample) -> sample to continue with``; it does not see the padding rows."""

    def on_step_end(i: int, timestep: float, sample: jax.Array) -> jax.Array:
        unpadded = sample if len(sample) == images else sample[:images]
        latents = (callback(pipe, i, timestep, {"latents": unpadded}) or {}).get("latents")
        if latents is None or latents is unpadded:
            return sample
        if np.shape(latents) != unpadded.shape:
            raise ValueError(
                f"callback_on_step_end returned latents of shape {np.shape(latents)}, expected {unpadded.shape}"
            )
        return jax.device_put(_pad(jnp.asarray(latents, sample.dtype), len(sample)), sample.sharding)

    return on_step_end


def _program(
    pipe: Any, fn: Any, method: Any, specs: tuple[PartitionSpec, ...], params: Params, args: tuple[Any, ...]
) -> Any:
    signature = pipe.signature_of(params), signature_of(args)
    return pipe.programs.get(fn, method, pipe.mesh, (REPLICATED, *specs), (params, *args), signature)


# Batches


def chunks(pipe: Any, rows: Rows, count: int, batch_size: int | None) -> Iterator[tuple[int, Rows]]:
    """Split rows into chunks of at most ``batch_size`` images, each padded to the same size; yields ``(number of images
    without padding, padded rows)``."""
    devices = 1 if pipe.mesh is None else pipe.mesh.shape["data"]
    check_running(batch_size)
    size = padded_size(count if batch_size is None else min(batch_size, count), devices)
    for begin in range(0, count, size):
        padded = jax.tree.map(lambda array, b=begin: _pad(_part(array, b, b + size), size), rows)
        yield min(size, count - begin), padded


def padded_size(images: int, devices: int) -> int:
    """The smallest ``devices * 2**k`` that is at least ``images``: few sizes mean few compilations."""
    return devices * power_of_two(-(-images // devices))


def _pad(array: Any, size: int) -> Any:
    """Pad to ``size`` rows by repeating the last row; the results of the padding are discarded."""
    if len(array) == size:
        return array
    return _grown(array, size) if isinstance(array, jax.Array) else np.concatenate(_with_last(array, size, np))


def _with_last(array: Any, size: int, xp: Any) -> tuple[Any, Any]:
    return array, xp.broadcast_to(array[-1:], (size - len(array), *array.shape[1:]))


_grown = jax.jit(lambda array, size: jnp.concatenate(_with_last(array, size, jnp)), static_argnums=1)
"""Padded on the device, without a transfer."""


def _part(array: Any, begin: int, end: int) -> Any:
    """Some rows of an array; of a device's without a transfer."""
    end = min(end, len(array))
    if (begin, end) == (0, len(array)):
        return array
    return jax.lax.slice_in_dim(array, begin, end) if isinstance(array, jax.Array) else array[begin:end]


# Results


def concatenated(results: Sequence[Any], count: int) -> Any:
    """The concatenated results of all chunks, without padding."""
    whole = results[0] if len(results) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)
    return jax.tree.map(lambda array: _part(array, 0, count), whole)


def to_output_type(results: Sequence[dict[str, Any]], count: int, output_type: str) -> dict[str, Any]:
    """Results by name, without padding; images in the requested form."""
    if output_type in ("latent", "jax"):
        return concatenated(results, count)
    images = [found["images"] for found in results if "images" in found]
    rest = concatenated([{k: v for k, v in found.items() if k != "images"} for found in results], count)
    if not images:
        return jax.tree.map(lambda x: np.asarray(readable(x)), rest) if output_type == "np" else rest
    array = np.concatenate([np.asarray(readable(part)) for part in images])[:count]
    return {"images": as_images(array) if output_type == "pil" else array, **rest}


def as_images(array: np.ndarray) -> list[Image.Image]:
    """uint8 ``[B,H,W,3]`` (or one channel) as a list of PIL images."""
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in array]
