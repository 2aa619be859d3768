"""Changes inside the UNet of a denoiser: perturbed attention, FreeU, cached deep features (DeepCache).

Each takes the network's place in a method, so that ControlNets and guidance stay around it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffuse_jax.models.intercept import Call, changed_layers
from diffuse_jax.pipelines.method import Params, Part, Rows, Step
from diffuse_jax.pipelines.parts.guidance import per_image


@dataclasses.dataclass(frozen=True)
class PerturbedAttention(Part):
    """The network with self-attention replaced by the identity for images whose row ``perturbation`` is ``index``.

    Attributes:
      inner: the network.
      layers: paths of the attention layers, joined by "/".
      index: which copy of the conditional branch it is.
    """

    inner: Any
    layers: tuple[str, ...]
    index: int

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        def change(call: Call) -> Any:
            output = call.output()
            if call.name != "attend" or "/".join(call.path[:-1]) not in self.layers:
                return output
            value = call.inputs[2]
            return jnp.where(per_image(rows["perturbation"] == self.index, value), value, output)

        with changed_layers(change):
            return self.inner(params, rows, x, step)


@dataclasses.dataclass(frozen=True)
class AwayFrom(Part):
    """The strength of a perturbed copy, for ``ClassifierFree.perturbed``: ``pag [B, 2]`` is the scale, and how much of
    it each timestep below 1000 takes away."""

    @property
    def reads(self) -> tuple[str, ...]:
        return ("pag",)

    def scale(self, rows: Rows, step: Step) -> jax.Array:
        """``[B]``."""
        scale, fall = rows["pag"].T
        return jnp.maximum(scale - fall * (1000 - step.t), 0.0)


@dataclasses.dataclass(frozen=True)
class FreeU(Part):
    """The network with stronger features and weaker low frequencies of the skip connections in its first two upward
    levels (Si et al. 2023, arXiv 2309.11497). Reads ``freeu [B, 4]``: b1, b2, s1, s2."""

    inner: Any

    @property
    def reads(self) -> tuple[str, ...]:
        return ("freeu",)

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        levels = {"up_blocks_0": (0, 2), "up_blocks_1": (1, 3)}

        def change(call: Call) -> Any:
            if not call.name.startswith("joins_") or call.path[0] not in levels:
                return call.output()
            features, skip = call.inputs
            b, s = (per_image(rows["freeu"][:, k], features) for k in levels[call.path[0]])
            half = features.shape[-1] // 2
            first = features[..., :half] * b.astype(features.dtype)
            return call.output(jnp.concatenate([first, features[..., half:]], -1), scaled_low_frequencies(skip, s))

        with changed_layers(change):
            return self.inner(params, rows, x, step)


def scaled_low_frequencies(x: jax.Array, scale: jax.Array) -> jax.Array:
    """``x [B,h,w,C]`` with its lowest frequencies (0 and -1 of each axis) multiplied by ``scale [B,1,1,1]``."""
    low = [jnp.isin(jnp.arange(n), jnp.array([0, n - 1])) for n in x.shape[1:3]]
    box = (low[0][:, None] & low[1][None])[None, :, :, None]
    spectrum = jnp.fft.fft2(x.astype(jnp.float32), axes=(1, 2))
    return jnp.fft.ifft2(jnp.where(box, spectrum * scale, spectrum), axes=(1, 2)).real.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class DeepCache(Part):
    """The network with its deep features kept for ``interval`` evaluations (Ma et al. 2023, arXiv 2312.00858): between
    them only the layers at the finest resolution run.

    Attributes:
      inner: the network.
      interval: evaluations from one that computes everything to the next.
      skips: how many of the finest skip connections are recomputed each time.
    """

    inner: Any
    interval: int
    skips: int = 1

    @property
    def keeps(self) -> bool:
        return True

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        shapes = layer_shapes(lambda: self.inner(params, rows, x, step))
        joins = [path for path in shapes if path[-1:] and path[-1].startswith("joins_")]
        boundary = joins[-self.skips]
        deep = deep_layers([*shapes], boundary, self.skips)

        def whole(kept: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = []

            def note(call: Call) -> Any:
                found.extend([call.inputs[0]] if call.path == boundary else [])
                return call.output()

            with changed_layers(note):
                output = self.inner(params, rows, x, step)
            return output, found[0]

        def shallow(kept: jax.Array) -> tuple[jax.Array, jax.Array]:
            def change(call: Call) -> Any:
                if call.path in deep:  # what it would return is used by deep layers only
                    return jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), shapes[call.path].output)
                return call.output(kept, call.inputs[1]) if call.path == boundary else call.output()

            with changed_layers(change):
                return self.inner(params, rows, x, step), kept

        kept = step.kept.read("deep_features", shapes[boundary].input)
        output, kept = jax.lax.cond(step.i % self.interval == 0, whole, shallow, kept)
        step.kept.write("deep_features", kept)
        return output


LayerPath = tuple[str, ...]


class LayerShapes(NamedTuple):
    """Shapes and dtypes of a layer's first input and of what it returns (an array or a tree of them)."""

    input: Any
    output: Any


def layer_shapes(function: Callable[[], Any]) -> dict[LayerPath, LayerShapes]:
    """Path -> shapes of all layers that a function calls, in the order in which they finish; nothing is computed."""
    found: dict[LayerPath, LayerShapes] = {}
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)

    def note(call: Call) -> Any:
        output = call.output()
        found[call.path] = LayerShapes(
            shape(jax.tree.leaves((call.inputs, call.named))[0]), jax.tree.map(shape, output)
        )
        return output

    def traced() -> Any:
        with changed_layers(note):
            return function()

    jax.eval_shape(traced)
    return found


def deep_layers(order: Sequence[LayerPath], boundary: LayerPath, skips: int) -> set[LayerPath]:
    """The blocks of a UNet between its first ``skips`` skip connections and the join at which these come in again.

    Args:
      order: paths of its layers, in the order in which they finish.
      boundary: path of that join.
      skips: their number; the first is the output of ``conv_in``.
    """
    of_levels = lambda path: len(path) == 2 and path[0].startswith(("down_blocks_", "up_blocks_"))
    blocks = [path for path in order if path == ("mid_block",) or of_levels(path)]
    deep: set[LayerPath] = set()
    made = 1
    for path, following in itertools.pairwise(blocks[: blocks.index(boundary) + 1]):
        if made == skips:
            deep.add(path)
        elif not (path[-1].startswith("resnets_") and following[-1].startswith("attentions_")):
            made += 1  # a residual block with attention after it makes no skip connection of its own
    return deep
