"""Guidance: several predictions of one network, evaluated as one batch and combined into one.

Rows that differ between the branches of guidance are :class:`Branches`; all others are the same for every branch.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

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


def branches(
    inner: Any, params: Params, rows: Rows, x: jax.Array, step: Step, *, copies: int = 0, unconditional: int = 1
) -> jax.Array:
    """The predictions of all branches from one evaluation on the stacked batch, float32 ``[K, B, ...]``.

    Args:
      inner: the denoiser.
      params, rows, step: as the denoiser takes them.
      x: ``[B, ...]``, the same for all branches.
      copies: further copies of the last branch, whose predictions follow the others. The denoiser finds in the row
        ``perturbation [K B]`` which copy an image belongs to, from 1 on, and 0 for the branches themselves.
      unconditional: number of leading branches that are not conditional; the denoiser finds in the row
        ``conditional``, bool ``[K B]``, which images belong to the others.
    """
    count = count_branches(rows)
    repeat = lambda value: stacked(_extended(value, copies)) if is_branches(value) else _repeated(value, count + copies)
    rows = jax.tree.map(repeat, without_keys(rows), is_leaf=is_branches)
    of_images = lambda by_branch: jnp.repeat(jnp.array(by_branch), len(x))
    rows["conditional"] = of_images([k >= min(unconditional, count - 1) for k in range(count + copies)])
    if copies:
        rows["perturbation"] = of_images([0] * count + [*range(1, copies + 1)])
    output = inner(params, rows, repeat(x), step)
    return output.astype(jnp.float32).reshape(count + copies, -1, *output.shape[1:])


def _extended(value: Branches, copies: int) -> Branches:
    """Branches with copies of the last one appended."""
    last = [value.values[:, -1:]] * copies
    return Branches(jnp.concatenate([value.values, *last], 1)) if copies else value


def _repeated(value: jax.Array, count: int) -> jax.Array:
    return jnp.concatenate([value] * count)


def without_keys(rows: Rows) -> Rows:
    """Rows without random keys and noise, on which no network's output depends."""
    return {name: value for name, value in rows.items() if name not in ("key", "keys", "seed", "index", "noise")}


def per_image(values: jax.Array, like: jax.Array) -> jax.Array:
    """``[B]`` reshaped to multiply ``like [B, ...]``."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


@dataclasses.dataclass(frozen=True)
class Linear(Part):
    """The unconditional prediction, moved along the difference to the conditional one (Ho & Salimans 2022, eq. 6).

    Other ways to combine the branches are in :mod:`~diffuse_jax.pipelines.parts.combine`.
    """

    unconditional: ClassVar[int] = 1
    """The number of leading branches that are not conditional."""

    def __call__(self, rows: Rows, step: Step, output: jax.Array) -> jax.Array:
        """The guided prediction ``[B, ...]`` of the branches' ``output [K, B, ...]``."""
        negative, positive = output
        return negative + per_image(guidance_scale(rows, step), negative) * (positive - negative)

    def positive(self, rows: Rows, output: jax.Array) -> jax.Array:
        """The conditional prediction, ``[B, ...]``."""
        return output[-1]


LINEAR = Linear()


def guidance_scale(rows: Rows, step: Step) -> jax.Array:
    """The scale of this evaluation, ``[B]``: that of ``guidance_schedule [B, N]``, if there is one."""
    schedule = rows.get("guidance_schedule")
    return rows["guidance_scale"] if schedule is None else schedule[:, step.i]


@dataclasses.dataclass(frozen=True)
class Guidance(Part):
    """Base class of guidance: a frozen dataclass whose field ``inner`` is a denoiser, evaluated by :func:`branches`.

    Tasks put ControlNets and further inputs of the network around ``inner``, where the branches are stacked.
    """

    inner: Any


@dataclasses.dataclass(frozen=True)
class ClassifierFree(Guidance):
    """Guidance by several predictions, combined and then rescaled (Lin et al. 2024, equations 15 and 16).

    The last branch is the conditional one, the first the unconditional one. ``guidance_scale [B]`` of 1 gives the
    conditional prediction, ``guidance_rescale [B]`` of 0 leaves the guided one as it is. A learned variance (extra
    output channels) is taken from the conditional branch.

    Attributes:
      inner: the denoiser.
      combine: how; see :class:`Linear`.
      perturbed: terms that push the prediction away from that of a perturbed network (perturbed-attention guidance):
        each gives the strength ``[B]`` at a step, ``term.scale(rows, step)``.
    """

    inner: Any
    combine: Any = LINEAR
    perturbed: tuple[Any, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        return "guidance_scale", "guidance_rescale"

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        return self.guided(rows, x, step, self.predictions(params, rows, x, step))

    def predictions(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        """Those of all branches and perturbed copies, ``[K, B, ...]``."""
        unconditional = self.combine.unconditional
        return branches(self.inner, params, rows, x, step, copies=len(self.perturbed), unconditional=unconditional)

    def guided(self, rows: Rows, x: jax.Array, step: Step, output: jax.Array) -> jax.Array:
        """The guided prediction ``[B, ...]`` from :meth:`predictions`."""
        count, channels = len(output) - len(self.perturbed), x.shape[-1]
        predictions, degraded = output[:count, ..., :channels], output[count:, ..., :channels]
        positive = self.combine.positive(rows, predictions)
        result = self.combine(rows, step, predictions) if count > 1 else positive
        for term, other in zip(self.perturbed, degraded, strict=True):
            result = result + per_image(term.scale(rows, step), x) * (positive - other)
        result = rescaled(result, positive, per_image(rows["guidance_rescale"], x))
        if output.shape[-1] == channels:
            return result
        return jnp.concatenate([result, output[count - 1][..., channels:]], -1)


def rescaled(guided: jax.Array, positive: jax.Array, share: jax.Array) -> jax.Array:
    """The guided prediction with the standard deviation of the conditional one, as far as ``share`` in [0, 1] says."""
    std = lambda y: y.std(tuple(range(1, y.ndim)), keepdims=True)
    return jnp.where(share > 0, share * guided * (std(positive) / std(guided)) + (1 - share) * guided, guided)
