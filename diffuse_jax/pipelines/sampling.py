"""Sampling as one pure program: data in, pictures out.

A *task* holds everything that decides what is compiled; its batch and the plan are data. Prompts, seeds, samplers and
numbers of steps therefore never cause a second compilation.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax

from diffuse_jax.models.base import Params
from diffuse_jax.pipelines import denoise as verbs
from diffuse_jax.schedulers.plan import Plan, State

Rows = Any
"""An array with one row per picture: NumPy on the host, traced inside the program."""


class Draws(NamedTuple):
    """Where the noise of each picture comes from: seeds and indices, or keys; and given first noise, if any."""

    seeds: Rows | None  # uint32 [B]
    indices: Rows | None  # uint32 [B]
    keys: Rows | None  # typed keys [B] instead of seeds
    latents: Rows | None  # [B,h,w,c] standard normal, instead of drawing them


class Task(Protocol):
    """The static half of a request, hashable; ``batch`` is its own kind of data, one row per picture."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what is denoised."""

    def start(self, params: dict[str, Params], batch: Any, plan: Plan) -> tuple[Any, State]:
        """What the loop needs beside the state, with a key for each picture in ``keys``, and the first state."""

    def denoiser(self, params: dict[str, Params], batch: Any, prepared: Any) -> verbs.Denoiser:
        """The network with its conditions."""

    def finish(self, params: dict[str, Params], state: State) -> jax.Array:
        """What the caller asked for, one row per picture."""


def sample(task: Task, params: dict[str, Params], batch: Any, plan: Plan) -> jax.Array:
    """The whole program."""
    prepared, state = task.start(params, batch, plan)
    denoiser = task.denoiser(params, batch, prepared)
    return task.finish(params, verbs.denoise(denoiser, plan, state, prepared.keys))


def start(task: Task, params: dict[str, Params], batch: Any, plan: Plan) -> tuple[Any, State]:
    """Its first part, for a caller who wants to look at (or change) the latents between the steps."""
    return task.start(params, batch, plan)


def advance(
    task: Task, params: dict[str, Params], batch: Any, plan: Plan, prepared: Any, state: State, i: jax.Array
) -> State:
    """One evaluation."""
    return verbs.denoise_step(task.denoiser(params, batch, prepared), plan, state, i, prepared.keys)


def finish(task: Task, params: dict[str, Params], state: State) -> jax.Array:
    """Its last part."""
    return task.finish(params, state)


def first_noise(draws: Draws, shape: tuple[int, int, int]) -> tuple[jax.Array, jax.Array]:
    """The noise ``[B,*shape]`` that runs start from, and a key for the steps of each."""
    if draws.keys is not None:
        k_init, k_loop = verbs.split_keys(draws.keys)
    else:
        assert draws.seeds is not None
        assert draws.indices is not None
        k_init, k_loop = verbs.sample_keys(draws.seeds, draws.indices)
    return (verbs.initial_noise(k_init, shape) if draws.latents is None else draws.latents), k_loop
