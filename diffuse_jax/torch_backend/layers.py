"""Finding where two networks diverge: each layer's input and output on both sides, in order of execution.

Layers are matched by name, because our parameter trees use PyTorch's names.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from diffuse_jax.models.intercept import recorded_layers
from diffuse_jax.torch_backend.adapter import TorchNetwork
from diffuse_jax.torch_backend.components import Call
from diffuse_jax.torch_backend.networks import to_numpy
from diffuse_jax.torch_backend.report import Comparison, compare
from diffuse_jax.weights import names

NOT_COMPARABLE = re.compile(
    r"(vision_model\.)?(text|vision)_model(\.encoder)?"  # ours also returns the hidden states of all layers
    r"|(en|de)coder\.mid_block\.attentions\.0"  # theirs includes the residual
)
"""Layers with the same name but different outputs, which are not compared."""


class LayerErrors(NamedTuple):
    """Comparison of a layer's inputs and outputs; the input is None if the sides do not take the same tensor."""

    name: str
    input: Comparison | None
    output: Comparison


def compare_layers(call: Call, model: Any, params: Any, network: TorchNetwork, tolerance: float) -> list[LayerErrors]:
    """Compare all layers that both sides have, in PyTorch's order of execution; a layer follows the layers inside
    it."""
    with jax.default_matmul_precision("highest"):
        ours = jax.device_get(
            record(params, call.recorded.args, call.recorded.kwargs, method=call.recorded.method, model=model)
        )
    found: dict[str, LayerErrors] = {}

    def hook(name: str, layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        if name in ours and name not in found:
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
            before, after = ours[name]
            # Inputs that do not correspond (ids, a mask) have different shapes and are left out.
            source = (
                None if given is None or given.numel() != before.size else errors(name, layer, before, given, tolerance)
            )
            found[name] = LayerErrors(name, source, errors(name, layer, after, first_tensor(output), tolerance))

    handles = [
        layer.register_forward_hook(functools.partial(hook, our_name(name, ours)), with_kwargs=True)
        for name, layer in network.module.named_modules()
    ]
    try:
        network.run(call.recorded.method, call.recorded.args, call.recorded.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


@functools.partial(jax.jit, static_argnames=("method", "model"))
def record(params: Any, args: Any, kwargs: Any, *, method: str, model: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
    """PyTorch's name of each of our layers -> its input and output."""
    with recorded_layers() as layers:
        model.apply({"params": params}, *args, method=method, **kwargs)
    found: dict[str, tuple[jax.Array, jax.Array]] = {}
    for layer in layers:
        name = names.torch_key((*layer.path, "")).removesuffix(".")
        if name and not NOT_COMPARABLE.fullmatch(name):
            found.setdefault(name, (layer.input, layer.output))
    return found


def our_name(name: str, ours: Iterable[str]) -> str:
    """A module's name in checkpoints; in transformers 5, an encoder's modules are one level higher in memory."""
    return names.known_name(f"{name}.", {f"{layer}." for layer in ours}).removesuffix(".")


def first_tensor(output: Any) -> torch.Tensor:
    """The first tensor of a module's output."""
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


def errors(name: str, layer: Any, ours: np.ndarray, theirs: torch.Tensor, tolerance: float) -> Comparison:
    """Compare two tensors as ``[..., C]``; in PyTorch, channels are second in feature maps and around group norms."""
    if theirs.ndim == 4 or isinstance(layer, torch.nn.GroupNorm):
        theirs = theirs.movedim(1, -1)
    if theirs.numel() != ours.size:
        return Comparison(name, ours.shape, math.inf, math.inf, math.inf, tolerance)
    return compare(name, np.asarray(ours, np.float32), to_numpy(theirs).reshape(ours.shape), tolerance)


def first_difference(layers: Sequence[LayerErrors]) -> dict[str, Any] | None:
    """The first layer whose output differs, with its context and a message; None if all agree.

    Returns:
      ``{"layer", "relative_error", "tolerance", "input_agrees", "inside", "last_that_agrees", "message"}``.
    """
    at = next((i for i, layer in enumerate(layers) if not layer.output.ok), None)
    if at is None:
        return None
    first = layers[at]
    agreed = layers[at - 1].name if at else None
    around = [x for x in layers[at + 1 :] if first.name.startswith(f"{x.name}.") and x.input is not None and x.input.ok]
    inside = around[0].name if around else None
    agrees = first.input is None or first.input.ok
    message = f"{first.name}: relative error {first.output.relative_error:.2e}, tolerance {first.output.tolerance:g}"
    if agrees:
        message += "; its input agrees, so look at its parameters and settings"
    else:
        assert first.input is not None
        message += f"; its input already differs ({first.input.relative_error:.2e}), so look at what is computed"
        message += f" between {agreed or 'the inputs'} and it" + (f", inside {inside}" if inside else "")
    return {
        "layer": first.name,
        "relative_error": first.output.relative_error if math.isfinite(first.output.relative_error) else None,
        "tolerance": first.output.tolerance,
        "input_agrees": agrees,
        "inside": inside,
        "last_that_agrees": agreed,
        "message": message,
    }
