"""Low-rank adaptation (LoRA; Hu et al. 2021, arXiv 2106.09685).

A dense layer with kernel ``W [in, out]`` gets a pair ``down [in, r]``, ``up [r, out]`` and computes
``x W + scale * (x down) up`` (section 4.1, where it is ``W_0 + B A`` and ``scale`` is ``alpha / r``). A network's pairs
form a separate tree, ``{..., "to_q": {"down", "up"}}``, at the paths of the layers. :func:`live` applies the pairs
beside the kernels, for training: no gradient of a whole kernel is ever computed. :func:`merge` adds them to the
kernels, for sampling: nothing extra is left to compute.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffuse_jax.adapters.targets import TARGETS
from diffuse_jax.models.base import Model, Params
from diffuse_jax.models.intercept import Call, changed_layers
from diffuse_jax.sharding import to_current_mesh
from diffuse_jax.weights.names import Path, flatten, unflatten

PAIR = ("down", "up")


def init(shapes: Params, rank: int, key: jax.Array, targets: str = TARGETS) -> Params:
    """New pairs for a network's dense layers in float32: ``down`` normal with deviation ``1 / rank``, ``up`` zero.

    They leave the network's output unchanged until they are trained.

    Args:
      shapes: the network's parameters or their shapes.
      rank: inner dimension ``r``.
      key: random key for ``down``.
      targets: regular expression that is searched for in the layers' paths, such as ``a/b/to_q``.

    Raises:
      ValueError: the rank is not positive, or no dense layer matches.
    """
    if rank < 1:
        raise ValueError(f"the LoRA rank must be at least 1, got {rank}")
    layers = dense_layers(shapes)
    chosen = [path for path in layers if re.search(targets, "/" + "/".join(path))]
    if not chosen:
        raise ValueError(f"no dense layer matches the LoRA targets {targets!r}; the network has, for example, "
                         + ", ".join("/".join(path) for path in list(layers)[:3]))  # fmt: skip
    flat: dict[Path, jax.Array] = {}
    for path, k in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        rows, columns = layers[path]
        flat[(*path, "down")] = jax.random.normal(k, (rows, rank), jnp.float32) / rank
        flat[(*path, "up")] = jnp.zeros((rank, columns), jnp.float32)
    return unflatten(flat)


def dense_layers(shapes: Params) -> dict[Path, tuple[int, int]]:
    """Path -> ``(in, out)`` of every layer with a kernel of rank 2."""
    kernels = {path[:-1]: leaf.shape for path, leaf in flatten(shapes).items() if path[-1] == "kernel"}
    return {path: shape for path, shape in kernels.items() if len(shape) == 2}


def merge(params: Params, pairs: Params, scale: float = 1.0) -> Params:
    """Parameters with ``scale * down @ up`` added to the kernels; merging with ``-scale`` subtracts it again.

    The sum is computed in float32 and cast to the kernel's dtype.

    Raises:
      ValueError: a pair has no kernel in ``params``, or does not fit it.
    """
    flat = flatten(params)
    for path, pair in pairs_of(pairs).items():
        kernel, name = flat.get((*path, "kernel")), "/".join(path)
        if kernel is None or kernel.shape != (pair["down"].shape[0], pair["up"].shape[1]):
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
    found: dict[Path, dict[str, jax.Array]] = {}
    for path, leaf in flatten(pairs).items():
        found.setdefault(path[:-1], {})[path[-1]] = leaf
    for path, pair in found.items():
        if set(pair) != set(PAIR):
            raise ValueError(f"LoRA for {'/'.join(path)} must have down and up, got {sorted(pair)}")
    return found


@contextlib.contextmanager
def live(pairs: Params, scale: float = 1.0) -> Iterator[None]:
    """Networks applied in this context use the pairs, which are ordinary inputs, so gradients flow to them."""
    table = pairs_of(pairs)

    def add(call: Call) -> Any:
        y = call.output()
        if call.path not in table:
            return y
        down, up = (jnp.asarray(to_current_mesh(table[call.path][name]), y.dtype) for name in PAIR)
        (x,) = call.inputs
        return y + scale * ((jnp.asarray(x, y.dtype) @ down) @ up)

    with changed_layers(add):
        yield


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
