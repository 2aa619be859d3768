"""A run with everything that goes in and comes out between its steps, the same for both sides."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from diffuse_jax.pipelines import DiffusionPipeline, run
from diffuse_jax.pipelines.method import networks_of
from diffuse_jax.torch_backend.adapter import Recorded, TorchNetwork


class Trace(NamedTuple):
    """What a run was and gave.

    Attributes:
      rows: the request's data.
      encoded: whether the first sample holds what a network gave, such as an encoded image.
      timesteps: of each evaluation.
      samples: ``[images, evaluations + 1, ...]``: before each step and after the last one.
      images: float32 ``[images,H,W,C]`` in [0, 1].
      calls: component (``name`` or ``name.1`` in a list) -> its applications, of PyTorch's networks.
    """

    rows: dict[str, Any]
    encoded: bool
    timesteps: np.ndarray
    samples: np.ndarray
    images: np.ndarray
    calls: dict[str, list[Recorded]]


def run_traced(pipe: DiffusionPipeline, *args: Any, **call: Any) -> Trace:
    """Run a pipeline step by step and remember everything; matrix products in full precision."""
    pipe = recording(pipe)
    with jax.default_matmul_precision("highest"):
        request = pipe.request(*args, output_type="np", **call)
        out = run(pipe, request, return_trajectory=True)
    evaluations = int(request.plan.num_evaluations)
    calls = {name: network.calls for name, network in networks(pipe).items() if isinstance(network, TorchNetwork)}
    return Trace(
        request.rows,
        any(networks_of(request.method.start)),
        np.asarray(request.plan.timesteps[:evaluations]),
        np.asarray(out.trajectory),
        np.asarray(out.images),
        {name: found for name, found in calls.items() if found},
    )


def recording(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline with PyTorch's networks, if it has any, replaced by such that remember what they are given."""
    new: dict[str, Any] = {}
    for name, part in pipe.components.items():
        if isinstance(part, TorchNetwork):
            new[name] = part.recording(), {}
        elif isinstance(part, tuple) and all(isinstance(member, TorchNetwork) for member in part):
            new[name] = [(member.recording(), {}) for member in part]
    return pipe.replace(**new) if new else pipe


def networks(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Every network of a pipeline by name; the members of a list are ``name.0``, ``name.1`` ..."""
    found: dict[str, Any] = {}
    for name in pipe.params:
        part = pipe.components[name]
        found |= {f"{name}.{k}": member for k, member in enumerate(part)} if isinstance(part, tuple) else {name: part}
    return found


def parameters(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The trees of parameters under the names of :func:`networks`."""
    found: dict[str, Any] = {}
    for name, own in pipe.params.items():
        found |= {f"{name}.{k}": tree for k, tree in enumerate(own)} if isinstance(own, tuple) else {name: own}
    return found
