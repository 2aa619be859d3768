"""Checkpoints merged into one: a weighted sum, or the difference of two added to a third.

Tensors are read, summed in float32 and written one after another, so the memory of a few tensors is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from diffuse_jax import weights as weight_files
from diffuse_jax.convert import Network, architectures, finished, open_source, places, refuse_existing, write_rest
from diffuse_jax.errors import WeightsError
from diffuse_jax.models.base import floating_type
from diffuse_jax.weights import names
from diffuse_jax.weights.copy import compact, forget
from diffuse_jax.weights.files import unchanged
from diffuse_jax.weights.save import save_tensors
from diffuse_jax.writing import expanded

METHODS = ("weighted", "add-difference")


def merge(
    sources: Sequence[str | Path],
    dst: str | Path,
    *,
    weights: Sequence[float] | None = None,
    method: str = "weighted",
    dtype: DTypeLike | None = None,
) -> Path:
    """Merge checkpoints of one architecture into a new folder in the diffusers layout.

    Args:
      sources: folders, Hub ids or single files. Everything but the networks' weights is taken from the first.
      dst: the folder to write; it must not exist, except as an empty folder.
      weights: for ``weighted``, one number for each source, with a sum of 1 (all the same if None); for
        ``add-difference``, the single factor of the difference (1 if None).
      method: ``"weighted"``, the weighted sum; or ``"add-difference"``, ``A + weight * (B - C)``.
      dtype: the dtype to cast to; None keeps that of the first source.

    Returns:
      ``dst``.

    Raises:
      WeightsError: a source cannot be read, or their networks have different tensors.
      ValueError: the method is unknown, or the numbers of sources and weights do not fit it.
      FileExistsError: ``dst`` exists.
    """
    factors = factors_of(len(sources), weights, method)
    dst = expanded(dst)
    refuse_existing(dst, "diffusers")
    dtype = None if dtype is None else floating_type(dtype)
    files = [place for source in sources for place in places(expanded(source))]
    with finished(dst, "diffusers") as partial, unchanged(*files):
        opened = [open_source(source) for source in sources]
        for name, network in opened[0].networks.items():
            others = [one.networks.get(name) for one in opened[1:]]
            for source, other in zip(sources[1:], others, strict=True):
                check_same(name, sources[0], network, source, other)
            write_network(partial / name, [network, *(other for other in others if other)], factors, dtype)
        write_rest(opened[0], partial, "")
    return dst


def factors_of(count: int, weights: Sequence[float] | None, method: str) -> list[float]:
    """The factor of each source in the sum.

    Raises:
      ValueError: the method is unknown, or the numbers do not fit it.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if weights is not None and not all(np.isfinite(weights)):
        raise ValueError(f"weights must be finite numbers, got {[*weights]}")
    if method == "add-difference":
        given = [1.0] if weights is None else [*weights]
        if count != 3 or len(given) != 1:
            raise ValueError(
                f"add-difference is A + weight * (B - C): it takes three checkpoints and one weight, got {count} and "
                f"{len(given)}"
            )
        return [1.0, given[0], -given[0]]
    if count < 2:
        raise ValueError(f"a weighted sum takes at least two checkpoints, got {count}")
    given = [1 / count] * count if weights is None else [*weights]
    if len(given) != count:
        raise ValueError(f"{count} checkpoints have {len(given)} weights, {given}")
    if abs(sum(given) - 1) > 1e-6:
        raise ValueError(
            f"the weights must have a sum of 1, or the networks' scales change; {given} have {sum(given):g}"
        )
    return given


def check_same(name: str, first: Any, network: Network, source: Any, other: Network | None) -> None:
    """Check that two networks have tensors of the same names and shapes.

    Raises:
      WeightsError: they do not; the message has an example.
    """
    if other is None:
        raise WeightsError(f"{source} has no {name}, which {first} has")
    a, b = ({path: view.shape for path, view in n.views.items()} for n in (network, other))
    odd = sorted("/".join(path) for path in a.keys() | b.keys() if a.get(path) != b.get(path))
    if odd:
        raise WeightsError(f"{name} of {first} and of {source} differ in {len(odd)} tensors, for example {odd[0]}")


def write_network(folder: Path, networks: Sequence[Network], factors: Sequence[float], dtype: Any) -> None:
    """Write the weighted sum of networks, tensor by tensor, with the configuration of the first."""
    first = networks[0]
    keys = names.torch_keys(first.views)

    def to(view: np.ndarray) -> np.dtype:
        floating = jnp.issubdtype(view.dtype, jnp.floating)
        return jnp.dtype(dtype) if dtype is not None and floating else view.dtype

    def read(key: str) -> np.ndarray:
        path = keys[key]
        total = np.zeros(names.to_torch(path, first.views[path]).shape, np.float32)
        for network, factor in zip(networks, factors, strict=True):
            view = names.to_torch(path, network.views[path])
            total += np.float32(factor) * compact(view, np.dtype(np.float32))
            forget(view)
        return total.astype(to(first.views[path]))

    shapes = {key: names.to_torch(path, first.views[path]).shape for key, path in keys.items()}
    specs = {key: (to(first.views[keys[key]]), shapes[key]) for key in sorted(keys)}
    save_tensors(folder, specs, read, first.model.weights_name)
    head = {"_class_name": type(first.model).__name__} if "_class_name" in first.config else {}
    weight_files.write_json(folder / "config.json", first.config | architectures(first) | head)
