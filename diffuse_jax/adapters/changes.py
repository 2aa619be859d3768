"""Changes of kernels as files store them, in one form: the factors of a layer, and what they add to its kernel.

=====  ====================================================================  ===============================
kind   factors (``k`` is the window of a convolution, empty for dense)       what is added to ``W [out,in,k]``
=====  ====================================================================  ===============================
LoRA   ``up [out,r]``, ``down [r,in,k]``; or ``down [r,in]``, ``mid``         ``up @ down``
LoHa   ``w1_a, w2_a [out,r]``, ``w1_b, w2_b [r,in k]``; cores ``t1, t2``      ``(w1_a @ w1_b) * (w2_a @ w2_b)``
LoKr   ``w1``, ``w2``, each whole or as a product ``a @ b``; core ``t2``      ``kron(w1, w2)``
diff   the whole difference                                                  itself
=====  ====================================================================  ===============================

All are scaled by a factor, ``alpha / r``. DoRA (arXiv 2402.09353) has a ``magnitude`` besides: the changed kernel's
columns are then rescaled to these lengths. Everything is in PyTorch's axis order and computed in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffuse_jax.weights.copy import compact

Shape = tuple[int, ...]

KINDS: dict[str, tuple[str, ...]] = {
    "LoRA": ("down", "up"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LoKr": (),
    "diff": ("diff",),
}
"""Kind -> the factors that it needs; LoKr has several forms."""

OWNER = {"mid": "LoRA", "down": "LoRA", "up": "LoRA", "diff": "diff"}
"""Factor -> its kind; the names of the others say it."""

MAGNITUDES = ("magnitude", "dora_scale")
"""DoRA's lengths in files of PEFT, one for each output, and of LyCORIS, in the shape in which they multiply."""

SHARED = ("alpha", "scalar", *MAGNITUDES)


@dataclasses.dataclass(frozen=True)
class Change:
    """The change of one layer's kernel.

    Attributes:
      parts: the factors under the names above, with ``hada_`` or ``lokr_`` before them, as views of their file.
      shape: the kernel's shape, ``[out, in, *window]``.
      factor: what the product is multiplied by.
    """

    parts: Mapping[str, np.ndarray]
    shape: Shape
    factor: float = 1.0

    @property
    def kind(self) -> str:
        """``LoRA``, ``LoHa``, ``LoKr`` or ``diff``."""
        return kinds_of(self.parts)[0]

    @property
    def needs_weight(self) -> bool:
        """Whether it is a DoRA, which depends on the kernel that it changes."""
        return any(name in self.parts for name in MAGNITUDES)

    @property
    def low_rank(self) -> bool:
        """Whether it is a product of two matrices."""
        return self.kind == "LoRA" and not self.needs_weight

    @property
    def rank(self) -> int:
        """What ``alpha`` is divided by; 0 for factors without an inner dimension."""
        return rank_of(self.parts)

    @property
    def pair_rank(self) -> int:
        """The inner dimension of :meth:`pair`, which a core may have changed."""
        return self.parts["up"].shape[1]

    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        """``down [r, in, *window]`` and ``up [out, r]`` in float32, the factor in ``up``."""
        down, up = wide(self.parts["down"]), wide(self.parts["up"])
        if "mid" in self.parts:  # a Tucker decomposition; mid [r, r', *window] takes down [r', in] to the window
            down = np.einsum("oi...,ij->oj...", wide(self.parts["mid"]), down.reshape(len(down), -1))
        rank = len(down)
        return down.reshape(rank, *self.shape[1:]), up.reshape(self.shape[0], rank) * np.float32(self._scale())

    def difference(self, weight: np.ndarray | None = None) -> np.ndarray:
        """What is added to the kernel, float32 of its shape.

        Args:
          weight: the kernel in PyTorch's axis order, for DoRA, which depends on it.
        """
        change = self._product()
        if not self.needs_weight:
            return change
        assert weight is not None
        weight = np.asarray(weight, np.float32)
        (lengths,) = (wide(self.parts[name]) for name in MAGNITUDES if name in self.parts)
        by_input = "dora_scale" in self.parts and lengths.ndim > 1 and len(lengths) == 1 != self.shape[0]
        return decomposed(weight + change, lengths, axis=int(by_input)) - weight

    def _product(self) -> np.ndarray:
        p, kind = {name: array for name, array in self.parts.items() if name not in SHARED}, self.kind
        if kind == "LoRA":
            down, up = self.pair()
            return (up @ down.reshape(len(down), -1)).reshape(self.shape)
        if kind == "diff":
            product = wide(p["diff"])
        elif kind == "LoHa":
            product = product_of(p, "hada_w1", "hada_t1") * product_of(p, "hada_w2", "hada_t2")
        else:
            first, second = product_of(p, "lokr_w1", "lokr_t1"), product_of(p, "lokr_w2", "lokr_t2")
            product = np.kron(first.reshape(*first.shape, *(1,) * (second.ndim - first.ndim)), second)
        return np.float32(self._scale()) * product.reshape(self.shape)

    def _scale(self) -> float:
        return self.factor * float(self.parts["scalar"].item() if "scalar" in self.parts else 1.0)


def wide(array: np.ndarray) -> np.ndarray:
    """An array in float32, in memory."""
    return compact(array, np.dtype(np.float32))


def product_of(parts: Mapping[str, np.ndarray], name: str, core: str) -> np.ndarray:
    """A factor that is whole, a product ``a @ b``, or one with a core ``[r, r, *window]`` between ``a`` and ``b``."""
    if name in parts:
        return wide(parts[name])
    a, b = wide(parts[f"{name}_a"]), wide(parts[f"{name}_b"])
    if core not in parts:
        return a @ b
    return np.einsum("ij...,ip,jq->pq...", wide(parts[core]), a, b)


def decomposed(weight: np.ndarray, lengths: np.ndarray, axis: int) -> np.ndarray:
    """A weight ``[out,in,...]`` with columns of the given lengths: one for each output (axis 0) or input (axis 1)."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    shape = [1] * weight.ndim
    shape[axis] = -1
    have = np.sqrt(np.square(weight).sum(others, keepdims=True))
    return weight * (lengths.reshape(shape) / np.maximum(have, np.finfo(np.float32).tiny))


def kinds_of(parts: Mapping[str, Any]) -> list[str]:
    """The kinds that a layer's factors belong to; more than one is a mistake in the file."""
    prefixes = {"hada": "LoHa", "lokr": "LoKr"}
    found = [OWNER.get(name) or prefixes[name.partition("_")[0]] for name in parts if name not in SHARED]
    return list(dict.fromkeys(found))


def rank_of(parts: Mapping[str, np.ndarray]) -> int:
    """The inner dimension of a layer's factors; 0 if none is a product."""
    axes = {"down": 0, "hada_w1_b": 0, "lokr_w1_b": 0, "lokr_w2_b": 0}
    return next((parts[name].shape[axis] for name, axis in axes.items() if name in parts and parts[name].ndim), 0)


def problem(parts: Mapping[str, np.ndarray], shape: Shape) -> str | None:
    """Why factors do not form a change of a kernel of this shape; None if they do. Nothing is computed."""
    kinds = kinds_of(parts)
    if len(kinds) != 1:
        return f"has factors of {' and '.join(sorted(kinds))}" if kinds else f"has {', '.join(parts)} and no factors"
    kind = kinds[0]
    if missing := [name for name in KINDS[kind] if name not in parts]:
        return f"has no {missing[0]} half" if kind == "LoRA" else f"has no {missing[0]}"
    shapes = {name: array.shape for name, array in parts.items() if name not in SHARED}
    sizes = ", ".join(f"{name} {list(s)}" for name, s in shapes.items())
    if kind == "LoRA":
        sizes = f"down {shapes['down']} and up {shapes['up']}" + (
            f" with mid {shapes['mid']}" if "mid" in shapes else ""
        )
    fits = {"LoRA": _lora_fits, "LoHa": _loha_fits, "LoKr": _lokr_fits, "diff": lambda s, _: s["diff"]}[kind]
    try:
        result = fits(shapes, shape)
    except (KeyError, ValueError, IndexError):
        result = None
    # A 1x1 convolution and a dense layer are the same, in files as in checkpoints.
    if result is None or len(result) < 2 or _squeezed(result) != _squeezed(shape):
        layer = f"{shape[1]} -> {shape[0]}" + (f" (window {list(shape[2:])})" if len(shape) > 2 else "")
        return f"{sizes} do not fit a layer {layer}"
    lengths = {name: parts[name].shape for name in MAGNITUDES if name in parts}
    if len(lengths) > 1:
        return f"has {' and '.join(lengths)}"
    for name, size in lengths.items():
        by_input = name == "dora_scale" and len(size) > 1 and size[0] == 1 != shape[0]
        if math.prod(size) != max(size, default=0) or math.prod(size) != shape[int(by_input)]:
            return f"{name} {size} does not fit a layer {shape[1]} -> {shape[0]}"
    if "scalar" in parts and parts["scalar"].size != 1:
        return f"scalar has shape {parts['scalar'].shape}, expected one number"
    return None


def _squeezed(shape: Shape) -> Shape:
    return shape[:2] if math.prod(shape[2:]) == 1 else shape


def _lora_fits(s: Mapping[str, Shape], shape: Shape) -> Shape | None:
    down, up = s["down"], s["up"]
    inner = down[0]
    if "mid" in s:
        (inner, between, *window), down = s["mid"], (*down, *(1,) * (2 - len(down)))
        if between != down[0] or math.prod(down[2:]) != 1:
            return None
        down = (inner, down[1], *window)
    return (up[0], *down[1:]) if inner and up[1] == inner and math.prod(up[2:]) == 1 else None


def _loha_fits(s: Mapping[str, Shape], shape: Shape) -> Shape | None:
    first, second = _product_shape(s, "hada_w1", "hada_t1"), _product_shape(s, "hada_w2", "hada_t2")
    if first != second or first is None:
        return None
    return shape if len(first) == 2 and first == (shape[0], math.prod(shape[1:])) else first


def _lokr_fits(s: Mapping[str, Shape], shape: Shape) -> Shape | None:
    first, second = _product_shape(s, "lokr_w1", "lokr_t1"), _product_shape(s, "lokr_w2", "lokr_t2")
    if first is None or second is None or len(first) != 2 or len(second) < 2:
        return None
    result = (first[0] * second[0], first[1] * second[1], *second[2:])
    return shape if len(result) == 2 and result == (shape[0], math.prod(shape[1:])) else result


def _product_shape(s: Mapping[str, Shape], name: str, core: str) -> Shape | None:
    """The shape of :func:`product_of`, or None if its factors do not fit each other."""
    if name in s:
        return s[name]
    (a, inner), (outer, b) = s[f"{name}_a"], s[f"{name}_b"]
    if core not in s:
        return (a, b) if 0 < inner == outer else None
    if s[core][:2] != (a, outer):
        return None
    return (inner, b, *s[core][2:])
