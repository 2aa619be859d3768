"""Guidance: several predictions of one network, evaluated as one batch and combined into one.

Rows that differ between the branches of guidance are :class:`Branches`; all others are the same for every branch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffuse_jax.pipelines.method import Params, Part, Rows, Step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Branches:
    """A row's value for each branch of guidance, ``values [B, K, ...]``; the last branch is the conditional one."""

    values: Any


def is_branches(value: Any) -> bool:
    """Whether a row differs between branches."""
    return isinstance(value, Branches)


def stacked(value: Any) -> Any:
    """``[B, K, ...]`` of :class:`Branches` to ``[K B, ...]``, branch by branch; other values as they are."""
    if not is_branches(value):
        return value
    by_branch = jnp.moveaxis(value.values, 1, 0)
    return by_branch.reshape(-1, *by_branch.shape[2:])


def unstacked(array: jax.Array, count: int) -> Branches:
    """The inverse: ``[K B, ...]`` to :class:`Branches` of ``count`` branches."""
    return Branches(jnp.moveaxis(array.reshape(count, -1, *array.shape[1:]), 0, 1))


def count_branches(rows: Any) -> int:
    """The number of guidance branches of the rows; 1 if no row differs between branches.

    Raises:
      ValueError: the rows disagree.
    """
    counts = {x.values.shape[1] for x in jax.tree.leaves(rows, is_leaf=is_branches) if is_branches(x)}
    if len(counts) > 1:
        raise ValueError(f"rows have different numbers of guidance branches: {sorted(counts)}")
    return counts.pop() if counts else 1


def branches(inner: Any, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
    """The predictions of all branches from one evaluation on the stacked batch, float32 ``[K, B, ...]``.

    Args:
      inner: the denoiser.
      params, rows, step: as the denoiser takes them.
      x: ``[B, ...]``, the same for all branches.
    """
    count = count_branches(rows)
    repeat = lambda value: stacked(value) if is_branches(value) else jnp.concatenate([value] * count)
    output = inner(params, jax.tree.map(repeat, without_keys(rows), is_leaf=is_branches), repeat(x), step)
    return output.astype(jnp.float32).reshape(count, -1, *output.shape[1:])


def without_keys(rows: Rows) -> Rows:
    """Rows without random keys and noise, on which no network's output depends."""
    return {name: value for name, value in rows.items() if name not in ("key", "keys", "seed", "index", "noise")}


def per_image(values: jax.Array, like: jax.Array) -> jax.Array:
    """``[B]`` reshaped to multiply ``like [B, ...]``."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


@dataclasses.dataclass(frozen=True)
class ClassifierFree(Part):
    """Classifier-free guidance (Ho & Salimans 2022, equation 6), rescaled (Lin et al. 2024, equations 15 and 16).

    The first branch is the unconditional one. ``guidance_scale [B]`` of 1 gives the conditional prediction,
    ``guidance_rescale [B]`` of 0 leaves the guided one as it is. A learned variance (extra output channels) is taken
    from the conditional branch.
    """

    inner: Any

    @property
    def reads(self) -> tuple[str, ...]:
        return "guidance_scale", "guidance_rescale"

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        output = branches(self.inner, params, rows, x, step)
        channels = x.shape[-1]
        negative, positive = output[..., :channels]
        result = negative + per_image(rows["guidance_scale"], x) * (positive - negative)
        std = lambda y: y.std(tuple(range(1, y.ndim)), keepdims=True)
        phi = per_image(rows["guidance_rescale"], x)
        result = jnp.where(phi > 0, phi * result * (std(positive) / std(result)) + (1 - phi) * result, result)
        if output.shape[-1] == channels:
            return result
        return jnp.concatenate([result, output[-1][..., channels:]], -1)
