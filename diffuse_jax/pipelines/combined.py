"""Pipelines of two stages in one: the components of the first have a prefix, ``prior_``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import numpy as np

from diffuse_jax import weights
from diffuse_jax.messages import brief, renaming
from diffuse_jax.pipelines.family import Family, request_of
from diffuse_jax.pipelines.method import check_rows, sample
from diffuse_jax.pipelines.parts.guidance import Branches, is_branches
from diffuse_jax.pipelines.pipeline import PIPELINES, DiffusionPipeline
from diffuse_jax.pipelines.running import Request, run
from diffuse_jax.sharding import readable, spans_processes

PREFIX = "prior_"


def prefixed(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a prior's components in a combined pipeline."""
    return tuple(f"{PREFIX}{name}" for name in names)


class Combined:
    """Base of the pipelines that are a prior and a decoder in one, beside :class:`DiffusionPipeline`."""

    prior: ClassVar[type[DiffusionPipeline]]
    decoder: ClassVar[type[DiffusionPipeline]]

    @classmethod
    def from_pretrained(cls, source: str | Path, *, prior: Any = None, **options: Any) -> Self:
        """Open a folder of this class, or a decoder and its prior.

        Args:
          source: as for :meth:`DiffusionPipeline.from_pretrained
            <diffuse_jax.pipelines.DiffusionPipeline.from_pretrained>`.
          prior: for a decoder: an open prior, or its folder or Hub id; if None, the one that the decoder's card names.
          **options: as there.

        Raises:
          WeightsError: as there, or a decoder's card names no prior.
        """
        opened: Any = super()
        first = with_prior(source, cls.prior, prior, options)
        return opened.from_pretrained(source, **{**first, **options})

    @classmethod
    def from_pipe(cls, pipe: DiffusionPipeline, *, prior: DiffusionPipeline | None = None, **components: Any) -> Self:
        """The pipeline of a decoder that is open and its ``prior``, or of one of another task with both stages; errors
        and further components as of :meth:`DiffusionPipeline.from_pipe
        <diffuse_jax.pipelines.DiffusionPipeline.from_pipe>`."""
        opened: Any = super()
        first = {} if prior is None else components_of(prior, cls.prior)
        return opened.from_pipe(pipe, **{**first, **components})

    @classmethod
    def from_stages(cls, prior: DiffusionPipeline, decoder: DiffusionPipeline) -> Self:
        """The pipeline of two that are open; parameters are shared. The decoder's mesh is that of both.

        Raises:
          TypeError: one of them is not such a stage, or of another family.
        """
        for name, pipe, target in (("prior", prior, cls.prior), ("decoder", decoder, cls.decoder)):
            check_stage(pipe, target, name)
        of_both = lambda a, b: {**{f"{PREFIX}{name}": value for name, value in a.items()}, **b}
        make: Any = cls
        return make(
            of_both(prior.components, decoder.components),
            of_both(prior.params, decoder.params),
            {**prior.options, **decoder.options},
            decoder.mesh,
            programs=decoder.programs,
        )

    @property
    def prior_pipe(self) -> Any:
        """The first stage, a pipeline of its own with the same parameters."""
        return _stage(self, self.prior, PREFIX)

    @property
    def decoder_pipe(self) -> Any:
        """The second stage, likewise."""
        return _stage(self, self.decoder)


def _stage(pipe: Any, target: type[DiffusionPipeline], prefix: str = "") -> DiffusionPipeline:
    """The stage of a combined pipeline whose components have a prefix."""
    fields = {field.name: getattr(pipe, field.name) for field in dataclasses.fields(DiffusionPipeline)}
    own = lambda table: {name: table[prefix + name] for name in target.required if prefix + name in table}
    options = {name: value for name, value in pipe.options.items() if name in target.settings}
    return target(**fields | {"components": own(pipe.components), "params": own(pipe.params), "options": options})


def check_stage(pipe: Any, target: type[DiffusionPipeline], name: str) -> None:
    """Check that what was given for a stage is a pipeline with the components of a class, and of its family.

    Raises:
      TypeError: it is not; the message names the argument.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"{name} must be an open {target.__name__}, got {brief(pipe)}")
    if missing := [part for part in target.required if pipe.components.get(part) is None]:
        found = type(pipe).__name__
        raise TypeError(f"{name} must be a {target.__name__}, got a {found}, which has no {' and no '.join(missing)}")
    check_family(type(pipe), target, name)


def check_family(kind: type[DiffusionPipeline], target: type[DiffusionPipeline], name: str) -> None:
    """Check that a class of pipelines for a stage is of a class's family: those of another may have the same
    components.

    Raises:
      TypeError: it is not; the message begins with ``name``.
    """
    if kind.family is not target.family:
        found = kind.__name__
        raise TypeError(f"{name} must be a {target.__name__}, got a {found}, which is of another family")


def components_of(prior: DiffusionPipeline, target: type[DiffusionPipeline]) -> dict[str, Any]:
    """The components and settings of an open prior as arguments of a combined pipeline's ``from_pretrained``; errors as
    of :func:`check_stage`."""
    check_stage(prior, target, "prior")
    pair = lambda name, part: (part, prior.params[name]) if name in prior.params else part
    parts = {f"{PREFIX}{name}": pair(name, part) for name, part in prior.components.items() if part is not None}
    return parts | {name: value for name, value in prior.options.items() if name in prior.settings}


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
      TypeError: it is not one for this decoder.
    """
    if prior is not None and not isinstance(prior, str | Path):
        return components_of(prior, target)
    hub = ("local_files_only", "token", "cache_dir")
    among = lambda *names: {name: options[name] for name in names if name in options}
    if prior is None:
        folder = weights.resolve(source, **among("revision", "variant", *hub))
        if {*prefixed(target.required)} & {*weights.read_index(folder).components, *options}:
            return {}
        if (prior := prior_in_card(folder)) is None:
            raise weights.WeightsError(f"{source}: names no prior; give prior=, an open one, its folder or its Hub id")
    named = weights.read_index(weights.resolve(prior, only_small=True, **among(*hub))).class_name
    if named in PIPELINES:
        check_family(PIPELINES[named], target, "prior")
    return components_of(target.from_pretrained(prior, **among("dtype", "mesh", *hub)), target)


def only_checks(pipe: DiffusionPipeline) -> bool:
    """Whether a pipeline has shapes in the place of its parameters (:mod:`~diffuse_jax.pipelines.configured`), so that
    its requests are made and never run."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(dict(pipe.params)))


def after_prior(request: Request, prior: DiffusionPipeline, first: Request, **running: Any) -> Request:
    """The decoder's request with the embeddings that the prior's run gives; as it is if the prior :func:`only_checks`.

    Args:
      request: the decoder's, made with any embeddings.
      prior: the prior.
      first: its request, with as many images.
      **running: how to run it, see :func:`~diffuse_jax.pipelines.run`.
    """
    if only_checks(prior):
        return request
    found = run(prior, first, **running)
    positive, negative = (np.asarray(readable(found[name])) for name in ("image_embeds", "negative_image_embeds"))
    guided = is_branches(request.rows["image_embeds"])
    embeds = Branches(np.stack([negative, positive], 1)) if guided else positive
    return request._replace(rows=request.rows | {"image_embeds": embeds})


def stage(
    pipe: DiffusionPipeline, family: Family, name: str, prompts: int, given: Mapping[str, Any], **own: Any
) -> Request:
    """The request of a stage inside a pipeline, before it has the rows that an earlier stage makes.

    Args:
      pipe: the pipeline.
      family: of the stage.
      name: of the stage, whose sampler is the component ``{name}_scheduler``.
      prompts: the number of prompts.
      given: the arguments of the call that all stages share; None stands for a default.
      **own: those of the stage, by the names that a call of it alone has; in that of the pipeline they begin with
        ``{name}_``.

    Raises:
      ValueError, TypeError: an argument is invalid or contradicts another one.
    """
    both = {key: value for key, value in {"guidance_scale": 1.0, **given, **own}.items() if value is not None}
    with renaming({key: f"{name}_{key}" for key in own}):
        return request_of(pipe, both, prompts, (0, 0), family=family, scheduler=pipe.components[f"{name}_scheduler"])


def after(request: Request, pipe: DiffusionPipeline, first: Request) -> Request:
    """The request of a stage with the results of an earlier one of the same pipeline as rows, which is run; zeros in
    their place if the pipeline :func:`only_checks`."""
    if only_checks(pipe):
        check_rows(first.method, first.rows)
        traced = lambda params, rows: sample(first.method, params, rows, first.plan)
        shapes = jax.eval_shape(traced, dict(pipe.params), first.rows)
        found = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    else:
        found = {name: np.asarray(readable(value)) for name, value in run(pipe, first).results.items()}
    return request._replace(rows=request.rows | found)


def with_seed(options: Mapping[str, Any], mesh: Any) -> dict[str, Any]:
    """The options with a seed for both stages, random unless they have one.

    Raises:
      ValueError: they name another library's noise, which both stages would draw from one generator.
    """
    if options.get("noise") is not None:
        raise ValueError("a pipeline of stages takes no noise=, as all would draw from one generator; give seed=")
    if options.get("seed") is not None or options.get("key") is not None or spans_processes(mesh):
        return dict(options)
    return {**options, "seed": int(np.random.SeedSequence().generate_state(1)[0])}
