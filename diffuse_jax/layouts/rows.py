"""Renaming and reshaping tensors by a table; one table serves reading and writing.

A table is a list of rows ``(original prefix, diffusers prefix, operation)``. Reading looks up a key's longest prefix on
the left, writing on the right; the rest of the key is the same on both sides. The operation says how the tensors
differ:

==============  ==============================================================================================
``same``        not at all
``pointwise``   the original's matrices are 1x1 convolutions, ``[out, in, 1, 1]``
``transpose``   the original's matrix is ``[in, out]``
``part0/1/2``   the original holds query, key and value as one tensor; this is its first, second or third part
==============  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from diffuse_jax.errors import WeightsError

Row = tuple[str, str, str]
Table = list[Row]


def to_diffusers(tensors: Mapping[str, np.ndarray], table: Table) -> dict[str, np.ndarray]:
    """Original names and shapes -> those of diffusers, as views.

    A key that matches no row keeps its name, so that matching against a network can report it.
    """
    rows: dict[str, list[tuple[str, str]]] = {}
    for old, new, operation in table:
        rows.setdefault(old, []).append((new, operation))
    result = {}
    for key, array in tensors.items():
        prefix = _longest(key, rows)
        for new, operation in rows.get(prefix, [(prefix, "same")]):
            result[new + key[len(prefix) :]] = _apply(array, operation)
    return result


def to_original(keys: Iterable[str], table: Table) -> dict[str, list[tuple[str, str]]]:
    """Original name -> the diffusers names that make it up, in order, each with its operation.

    Raises:
      WeightsError: the original layout has no name for one of the keys.
    """
    rows = {new: (old, operation) for old, new, operation in table}
    groups: dict[str, list[tuple[str, str]]] = {}
    for key in keys:
        prefix = _longest(key, rows)
        if prefix not in rows:
            raise WeightsError(f"{key!r} has no name in the original layout")
        old, operation = rows[prefix]
        groups.setdefault(old + key[len(prefix) :], []).append((key, operation))
    return {old: sorted(parts, key=lambda part: part[1]) for old, parts in groups.items()}


def combine(parts: list[tuple[np.ndarray, str]]) -> np.ndarray:
    """The original's tensor from the tensors that make it up; the inverse of reading."""
    if parts[0][1].startswith("part"):
        return np.concatenate([array for array, _ in parts])
    array, operation = parts[0]
    if operation == "pointwise" and array.ndim == 2:
        return array[:, :, None, None]
    return array.T if operation == "transpose" else array


def combined_shape(parts: list[tuple[np.ndarray, str]]) -> tuple[int, ...]:
    """The shape of :func:`combine`'s result, without computing it."""
    if len(parts) > 1:
        return (sum(len(array) for array, _ in parts), *parts[0][0].shape[1:])
    return combine(parts).shape


def _apply(array: np.ndarray, operation: str) -> np.ndarray:
    """A view of the original's tensor in diffusers' shape; a tensor of unexpected shape is returned unchanged."""
    if operation == "pointwise" and array.ndim == 4 and array.shape[2:] == (1, 1):
        return array[:, :, 0, 0]
    if operation == "transpose":
        return array.T
    if operation.startswith("part") and len(array) % 3 == 0:
        third, i = len(array) // 3, int(operation[-1])
        return array[i * third : (i + 1) * third]
    return array


def _longest(key: str, rows: Mapping[str, object]) -> str:
    """The longest dotted prefix of a key that is in a table; the key itself if there is none."""
    prefix = key
    while prefix and prefix not in rows:
        prefix = prefix.rpartition(".")[0]
    return prefix or key
