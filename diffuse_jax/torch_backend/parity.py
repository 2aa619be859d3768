"""Parity of a checkpoint on both sides: parameters, networks, the latents after each step, and pixels."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffuse_jax.pipelines import PIPELINES, DiffusionPipeline
from diffuse_jax.pipelines.parts.decode import autoencoder
from diffuse_jax.pipelines.parts.guidance import is_branches
from diffuse_jax.torch_backend import differences, pipeline
from diffuse_jax.torch_backend.components import Call, calls_of, run_ours, run_theirs
from diffuse_jax.torch_backend.default_images import default_images
from diffuse_jax.torch_backend.differences import Difference
from diffuse_jax.torch_backend.layers import compare_layers, first_difference
from diffuse_jax.torch_backend.report import Comparison, compare
from diffuse_jax.torch_backend.tolerances import TOLERANCES, Tolerance
from diffuse_jax.torch_backend.trace import Trace, networks, parameters, run_traced


class Sides(NamedTuple):
    """The same pipeline twice; the networks of ``theirs`` are PyTorch's."""

    ours: DiffusionPipeline
    theirs: DiffusionPipeline
    dtype: str


@dataclasses.dataclass(frozen=True)
class Request:
    """What to run and compare.

    Attributes:
      prompts: the prompts.
      options: further arguments of the pipeline's call: steps, guidance, seed, size.
      components: the networks to compare; if any are named, latents and pixels are not compared. All if empty.
      bisect: find the first layer where a network diverges.
    """

    prompts: Sequence[str]
    options: dict[str, Any]
    components: Sequence[str] = ()
    bisect: bool = False

    def arguments(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        """The keyword arguments of the pipeline's call, with default images for those that are missing."""
        takes = inspect.signature(pipe.compose).parameters
        given = {"prompt": list(self.prompts), "batch_size": len(self.prompts)}
        prompts = {name: value for name, value in given.items() if name in takes}
        return prompts | default_images(pipe, self.options, len(self.prompts)) | self.options


@dataclasses.dataclass
class Result:
    """The results of a comparison.

    Attributes:
      rows: all comparisons of arrays.
      differences: parameters, configurations and token ids that differ.
      first: the first differing layer (:func:`layers.first_difference`) of each network that diverges.
      images: the images of both sides, float32 ``[B,H,W,3]`` in [0, 1]; None if they were not compared.
    """

    rows: list[Comparison] = dataclasses.field(default_factory=list)
    differences: list[Difference] = dataclasses.field(default_factory=list)
    first: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    images: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def ok(self) -> bool:
        """Whether all rows are within their tolerances, and parameters, configurations and token ids are equal."""
        return not self.differences and all(row.ok for row in self.rows)


def open_sides(
    model: str,
    reference: str | None = None,
    *,
    dtype: str = "float32",
    device: str | None = None,
    scheduler: Any = None,
    pipeline_name: str | None = None,
    mesh: Any = None,
    variant: str | None = None,
    revision: str | None = None,
    reference_variant: str | None = None,
    reference_revision: str | None = None,
) -> Sides:
    """Open a checkpoint here and in PyTorch.

    Args:
      model: a folder, a Hub id, or ``diffuse-jax/emoji``.
      reference: the checkpoint that PyTorch reads instead, for example the one that ``model`` was converted from.
      dtype, device: see :func:`pipeline.from_pretrained`; JAX uses its default device.
      scheduler: a scheduler class for both sides to use instead of the folder's.
      pipeline_name: name of the pipeline class to run, for example "StableDiffusionInpaintPipeline"; if None, the
        folder's.
      mesh: the mesh of JAX's devices, or its text such as "data=4"; None for its default device.
      variant, revision: variant and revision of ``model``.
      reference_variant, reference_revision: variant and revision of ``reference``.

    Raises:
      WeightsError: one side cannot open it.
      ValueError: the device or pipeline does not exist, or the pipeline lacks a component.
    """
    if pipeline_name is not None and pipeline_name not in PIPELINES:
        raise ValueError(f"no pipeline is called {pipeline_name!r}; known: {', '.join(PIPELINES)}")
    unchecked = {"safety_checker": None, "requires_safety_checker": False}  # the images are only compared
    shared: dict[str, Any] = {"dtype": dtype, **unchecked}
    theirs = pipeline.from_pretrained(
        reference or model,
        **shared,
        device=device,
        variant=reference_variant if reference else variant,
        revision=reference_revision if reference else revision,
    )
    ours = DiffusionPipeline.from_pretrained(model, **shared, mesh=mesh, variant=variant, revision=revision)
    if scheduler is not None:
        ours, theirs = (pipe.replace(scheduler=scheduler.from_config(pipe.scheduler)) for pipe in (ours, theirs))
    if pipeline_name is not None:
        ours, theirs = (PIPELINES[pipeline_name].from_pipe(pipe) for pipe in (ours, theirs))
    return Sides(ours, theirs, dtype)


def check(sides: Sides, request: Request) -> Result:
    """Compare everything. Networks of different shapes are reported without running them."""
    result = Result(differences=list(static_differences(sides, request.components)))
    if any(found.what == "shape" for found in result.differences):
        return result
    tolerance = TOLERANCES[sides.dtype]
    theirs = run_traced(sides.theirs, **request.arguments(sides.theirs))
    check_networks(sides, theirs, request, tolerance, result)
    if not request.components:
        ours = run_traced(sides.ours, **request.arguments(sides.ours))
        result.differences += token_differences(ours, theirs)
        result.rows += trajectory_rows(ours, theirs, tolerance)
        is_image = ours.images.ndim == 4 and ours.images.shape[-1] == 3  # and not embeddings
        result.images = (ours.images, theirs.images) if is_image else None
    return result


def wanted(components: Sequence[str], name: str) -> bool:
    """Whether to compare a network."""
    return not components or name in components


def static_differences(sides: Sides, components: Sequence[str]) -> Iterator[Difference]:
    """Configurations and parameters that differ."""
    have = networks(sides.ours)
    if missing := [name for name in components if name not in have]:
        raise ValueError(f"{type(sides.ours).__name__} has no network {', '.join(missing)}; it has {', '.join(have)}")
    ours = {name: tree for name, tree in parameters(sides.ours).items() if wanted(components, name)}
    theirs = {name: twin.module for name, twin in networks(sides.theirs).items() if wanted(components, name)}
    yield from differences.of_networks(have, ours, theirs)
    if not components:
        schedulers = (
            {"class": type(pipe.scheduler).__name__} | pipe.scheduler.to_json() for pipe in (sides.ours, sides.theirs)
        )
        yield from differences.of_configs("scheduler", *schedulers)
        options = ({"class": type(pipe).__name__} | dict(pipe.options) for pipe in (sides.ours, sides.theirs))
        yield from differences.of_configs("pipeline", *options)


def token_differences(ours: Trace, theirs: Trace) -> Iterator[Difference]:
    """Differences in the prompts' token ids."""
    for name, ids in ours.rows.get("ids", {}).items():
        yield from differences.of_tokens(name, *(by_prompt(x) for x in (ids, theirs.rows["ids"][name])))


def by_prompt(ids: Any) -> np.ndarray:
    """Token ids of the prompts ``[B,L]``, without the negative prompts."""
    return np.asarray(ids.values[:, -1] if is_branches(ids) else ids)


def check_networks(sides: Sides, trace: Trace, request: Request, tolerance: Tolerance, result: Result) -> None:
    """Compare each network with the same inputs on both sides; with ``bisect``, also the layers of those that
    diverge."""
    diverged: set[str] = set()
    for call in calls_of(trace):
        if not wanted(request.components, call.component):
            continue
        rows = list(network_rows(sides, call, tolerance.network))
        result.rows += rows
        if request.bisect and call.component not in diverged and not all(row.ok for row in rows):
            diverged.add(call.component)
            result.first += first_layer(sides, call, tolerance.network)


def network_rows(sides: Sides, call: Call, tolerance: float) -> Iterator[Comparison]:
    """Compare the outputs of a network; one row for each."""
    name = call.component
    ours = run_ours(call, networks(sides.ours)[name], parameters(sides.ours)[name])
    theirs = run_theirs(call, networks(sides.theirs)[name])
    for output, value in ours.items():
        yield compare(call.row(output), value, theirs[output], tolerance)


def first_layer(sides: Sides, call: Call, tolerance: float) -> list[dict[str, Any]]:
    """The first layer of a call whose output differs; empty if all agree."""
    name = call.component
    model, params = autoencoder(networks(sides.ours)[name]), parameters(sides.ours)[name]
    found = first_difference(compare_layers(call, model, params, networks(sides.theirs)[name], tolerance))
    return [] if found is None else [{"component": name, "call": call.row("")} | found]


def trajectory_rows(ours: Trace, theirs: Trace, tolerance: Tolerance) -> Iterator[Comparison]:
    """Compare the initial latents, those after each step (each side on its own trajectory), and the images."""
    start = tolerance.network if theirs.encoded else tolerance.noise
    for i, (a, b) in enumerate(zip(ours.samples.swapaxes(0, 1), theirs.samples.swapaxes(0, 1), strict=True)):
        name = f"latents after step {i}" if i else "latents at the start"
        yield compare(name, a, b, tolerance.latents if i else start)
    yield compare("pixels", ours.images, theirs.images, tolerance.pixels)
