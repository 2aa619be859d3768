"""Pipelines of two stages in one: the components of the first have a prefix, ``prior_``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from diffuse_jax import weights
from diffuse_jax.pipelines.parts.guidance import Branches, is_branches
from diffuse_jax.pipelines.pipeline import DiffusionPipeline
from diffuse_jax.pipelines.running import Request, run
from diffuse_jax.sharding import readable, spans_processes

PREFIX = "prior_"

P = TypeVar("P", bound=DiffusionPipeline)


def prefixed(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a prior's components in a combined pipeline."""
    return tuple(f"{PREFIX}{name}" for name in names)


def stage(pipe: DiffusionPipeline, target: type[P], prefix: str = "") -> P:
    """A stage of a combined pipeline as a pipeline of its own, with the same parameters."""
    fields = {field.name: getattr(pipe, field.name) for field in dataclasses.fields(DiffusionPipeline)}
    own = lambda table: {name: table[prefix + name] for name in target.required if prefix + name in table}
    return target(**fields | {"components": own(pipe.components), "params": own(pipe.params), "options": {}})


def components_of(prior: DiffusionPipeline) -> dict[str, Any]:
    """The components of an open prior as arguments of a combined pipeline's ``from_pretrained``."""
    pair = lambda name, part: (part, prior.params[name]) if name in prior.params else part
    return {f"{PREFIX}{name}": pair(name, part) for name, part in prior.components.items() if part is not None}


def prior_in_card(folder: Path) -> str | None:
    """The prior that a decoder's card names (``prior:`` in the head of ``README.md``); None without one."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^prior:[ \t]*(?:\n[ \t]*-|\[)?[ \t]*([\w./-]+)", head[1], re.MULTILINE) if head else None
    return found[1] if found else None


def with_prior(
    source: str | Path, target: type[DiffusionPipeline], prior: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The components of a decoder's prior, by their names in the combined pipeline; none if the folder has them.

    Args:
      source: the decoder, or a folder of the combined pipeline.
      target: the class of the prior.
      prior: a prior that is open, or its folder or Hub id; None takes the one that the decoder's card names.
      options: of ``from_pretrained``.

    Raises:
      WeightsError: there is no prior.
    """
    if isinstance(prior, DiffusionPipeline):
        return components_of(prior)
    hub = ("local_files_only", "token", "cache_dir")
    among = lambda *names: {name: options[name] for name in names if name in options}
    if prior is None:
        folder = weights.resolve(source, **among("revision", "variant", *hub))
        if {*prefixed(target.required)} & {*weights.read_index(folder).components, *options}:
            return {}
        if (prior := prior_in_card(folder)) is None:
            raise weights.WeightsError(f"{source}: names no prior; give prior=, an open one, its folder or its Hub id")
    return components_of(target.from_pretrained(prior, **among("dtype", "mesh", *hub)))


def after_prior(request: Request, prior: DiffusionPipeline, first: Request, **running: Any) -> Request:
    """The decoder's request with the embeddings that the prior's run gives.

    Args:
      request: the decoder's, made with any embeddings.
      prior: the prior.
      first: its request, with as many images.
      **running: how to run it, see :func:`~diffuse_jax.pipelines.run`.
    """
    found = run(prior, first, **running)
    positive, negative = (np.asarray(readable(found[name])) for name in ("image_embeds", "negative_image_embeds"))
    guided = is_branches(request.rows["image_embeds"])
    embeds = Branches(np.stack([negative, positive], 1)) if guided else positive
    return request._replace(rows=request.rows | {"image_embeds": embeds})


def with_seed(options: Mapping[str, Any], mesh: Any) -> dict[str, Any]:
    """The options with a seed for both stages, random unless they have one.

    Raises:
      ValueError: they name another library's noise, which both stages would draw from one generator.
    """
    if options.get("noise") is not None:
        raise ValueError("a combined pipeline takes no noise=; run its prior_pipe and its decoder_pipe one by one")
    if options.get("seed") is not None or options.get("key") is not None or spans_processes(mesh):
        return dict(options)
    return {**options, "seed": int(np.random.SeedSequence().generate_state(1)[0])}
