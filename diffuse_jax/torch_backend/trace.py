"""Tracing a run: its inputs, the latents between steps and its results, on either side."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from diffuse_jax.pipelines import DiffusionPipeline, run
from diffuse_jax.pipelines.method import Method, networks_of
from diffuse_jax.torch_backend.adapter import RecordedCall, TorchNetwork

RESULTS = ("images", "image_embeddings", "image_embeds")
"""What runs result in, whichever is there."""


class Trace(NamedTuple):
    """The inputs and results of a run.

    Attributes:
      rows: the request's data.
      encoded: whether the first sample depends on a network, for example an encoded image.
      timesteps: the timestep of each evaluation.
      samples: ``[images, evaluations + 1, ...]``: the latents before each step and after the last one.
      images: float32 ``[images,H,W,C]`` in [0, 1]; of a pipeline that makes none, its image embeddings.
      calls: component (``name``, or ``name.1`` in a list) -> the recorded calls of its network, for PyTorch's side.
    """

    rows: dict[str, Any]
    encoded: bool
    timesteps: np.ndarray
    samples: np.ndarray
    images: np.ndarray
    calls: dict[str, list[RecordedCall]]


def run_traced(pipe: DiffusionPipeline, *args: Any, **call: Any) -> Trace:
    """Run a pipeline step by step and record everything, with matrix products in full precision."""
    pipe = recording(pipe)
    with jax.default_matmul_precision("highest"):
        request = pipe.request(*args, output_type="np", **call)
        out = run(pipe, request, return_trajectory=True)
    evaluations = int(request.plan.num_evaluations)
    calls = {name: network.calls for name, network in networks(pipe).items() if isinstance(network, TorchNetwork)}
    return Trace(
        request.rows,
        starts_encoded(request.method),
        np.asarray(request.plan.timesteps[:evaluations]),
        np.asarray(out.trajectory),
        np.asarray(next(out.results[name] for name in RESULTS if name in out.results)),
        {name: found for name, found in calls.items() if found},
    )


def starts_encoded(method: Method) -> bool:
    """Whether a network computes the first sample, in the start or in a condition whose row it reads."""
    reads = {name for row in method.start.reads for name in row.split("|")}
    return any(networks_of(method.start)) or any(reads & {*part.adds} for part in method.conditions)


def recording(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline with its PyTorch networks, if any, replaced by networks that record their calls."""
    new: dict[str, Any] = {}
    for name, part in pipe.components.items():
        if isinstance(part, TorchNetwork):
            new[name] = part.recording(), {}
        elif isinstance(part, tuple) and all(isinstance(member, TorchNetwork) for member in part):
            new[name] = [(member.recording(), {}) for member in part]
    return pipe.replace(**new) if new else pipe


def networks(pipe: DiffusionPipeline) -> dict[str, Any]:
    """All networks of a pipeline by name; the members of a list are ``name.0``, ``name.1`` ..."""
    found: dict[str, Any] = {}
    for name in pipe.params:
        part = pipe.components[name]
        found |= {f"{name}.{k}": member for k, member in enumerate(part)} if isinstance(part, tuple) else {name: part}
    return found


def parameters(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The trees of parameters under the names of :func:`networks`."""
    found: dict[str, Any] = {}
    for name, trees in pipe.params.items():
        found |= {f"{name}.{k}": tree for k, tree in enumerate(trees)} if isinstance(trees, tuple) else {name: trees}
    return found
