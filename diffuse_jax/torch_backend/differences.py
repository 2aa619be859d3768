"""What can be compared without running anything: configurations, parameters, token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffuse_jax.torch_backend.networks import to_numpy
from diffuse_jax.weights import names

NOT_OF_THE_NETWORK = {"architectures", "dtype", "model_type", "torch_dtype", "transformers_version"}
"""Keys of configurations that say how a file was written."""


class Difference(NamedTuple):
    """Something that is not the same.

    Attributes:
      component: name in the pipeline.
      what: "config", "parameter", "shape" or "tokens".
      name: the key of the configuration, or PyTorch's name of the parameter.
      detail: both values, or how far they are apart.
    """

    component: str
    what: str
    name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.component} {self.what} {self.name}: {self.detail}".replace("  ", " ")


Differences = Iterator[Difference]

MOST = 10
"""Of differences of a component and kind that are shown; a cast checkpoint has a thousand."""


def listed(found: Sequence[Difference]) -> list[str]:
    """Differences as lines for the screen: the first of each component and kind, and how many more."""
    lines = []
    for component, what in dict.fromkeys((difference.component, difference.what) for difference in found):
        group = [difference for difference in found if (difference.component, difference.what) == (component, what)]
        lines += [f"differs: {difference}" for difference in group[:MOST]]
        if len(group) > MOST:
            lines.append(f"differs: {component} {what}, {len(group) - MOST} more, which --report writes down")
    return lines


def of_networks(components: Mapping[str, Any], params: Mapping[str, Any], modules: Mapping[str, Any]) -> Differences:
    """Networks that one side lacks; configurations and parameters that differ of those that both have.

    Args:
      components: ours, by name.
      params: the parameters of those that are networks, by name.
      modules: PyTorch's networks, by name.
    """
    for name in sorted(params.keys() ^ modules.keys()):
        yield Difference(name, "shape", "of the network", "only here" if name in params else "only in PyTorch")
    for name in (name for name in params if name in modules):
        config = modules[name].config
        theirs = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        yield from of_configs(name, components[name].config.to_json(), theirs)
        yield from of_parameters(name, params[name], modules[name])


def of_configs(component: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Differences:
    """Values of two JSON objects that differ, of the keys that both have."""
    for key in sorted(ours.keys() & theirs.keys() - NOT_OF_THE_NETWORK):
        if not key.startswith("_") and not same_value(ours[key], theirs[key]):
            yield Difference(component, "config", key, f"{ours[key]!r} here, {theirs[key]!r} in PyTorch")


def same_value(a: Any, b: Any) -> bool:
    """Whether two values mean the same: one value for all levels of a network equals a list of it."""
    a, b = (list(x) if isinstance(x, tuple | list) else x for x in (a, b))
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, list):
        return bool(a) and all(same_value(x, b) for x in a)
    return same_value(b, a) if isinstance(b, list) else a == b


def of_parameters(component: str, params: Any, module: Any) -> Differences:
    """Parameters that differ in name, shape or in any value; both sides were read in the same dtype."""
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
            yield Difference(component, "parameter", key, described(a, b))


def described(a: np.ndarray, b: np.ndarray) -> str:
    """How two arrays of one shape differ."""
    count = f"{int((a != b).sum())} of {a.size} values differ, by up to {np.abs(a - b).max():.3g}"
    if a.ndim == 2 and a.shape[0] == a.shape[1] and np.array_equal(a.T, b):
        return f"transposed ({count})"
    return (
        f"the same values in another order ({count})" if np.array_equal(np.sort(a, None), np.sort(b, None)) else count
    )


def of_tokens(component: str, ours: np.ndarray, theirs: np.ndarray) -> Differences:
    """Token ids that the two sides' tokenizers give for the same prompts."""
    if ours.shape != theirs.shape:
        yield Difference(component, "tokens", "", f"length {ours.shape[1]} here, {theirs.shape[1]} in PyTorch")
    elif not np.array_equal(ours, theirs):
        row, column = np.argwhere(ours != theirs)[0]
        detail = f"id {ours[row, column]} here, {theirs[row, column]} in PyTorch"
        yield Difference(component, "tokens", f"prompt {row + 1}, position {column + 1}", detail)
