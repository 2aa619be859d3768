"""Low-rank adaptation (LoRA; Hu et al. 2021, arXiv 2106.09685).

A dense layer with kernel ``W [in, out]`` gets a pair ``down [in, r]``, ``up [r, out]`` and computes
``x W + scale * (x down) up`` (section 4.1, where it is ``W_0 + B A`` and ``scale`` is ``alpha / r``). A convolution's
pair has ``down [k, k, in, r]``, which is one with its stride and padding. A network's pairs form a separate tree,
``{..., "to_q": {"down", "up"}}``, at the paths of the layers. :func:`live` applies the pairs beside the kernels, for
training: no gradient of a whole kernel is ever computed. :func:`merge` adds them to the kernels, for sampling: nothing
extra is left to compute.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffuse_jax.adapters.targets import TARGETS
from diffuse_jax.kernels import conv2d
from diffuse_jax.models.base import Model, Params
from diffuse_jax.models.intercept import Call, changed_layers
from diffuse_jax.sharding import to_current_mesh
from diffuse_jax.weights.names import Path, flatten, unflatten

PAIR = ("down", "up")


def init(shapes: Params, rank: int, key: jax.Array, targets: str = TARGETS) -> Params:
    """New pairs for a network's layers in float32: ``down`` normal with deviation ``1 / rank``, ``up`` zero.

    They leave the network's output unchanged until they are trained.

    Args:
      shapes: the network's parameters or their shapes.
      rank: inner dimension ``r``.
      key: random key for ``down``.
      targets: regular expression that is searched for in the layers' paths, such as ``a/b/to_q``.

    Raises:
      ValueError: no layer matches, or the rank is not positive, or above what any of the layers can have.
    """
    if rank < 1:
        raise ValueError(f"the LoRA rank must be at least 1, got {rank}")
    layers = adaptable(shapes)
    chosen = [path for path in layers if re.search(targets, "/" + "/".join(path))]
    if not chosen:
        raise ValueError(f"no layer matches the LoRA targets {targets!r}; the network has, for example, "
                         + ", ".join("/".join(path) for path in list(layers)[:3]))  # fmt: skip
    widest = max(chosen, key=lambda path: highest_rank(layers[path]))
    if rank > (limit := highest_rank(layers[widest])):
        raise ValueError(
            f"the LoRA rank must be at most {limit} here, got {rank}: a change of a layer has no higher rank than its "
            f"narrower side, and the widest layer, {'/'.join(widest)}, is {' x '.join(map(str, layers[widest]))}"
        )
    flat: dict[Path, jax.Array] = {}
    for path, k in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        *inputs, columns = layers[path]
        flat[(*path, "down")] = jax.random.normal(k, (*inputs, rank), jnp.float32) / rank
        flat[(*path, "up")] = jnp.zeros((rank, columns), jnp.float32)
    return unflatten(flat)


def adaptable(shapes: Params) -> dict[Path, tuple[int, ...]]:
    """Path -> shape of the kernel, ``[in, out]`` or ``[k, k, in, out]``, of every layer that can have a pair.

    Convolutions of each channel by itself, whose kernels have one input, cannot.
    """
    kernels = {path[:-1]: leaf.shape for path, leaf in flatten(shapes).items() if path[-1] == "kernel"}
    return {path: shape for path, shape in kernels.items() if len(shape) == 2 or (len(shape) == 4 and shape[2] > 1)}


def highest_rank(shape: tuple[int, ...]) -> int:
    """The rank of a kernel of this shape, as a matrix of its window's inputs and its outputs."""
    return min(math.prod(shape[:-1]), shape[-1])


def merge(params: Params, pairs: Params, scale: float = 1.0) -> Params:
    """Parameters with ``scale * down @ up`` added to the kernels; merging with ``-scale`` subtracts it again.

    The sum is computed in float32 and cast to the kernel's dtype.

    Raises:
      ValueError: a pair has no kernel in ``params``, or does not fit it.
    """
    flat = flatten(params)
    for path, pair in pairs_of(pairs).items():
        kernel, name = flat.get((*path, "kernel")), "/".join(path)
        if kernel is None or kernel.shape != (*pair["down"].shape[:-1], pair["up"].shape[1]):
            have = "no kernel there" if kernel is None else f"a kernel of shape {kernel.shape}"
            raise ValueError(
                f"LoRA for {name} is {pair['down'].shape} x {pair['up'].shape}; this network has {have}: "
                "the LoRA was made for another network"
            )
        change = scale * (jnp.asarray(pair["down"], jnp.float32) @ jnp.asarray(pair["up"], jnp.float32))
        flat[(*path, "kernel")] = (jnp.asarray(kernel, jnp.float32) + change).astype(kernel.dtype)
    return unflatten(flat)


def pairs_of(pairs: Params) -> dict[Path, dict[str, jax.Array]]:
    """Path of each layer -> its pair."""
    found = parts_of(pairs)
    for path, pair in found.items():
        if set(pair) != set(PAIR):
            raise ValueError(f"LoRA for {'/'.join(path)} must have down and up, got {sorted(pair)}")
    return found


def parts_of(tree: Params) -> dict[Path, dict[str, jax.Array]]:
    """Path of each layer -> its arrays by name."""
    found: dict[Path, dict[str, jax.Array]] = {}
    for path, leaf in flatten(tree).items():
        found.setdefault(path[:-1], {})[path[-1]] = leaf
    return found


@contextlib.contextmanager
def live(tree: Params, scale: Any = 1.0) -> Iterator[None]:
    """Networks applied in this context use the pairs, which are ordinary inputs, so gradients flow to them.

    Args:
      tree: ``{..., "to_q": {"down", "up"}}``, for convolutions with ``down [k,k,in,r]``; a layer may have ``whole``, of
        its kernel's shape, instead or as well.
      scale: strength; a number, or ``[B]`` for each image. Layers whose batch is ``B`` times a number of guidance
        branches get it for each branch.
    """
    table = parts_of(tree)

    def add(call: Call) -> Any:
        y = call.output()
        if call.path not in table:
            return y
        parts = {name: jnp.asarray(to_current_mesh(leaf), y.dtype) for name, leaf in table[call.path].items()}
        (x,) = call.inputs
        x = jnp.asarray(x, y.dtype)
        strength = _strength(scale, y)
        if "down" in parts:
            y = y + strength * (_through(x, parts["down"], call.module) @ parts["up"])
        if "whole" in parts:
            y = y + strength * _through(x, parts["whole"], call.module)
        return y

    with changed_layers(add):
        yield


def _through(x: jax.Array, kernel: jax.Array, layer: Any) -> jax.Array:
    """``x`` through a kernel in place of the layer's own."""
    if kernel.ndim == 2:
        return x @ kernel
    p = layer.padding
    return conv2d(x, kernel, stride=layer.stride, padding=((p, p), (p, p)) if isinstance(p, int) else p)


def _strength(scale: Any, y: jax.Array) -> Any:
    """A strength that multiplies ``y``: a number, or ``[B]`` repeated for each branch of ``y [K B, ...]``."""
    if not getattr(scale, "ndim", 0):
        return scale if isinstance(scale, float) else jnp.asarray(scale, y.dtype)
    repeated = jnp.tile(scale, max(1, len(y) // len(scale))).astype(y.dtype)
    return repeated.reshape(-1, *(1,) * (y.ndim - 1))


class Adapted(NamedTuple):
    """A network with LoRA pairs; it can be applied wherever a :class:`Model` can."""

    model: Model
    pairs: Params
    scale: float = 1.0

    @property
    def config(self) -> Any:
        return self.model.config

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Like ``model.apply``, with the pairs."""
        with live(self.pairs, self.scale):
            return self.model.apply(variables, *args, **kwargs)
