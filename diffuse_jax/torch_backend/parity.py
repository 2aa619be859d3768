"""Is it the same? One checkpoint on both sides: parameters, networks, latents after every step, pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffuse_jax.models import Model
from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.torch_backend import differences, pipeline
from diffuse_jax.torch_backend.components import Call, calls_of, network, run_ours, run_theirs
from diffuse_jax.torch_backend.differences import Difference
from diffuse_jax.torch_backend.layers import compare_layers, first_difference
from diffuse_jax.torch_backend.report import Comparison, compare
from diffuse_jax.torch_backend.tolerances import TOLERANCES, Tolerance
from diffuse_jax.torch_backend.trace import Trace, run_traced


class Sides(NamedTuple):
    """The same pipeline twice; the parameters of ``theirs`` are PyTorch's modules."""

    ours: DiffusionPipeline
    theirs: DiffusionPipeline
    dtype: str


@dataclasses.dataclass(frozen=True)
class Request:
    """What is run.

    Attributes:
      prompts: what to draw.
      options: further arguments of the pipeline's call: steps, guidance, seed, size.
      components: networks to look at; with some named, the latents and pixels are not compared. All if empty.
      bisect: look for the first layer where networks part.
    """

    prompts: Sequence[str]
    options: dict[str, Any]
    components: Sequence[str] = ()
    bisect: bool = False


@dataclasses.dataclass
class Result:
    """What was found.

    Attributes:
      rows: every comparison of arrays.
      differences: parameters, configurations and token ids that are not the same.
      first: of each network that parts, the first layer (:func:`layers.first_difference`).
      images: pictures of both sides, float32 ``[B,H,W,3]`` in [0, 1]; None where they were not asked for.
    """

    rows: list[Comparison] = dataclasses.field(default_factory=list)
    differences: list[Difference] = dataclasses.field(default_factory=list)
    first: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    images: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def ok(self) -> bool:
        """Nothing differs: every row is within its tolerance, parameters, configurations and tokens are equal."""
        return not self.differences and all(row.ok for row in self.rows)


def open_sides(
    model: str,
    reference: str | None = None,
    *,
    dtype: str = "float32",
    device: str | None = None,
    scheduler: Any = None,
    variant: str | None = None,
    revision: str | None = None,
    reference_variant: str | None = None,
    reference_revision: str | None = None,
) -> Sides:
    """Open a checkpoint here and in PyTorch.

    Args:
      model: folder, Hub id, or ``diffuse-jax/emoji``.
      reference: what PyTorch reads instead, for example what ``model`` was converted from.
      dtype, device: see :func:`pipeline.from_pretrained`; JAX uses its default device.
      scheduler: a scheduler class that both sides use in place of their own.
      variant, revision: of ``model``.
      reference_variant, reference_revision: of ``reference``.

    Raises:
      WeightsError: one side cannot open it.
      ValueError: there is no such device.
    """
    shared: dict[str, Any] = {"dtype": dtype, "safety_checker": None}  # these pictures are for comparison alone
    theirs = pipeline.from_pretrained(
        reference or model,
        **shared,
        device=device,
        variant=reference_variant if reference else variant,
        revision=reference_revision if reference else revision,
    )
    ours = DiffusionPipeline.from_pretrained(model, **shared, variant=variant, revision=revision)
    if scheduler is not None:
        ours, theirs = (pipe.replace(scheduler=scheduler.from_config(pipe.scheduler)) for pipe in (ours, theirs))
    return Sides(ours, theirs, dtype)


def check(sides: Sides, request: Request) -> Result:
    """Compare everything; the run stops early only where the networks are not of the same shape."""
    result = Result(differences=list(static_differences(sides, request.components)))
    if any(found.what == "shape" for found in result.differences):
        return result
    tolerance = TOLERANCES[sides.dtype]
    ours = run_traced(sides.ours, request.prompts, **request.options)
    check_networks(sides, ours, request, tolerance, result)
    if not request.components:
        theirs = run_traced(sides.theirs, request.prompts, **request.options)
        result.differences += token_differences(ours, theirs)
        result.rows += trajectory_rows(ours, theirs, tolerance)
        result.images = ours.images, theirs.images
    return result


def wanted(components: Sequence[str], name: str) -> bool:
    """Whether a network is to be looked at."""
    return not components or name in components


def static_differences(sides: Sides, components: Sequence[str]) -> Iterator[Difference]:
    """Configurations and parameters that differ."""
    if missing := [name for name in components if not isinstance(sides.ours.components.get(name), Model)]:
        have = ", ".join(name for name, part in sides.ours.components.items() if isinstance(part, Model))
        raise ValueError(f"{type(sides.ours).__name__} has no network {', '.join(missing)}; it has {have}")
    looked_at = (
        {name: own for name, own in pipe.params.items() if wanted(components, name)}
        for pipe in (sides.ours, sides.theirs)
    )
    yield from differences.of_networks(sides.ours.components, *looked_at)
    if not components:
        schedulers = (
            {"class": type(pipe.scheduler).__name__} | pipe.scheduler.to_json() for pipe in (sides.ours, sides.theirs)
        )
        yield from differences.of_configs("scheduler", *schedulers)
        options = ({"class": type(pipe).__name__} | dict(pipe.options) for pipe in (sides.ours, sides.theirs))
        yield from differences.of_configs("pipeline", *options)


def token_differences(ours: Trace, theirs: Trace) -> Iterator[Difference]:
    """Token ids of the prompts that differ."""
    for name, ids in ours.batch.prompt.ids.items():
        yield from differences.of_tokens(name, *(np.asarray(x) for x in (ids, theirs.batch.prompt.ids[name])))


def check_networks(sides: Sides, trace: Trace, request: Request, tolerance: Tolerance, result: Result) -> None:
    """Each network with the same inputs on both sides; with ``bisect``, its layers where it parts."""
    parted: set[str] = set()
    for call in calls_of(trace):
        if not wanted(request.components, call.component):
            continue
        rows = list(network_rows(sides, call, tolerance.network))
        result.rows += rows
        if request.bisect and call.component not in parted and not all(row.ok for row in rows):
            parted.add(call.component)
            result.first += first_layer(sides, call, tolerance.network)


def network_rows(sides: Sides, call: Call, tolerance: float) -> Iterator[Comparison]:
    """One row for each output of a network."""
    name = call.component
    ours = run_ours(call, network(sides.ours.components, name), sides.ours.params[name])
    theirs = run_theirs(call, sides.theirs.params[name])
    for output, value in ours.items():
        yield compare(call.row(output), value, theirs[output], tolerance)


def first_layer(sides: Sides, call: Call, tolerance: float) -> list[dict[str, Any]]:
    """The first layer of a call that parts; none where all of them agree."""
    name = call.component
    model, params = network(sides.ours.components, name), sides.ours.params[name]
    found = first_difference(compare_layers(call, model, params, sides.theirs.params[name], tolerance))
    return [] if found is None else [{"component": name, "call": call.row("")} | found]


def trajectory_rows(ours: Trace, theirs: Trace, tolerance: Tolerance) -> Iterator[Comparison]:
    """Latents before the run and after every step, each side on its own trajectory, and the pictures."""
    for i, (a, b) in enumerate(zip(ours.latents, theirs.latents, strict=True)):
        name = f"latents after step {i}" if i else "latents at the start"
        yield compare(name, a, b, tolerance.latents if i else tolerance.noise)
    yield compare("pixels", ours.images, theirs.images, tolerance.pixels)
