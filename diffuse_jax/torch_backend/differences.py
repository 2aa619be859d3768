"""Comparisons that need no run: configurations, parameters and token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffuse_jax.torch_backend.networks import to_numpy
from diffuse_jax.weights import names

FILE_KEYS = {"architectures", "dtype", "model_type", "torch_dtype", "transformers_version"}
"""Config keys that describe the file, not the network."""


class Difference(NamedTuple):
    """A difference between the two sides.

    Attributes:
      component: the component's name in the pipeline.
      what: "config", "parameter", "shape" or "tokens".
      name: the config key, or PyTorch's name of the parameter.
      detail: both values, or how much they differ.
    """

    component: str
    what: str
    name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.component} {self.what} {self.name}: {self.detail}".replace("  ", " ")


Differences = Iterator[Difference]

MAX_SHOWN = 10
"""Maximum number of differences that are shown per component and kind; a cast checkpoint has a thousand."""


def summary_lines(found: Sequence[Difference]) -> list[str]:
    """Differences as lines for the screen: the first ones of each component and kind, and the number of others."""
    lines = []
    for component, what in dict.fromkeys((difference.component, difference.what) for difference in found):
        group = [difference for difference in found if (difference.component, difference.what) == (component, what)]
        lines += [f"differs: {difference}" for difference in group[:MAX_SHOWN]]
        if len(group) > MAX_SHOWN:
            lines.append(f"differs: {component} {what}, {len(group) - MAX_SHOWN} more, listed in the --report")
    return lines


def of_networks(components: Mapping[str, Any], params: Mapping[str, Any], modules: Mapping[str, Any]) -> Differences:
    """Networks that only one side has, and differing configurations and parameters of the others.

    Args:
      components: our components by name.
      params: the parameters of our networks by name.
      modules: PyTorch's networks by name.
    """
    for name in sorted(params.keys() ^ modules.keys()):
        yield Difference(name, "shape", "of the network", "only here" if name in params else "only in PyTorch")
    for name in (name for name in params if name in modules):
        config = modules[name].config
        theirs = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        yield from of_configs(name, components[name].config.to_json(), theirs)
        yield from of_parameters(name, params[name], modules[name])


def of_configs(component: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Differences:
    """Differing values of the keys that two JSON objects share."""
    for key in sorted(ours.keys() & theirs.keys() - FILE_KEYS):
        if not key.startswith("_") and not same_value(ours[key], theirs[key]):
            yield Difference(component, "config", key, f"{ours[key]!r} here, {theirs[key]!r} in PyTorch")


def same_value(a: Any, b: Any) -> bool:
    """Whether two config values are equivalent: a single value for all levels of a network equals a list of it."""
    a, b = (list(x) if isinstance(x, tuple | list) else x for x in (a, b))
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, list):
        return bool(a) and all(same_value(x, b) for x in a)
    return same_value(b, a) if isinstance(b, list) else a == b


def of_parameters(component: str, params: Any, module: Any) -> Differences:
    """Parameters that differ in name, shape or any value; both sides were read in the same dtype."""
    ours = names.torch_keys(flat := names.flatten(params))
    theirs = {names.known_name(key, ours): value for key, value in module.state_dict().items()}
    theirs = {key: value for key, value in theirs.items() if not names.IGNORED.search(key)}
    for key in sorted(ours.keys() ^ theirs.keys()):
        yield Difference(component, "shape", key, "only here" if key in ours else "only in PyTorch")
    for key in (key for key in theirs if key in ours):  # in PyTorch's order of definition
        a = np.asarray(names.to_torch(ours[key], np.asarray(jax.device_get(flat[ours[key]]), np.float32)))
        b = to_numpy(theirs[key])
        if a.shape != b.shape:
            yield Difference(component, "shape", key, f"{list(a.shape)} here, {list(b.shape)} in PyTorch")
        elif not np.array_equal(a, b, equal_nan=True):
            yield Difference(component, "parameter", key, describe_difference(a, b))


def describe_difference(a: np.ndarray, b: np.ndarray) -> str:
    """A description of how two arrays of the same shape differ."""
    count = f"{int((a != b).sum())} of {a.size} values differ, by up to {np.abs(a - b).max():.3g}"
    if a.ndim == 2 and a.shape[0] == a.shape[1] and np.array_equal(a.T, b):
        return f"transposed ({count})"
    return (
        f"the same values in another order ({count})" if np.array_equal(np.sort(a, None), np.sort(b, None)) else count
    )


def of_tokens(component: str, ours: np.ndarray, theirs: np.ndarray) -> Differences:
    """Differences between the token ids of the two sides for the same prompts."""
    if ours.shape != theirs.shape:
        yield Difference(component, "tokens", "", f"length {ours.shape[1]} here, {theirs.shape[1]} in PyTorch")
    elif not np.array_equal(ours, theirs):
        row, column = np.argwhere(ours != theirs)[0]
        detail = f"id {ours[row, column]} here, {theirs[row, column]} in PyTorch"
        yield Difference(component, "tokens", f"prompt {row + 1}, position {column + 1}", detail)
