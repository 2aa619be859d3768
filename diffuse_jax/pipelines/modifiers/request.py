"""What modifiers are, and how they change a request."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from diffuse_jax.messages import brief
from diffuse_jax.models import Model
from diffuse_jax.pipelines.inputs import one_per_image
from diffuse_jax.pipelines.method import Part, Rows, all_parts
from diffuse_jax.pipelines.parts.features import DeepCache
from diffuse_jax.pipelines.parts.guidance import (
    LINEAR,
    Branches,
    ClassifierFree,
    Guidance,
    count_branches,
    is_branches,
)
from diffuse_jax.pipelines.parts.network import UNet
from diffuse_jax.pipelines.parts.self_attention import AttentionMap
from diffuse_jax.pipelines.parts.windows import Windows
from diffuse_jax.pipelines.prompts import aligned
from diffuse_jax.pipelines.running import Modifier, Request
from diffuse_jax.text.prompts import PLAIN

Number = float | Sequence[float]
"""One number, or one for each image."""


def listed(modifiers: Modifier | Sequence[Modifier]) -> list[Modifier]:
    """One modifier or several as a list.

    Raises:
      TypeError: one of them is no modifier.
    """
    each = [modifiers] if callable(modifiers) else modifiers
    if not isinstance(each, Sequence) or not all(map(callable, each)):
        raise TypeError(f"modifiers must be one or several of pipelines.modifiers, got {brief(modifiers)}")
    return list(each)


def modified(request: Request, pipe: Any, modifiers: Modifier | Sequence[Modifier]) -> Request:
    """The request after all modifiers, in order.

    Raises:
      TypeError: one of them is no modifier, or returned something else.
      ValueError: two of them cannot act together.
    """
    for modifier in listed(modifiers):
        request = modifier(request, pipe)
        if not isinstance(request, Request):
            raise TypeError(f"{modifier!r} must return a Request, got {type(request).__name__}")
        check_together(request.method.denoiser)
    return request


def check_together(denoiser: Any) -> None:
    """Refuse parts inside each other that need values of evaluations, or layers, that the outer one hides.

    Raises:
      ValueError: two such parts are nested; the message names both.
    """
    for outer in all_parts(denoiser):
        hidden = [part for part in all_parts(outer) if part is not outer and _hides(outer, part)]
        if hidden:
            raise ValueError(f"{type(outer).__name__} and {type(hidden[0]).__name__} cannot be used together")


def _hides(outer: Part, inner: Part) -> bool:
    """Whether windows contain something that keeps values or masks of the whole image, or kept features the layers that
    attention is read from."""
    kept_by_window = isinstance(outer, Windows) and (inner.keeps or getattr(inner, "masked", False))
    return kept_by_window or {type(outer), type(inner)} == {DeepCache, AttentionMap}


def with_guidance(denoiser: Any, change: Callable[[ClassifierFree], Any]) -> Any:
    """The denoiser with its guidance changed; one without guidance gets it first, with a single branch.

    Raises:
      ValueError: its guidance is not that of this package.
    """
    if isinstance(denoiser, ClassifierFree):
        return change(denoiser)
    if isinstance(denoiser, Guidance):
        raise ValueError(f"the guidance {type(denoiser).__name__} cannot be changed by modifiers")
    inner = getattr(denoiser, "inner", None)
    if inner is not None and any(isinstance(part, Guidance) for part in all_parts(inner)):
        return replace(denoiser, inner=with_guidance(inner, change))
    return change(ClassifierFree(denoiser))


def require_layers(unet: Any) -> None:
    """Refuse a network whose layers cannot be changed.

    Raises:
      ValueError: it is not a :class:`~diffuse_jax.models.Model`, but for example one of PyTorch's.
    """
    if not isinstance(unet, Model):
        raise ValueError(f"a modifier changes the layers of a UNet, which a {type(unet).__name__} does not let it do")


def with_network(denoiser: Any, wrap: Callable[[Any], Any]) -> Any:
    """The denoiser with ``wrap`` around its UNet, inside of guidance, control and everything else."""
    if isinstance(denoiser, UNet):
        require_layers(denoiser.net.model)
        return wrap(denoiser)
    fields = {f.name: getattr(denoiser, f.name) for f in dataclasses.fields(denoiser)}
    inner = {name: with_network(value, wrap) for name, value in fields.items() if isinstance(value, Part)}
    return replace(denoiser, **inner) if inner else denoiser


def changed(request: Request, rows: Rows, change: Callable[[Any], Any] = lambda denoiser: denoiser) -> Request:
    """The request with rows added and its denoiser changed."""
    method = replace(request.method, denoiser=change(request.method.denoiser))
    return request._replace(method=method, rows=request.rows | rows)


def numbers(request: Request, *values: Number, name: str) -> np.ndarray:
    """A modifier's values as float32 ``[B, len(values)]``."""
    return np.stack([one_per_image(value, request.images, name) for value in values], -1)


def require_guidance(request: Request, modifier: Any) -> None:
    """Refuse a request without an unconditional branch.

    Raises:
      ValueError: it has none.
    """
    if count_branches(request.rows) < 2:
        raise ValueError(f"{type(modifier).__name__} changes classifier-free guidance; give a guidance_scale above 1")


def combined(request: Request, rows: Rows, how: Any) -> Request:
    """The request with another way to combine the branches.

    Raises:
      ValueError: it has one already.
    """

    def once(guidance: ClassifierFree) -> ClassifierFree:
        if guidance.combine != LINEAR:
            names = f"{type(guidance.combine).__name__} and {type(how).__name__}"
            raise ValueError(f"{names} both say how the branches of guidance are combined; only one of them can")
        return replace(guidance, combine=how)

    return changed(request, rows, lambda d: with_guidance(d, once))


def with_branches(request: Request, pipe: Any, prompts: Sequence[str], *, first: bool = False) -> Rows:
    """The request's rows with a branch for each of some prompts, after the others or before them.

    Raises:
      ValueError: the request has embeddings and no token ids.
    """
    if "ids" not in request.rows:
        raise ValueError("further prompts need prompts, but this call has prompt_embeds")
    place = 0 if first else -1
    style = next((part.style for part in request.method.conditions if hasattr(part, "style")), PLAIN)
    rows = request.rows
    for prompt in prompts:
        tokens = pipe.family.tokens(pipe, {encoder: [prompt] for encoder in pipe.family.encoders}, style)
        if not style.is_plain:
            values = {name: {e: np.asarray(x.values) for e, x in rows[name].items()} for name in tokens}
            values, tokens = aligned([values, tokens], pipe.family.layouts(pipe))
            rows = rows | {name: {e: Branches(x) for e, x in row.items()} for name, row in values.items()}
        rows = jax.tree.map(lambda row: with_copy(row, place) if is_branches(row) else row, rows, is_leaf=is_branches)
        for name, by_encoder in tokens.items():
            for encoder, ids in by_encoder.items():
                rows[name][encoder].values[:, place] = ids
    return rows


def with_copy(row: Branches, place: int) -> Branches:
    """The branches and a copy of the first (``place`` 0) or last one (-1), beside it."""
    values = np.asarray(row.values)
    return Branches(np.insert(values, place if place == 0 else values.shape[1], values[:, place], axis=1))


def more_negatives(request: Request, count: int) -> Request:
    """The request whose text encoder takes the first ``count`` branches for unconditional (``clip_skip``)."""
    conditions = tuple(
        replace(part, negatives=count) if hasattr(part, "negatives") else part for part in request.method.conditions
    )
    return request._replace(method=replace(request.method, conditions=conditions))
