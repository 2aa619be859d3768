"""This library's pipelines on PyTorch: their checks, prompts, seeds and plans, with other programs at the end.

A pipeline hands ``(params, batch, plan)`` to the programs of :mod:`diffuse_jax.pipelines.sampling`. Here ``params`` are
PyTorch's modules and the programs are those below, so both sides differ in nothing but the framework. A further task
needs a twin in :data:`TWINS` and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import torch
from jax.sharding import Mesh

from diffuse_jax import weights
from diffuse_jax.pipelines import DiffusionPipeline, sampling
from diffuse_jax.pipelines.base import MODELS
from diffuse_jax.pipelines.programs import Programs
from diffuse_jax.pipelines.text_to_image import TextToImage
from diffuse_jax.schedulers import plan as ours
from diffuse_jax.schedulers.plan import Plan
from diffuse_jax.torch_backend import plan as steps
from diffuse_jax.torch_backend.networks import CLASSES, choose_device, exact, open_network, to_numpy, to_torch
from diffuse_jax.torch_backend.plan import State
from diffuse_jax.torch_backend.text_to_image import Modules, TorchTextToImage, device_of


class TorchTask(Protocol):
    """The twin of a :class:`diffuse_jax.pipelines.sampling.Task`, with tensors for arrays."""

    def start(self, modules: Modules, batch: Any, plan: Plan) -> tuple[Any, State]: ...

    def denoiser(self, modules: Modules, batch: Any, prepared: Any) -> Callable[[torch.Tensor, float], Any]: ...

    def finish(self, modules: Modules, state: State) -> torch.Tensor: ...


TWINS: dict[type, Callable[[Any], TorchTask]] = {TextToImage: TorchTextToImage}
"""Our task's class -> its twin."""


def from_pretrained(
    source: str | Path,
    *,
    dtype: str = "float32",
    device: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    **components: Any,
) -> DiffusionPipeline:
    """Open a pipeline whose networks are PyTorch's, read by diffusers and transformers.

    It is called like ours and gives pictures from the same seeds; ``params`` holds the modules. Noise is JAX's. In
    float32 there is no TF32.

    Args:
      source: a folder in diffusers layout with safetensors or ``.bin`` files, a Hub id, or ``"diffuse-jax/emoji"``.
      dtype: "float32", "bfloat16" or "float16".
      device: "cpu" or "cuda"; CUDA where there is one, if None.
      variant, revision: as for ours.
      **components: ``scheduler=...``, ``tokenizer=...`` instead of the folder's.

    Raises:
      WeightsError: no such model, a pipeline or network without a twin, or PyTorch cannot open it.
      ValueError: there is no such device.

    Example::

        pipe = torch_backend.from_pretrained("diffuse-jax/emoji")
        picture = pipe("a red apple, noto style", seed=0).images[0]
    """
    where = choose_device(device)
    folder = weights.resolve(source, variant=variant, revision=revision)
    networks: dict[str, Any] = {}
    for name, entry in weights.read_index(folder).components.items():
        kind = entry.class_name.removeprefix("Flax")
        if kind in MODELS and name not in components:
            if kind not in CLASSES:
                raise weights.WeightsError(f"{folder}: {name} is a {kind}, which has no twin on PyTorch yet")
            model = MODELS[kind].from_config(entry.folder, dtype=jnp.dtype(dtype))
            networks[name] = model, open_network(kind, entry.folder, dtype, where, variant)
    pipe = DiffusionPipeline.from_pretrained(folder, **networks, **components)
    return pipe.replace(programs=TorchPrograms())


class TorchPrograms(Programs):
    """Programs that need no compiling: the functions below, for the twin of the task."""

    def get(self, fn: Callable[..., Any], task: Any, mesh: Mesh | None, specs: tuple[Any, ...], args: Any) -> Any:
        """The program ``fn`` of a task, on PyTorch; called like ours, and gives arrays.

        Raises:
          ValueError: the task has no twin, or a mesh was given.
        """
        if mesh is not None:
            raise ValueError("the PyTorch side runs on one device; use a pipeline with mesh=None")
        if type(task) not in TWINS:
            raise ValueError(f"{type(task).__name__} has no twin on PyTorch; there are {[t.__name__ for t in TWINS]}")
        return functools.partial(PROGRAMS[fn], TWINS[type(task)](task))


def sample(task: TorchTask, modules: Modules, batch: Any, plan: Plan) -> jax.Array:
    """The whole run."""
    with exact():
        prepared, state = task.start(modules, batch, plan := steps.on_host(plan))
        denoiser = task.denoiser(modules, batch, prepared)
        for i in range(int(plan.num_evaluations)):
            state = denoise_step(denoiser, plan, state, i, prepared.keys)
        return to_array(task.finish(modules, state))


def start(task: TorchTask, modules: Modules, batch: Any, plan: Plan) -> tuple[Any, ours.State]:
    """Its first part."""
    with exact():
        prepared, state = task.start(modules, batch, steps.on_host(plan))
    return prepared, to_arrays(state)


def advance(
    task: TorchTask, modules: Modules, batch: Any, plan: Plan, prepared: Any, state: ours.State, i: Any
) -> ours.State:
    """One evaluation."""
    with exact():
        denoiser, plan = task.denoiser(modules, batch, prepared), steps.on_host(plan)
        return to_arrays(denoise_step(denoiser, plan, to_tensors(state, modules), int(i), prepared.keys))


def finish(task: TorchTask, modules: Modules, state: ours.State) -> jax.Array:
    """Its last part."""
    with exact():
        return to_array(task.finish(modules, to_tensors(state, modules)))


PROGRAMS: dict[Any, Callable[..., Any]] = {
    sampling.sample: sample,
    sampling.start: start,
    sampling.advance: advance,
    sampling.finish: finish,
}
"""Our programs -> their twins."""


def denoise_step(denoiser: Any, plan: Plan, state: State, i: int, keys: Any) -> State:
    """The twin of :func:`diffuse_jax.pipelines.denoise.denoise_step`; the noise is drawn by JAX, if any is used."""
    output = denoiser(steps.model_input(plan, state, i), float(plan.timesteps[i]))
    noise = torch.zeros_like(state.sample)
    if plan.rows[i, :, -1].any():
        noise = to_torch(draw(tuple(noise.shape), plan, i, keys), noise.device)
    return steps.step(plan, state, i, output, noise)


@functools.partial(jax.jit, static_argnums=0)
def draw(shape: tuple[int, ...], plan: Plan, i: Any, keys: jax.Array) -> jax.Array:
    """The noise of one evaluation."""
    return plan.draw(i, shape, keys)


def to_array(tensor: torch.Tensor) -> jax.Array:
    """A tensor as callers of our pipelines see it."""
    return jnp.asarray(to_numpy(tensor))


def to_arrays(state: State) -> ours.State:
    """A state as callers of our pipelines see it."""
    return ours.State(to_array(state.sample), tuple(map(to_array, state.memory)))


def to_tensors(state: ours.State, modules: Modules) -> State:
    """The inverse, on the device of the networks."""
    tensor = lambda x: to_torch(x, device_of(modules))
    return State(tensor(state.sample), tuple(map(tensor, state.memory)))
