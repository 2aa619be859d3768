"""From a prepared request to pictures: pad to a few sizes, place on the mesh, run one program or step by step, trim."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from diffuse_jax.models.base import Params
from diffuse_jax.pipelines import sampling
from diffuse_jax.pipelines.base import DiffusionPipeline
from diffuse_jax.pipelines.prompts import image_seeds
from diffuse_jax.pipelines.sampling import Draws, Task
from diffuse_jax.schedulers.plan import Plan
from diffuse_jax.sharding import readable, spans_processes

StepCallback = Callable[[Any, int, float, dict[str, jax.Array]], dict[str, jax.Array] | None]
"""``callback(pipe, step, timestep, {"latents": [B,h,w,c]})``; what it returns under "latents" replaces them."""

OUTPUTS = {"pil": "uint8", "np": "float", "latent": "latent"}
"""``output_type`` of a call -> what the program returns."""

ROWS, WHOLE = PartitionSpec("data"), PartitionSpec()


@dataclasses.dataclass(frozen=True)
class ImagePipelineOutput:
    """What a call gives.

    Attributes:
      images: by ``output_type``: "pil" a list of ``PIL.Image``, "np" float32 ``[B,H,W,3]`` in [0, 1], "latent" a
        ``jax.Array`` ``[B,h,w,c]``.
      seeds: the seed of each picture; None where the caller gave ``key``.
    """

    images: Any
    seeds: list[int] | None


@dataclasses.dataclass(frozen=True)
class Job:
    """A request, ready to run: what is compiled, its data for ``size`` pictures, and the sampler's plan."""

    task: Task
    batch: Any
    plan: Plan
    size: int
    seeds: list[int] | None


def program_output(output_type: str) -> str:
    """What the program returns for an ``output_type``.

    Raises:
      ValueError: there is no such type.
    """
    if output_type not in OUTPUTS:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUTS)}, got {output_type!r}")
    return OUTPUTS[output_type]


def make_draws(
    images: int,
    seed: int | Sequence[int] | None,
    key: jax.Array | None,
    latents: Any,
    latent_shape: tuple[int, int, int],
    mesh: Mesh | None = None,
) -> tuple[Draws, list[int] | None]:
    """Where the noise of ``images`` pictures comes from, and their seeds.

    Raises:
      ValueError: the shape of ``latents`` does not fit, both ``seed`` and ``key`` were given, or neither although the
        processes of the mesh would draw different ones.
    """
    if seed is None and key is None and spans_processes(mesh):
        raise ValueError("the mesh spans several processes; give them the same seed (or key), for example seed=0")
    if seed is not None and key is not None:
        raise ValueError("give seed or key, not both")
    if latents is not None:
        latents = np.asarray(latents, np.float32)
        if latents.shape != (images, *latent_shape):
            raise ValueError(f"latents must be {(images, *latent_shape)} (channel-last), got {latents.shape}")
    seeds, indices = (None, None) if key is not None else image_seeds(seed, images)
    keys = None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(np.arange(images, dtype=np.uint32))
    return Draws(seeds, indices, keys, latents), None if seeds is None else [int(s) for s in seeds]


def compile_job(pipe: DiffusionPipeline, job: Job, batch_size: int | None) -> None:
    """Compile the program of ``job`` without running it."""
    for rows in chunks(pipe, job, batch_size):
        arguments = place(pipe.mesh, rows, job.plan)
        _program(pipe, sampling.sample, job.task, (ROWS, WHOLE), arguments)


def run_job(
    pipe: DiffusionPipeline,
    job: Job,
    output_type: str,
    *,
    batch_size: int | None = None,
    callback: StepCallback | None = None,
    progress_bar: bool = False,
) -> ImagePipelineOutput:
    """Run ``job``; with a callback or a progress bar step by step, otherwise as one program."""
    results = []
    for rows in chunks(pipe, job, batch_size):
        batch, plan = place(pipe.mesh, rows, job.plan)
        if callback is None and not progress_bar:
            program = _program(pipe, sampling.sample, job.task, (ROWS, WHOLE), (batch, plan))
            results.append(program(dict(pipe.params), batch, plan))
        else:
            results.append(_run_by_steps(pipe, job.task, batch, plan, callback, progress_bar))
    return ImagePipelineOutput(convert(results, job.size, output_type), job.seeds)


def _run_by_steps(
    pipe: DiffusionPipeline, task: Task, batch: Any, plan: Plan, callback: StepCallback | None, bar: bool
) -> jax.Array:
    """The same computation as the one program, with the host between the steps."""
    from tqdm.auto import tqdm

    params = dict(pipe.params)
    begin = _program(pipe, sampling.start, task, (ROWS, WHOLE), (batch, plan))
    prepared, state = begin(params, batch, plan)
    step_args = lambda i: (batch, plan, prepared, state, np.int32(i))
    advance = _program(pipe, sampling.advance, task, (ROWS, WHOLE, ROWS, ROWS, WHOLE), step_args(0))
    for i in tqdm(range(int(plan.num_evaluations)), disable=not bar):
        state = advance(params, *step_args(i))
        if callback is not None:
            answer = callback(pipe, i, float(plan.timesteps[i]), {"latents": state.sample})
            if answer and "latents" in answer:
                state = state._replace(sample=jax.device_put(answer["latents"], state.sample.sharding))
    return _program(pipe, sampling.finish, task, (ROWS,), (state,))(params, state)


def _program(
    pipe: DiffusionPipeline, fn: Any, task: Task, specs: tuple[PartitionSpec, ...], args: tuple[Any, ...]
) -> Any:
    params: dict[str, Params] = dict(pipe.params)
    return pipe.programs.get(fn, task, pipe.mesh, (WHOLE, *specs), (params, *args))


def chunks(pipe: DiffusionPipeline, job: Job, batch_size: int | None) -> Iterator[Any]:
    """The job's data in pieces of at most ``batch_size`` pictures, each padded to a size that is used again."""
    devices = 1 if pipe.mesh is None else pipe.mesh.shape["data"]
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    size = padded_size(job.size if batch_size is None else min(batch_size, job.size), devices)
    for begin in range(0, job.size, size):
        yield jax.tree.map(lambda rows, b=begin: _pad(rows[b : b + size], size), job.batch)


def padded_size(images: int, devices: int) -> int:
    """The smallest ``devices * 2**k`` that holds ``images``: few sizes, so few compilations."""
    return devices * (1 << max(0, -(-images // devices) - 1).bit_length())


def _pad(rows: Any, size: int) -> Any:
    """Repeat the last row up to ``size`` rows; what they give is thrown away."""
    return rows[np.minimum(np.arange(size), len(rows) - 1)]


def place(mesh: Mesh | None, batch: Any, plan: Plan) -> tuple[Any, Plan]:
    """Rows over the mesh's ``data`` axis, the plan on every device; without a mesh, onto the default device."""
    if mesh is None:
        return jax.device_put(batch), jax.device_put(plan)
    return jax.device_put(batch, NamedSharding(mesh, ROWS)), jax.device_put(plan, NamedSharding(mesh, WHOLE))


def convert(results: Sequence[jax.Array], size: int, output_type: str) -> Any:
    """Trim the padding and give the pictures the form that was asked for."""
    if output_type == "latent":
        whole = results[0] if len(results) == 1 else jax.numpy.concatenate(results)
        return whole[:size]
    images = np.concatenate([np.asarray(readable(r)) for r in results])[:size]
    if output_type != "pil":
        return images
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in images]
