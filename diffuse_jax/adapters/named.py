"""Several named adapters of one pipeline: which are active, how strongly, and the arrays that a program takes for them.

The active adapters of a layer are one pair: their ``down`` side by side, and their ``up``, multiplied by their weights,
one below the other, padded with zeros to the layer's *slot*. Slots only grow, to powers of two, so another weight, or
another adapter of the same or a smaller rank, changes values but no shapes. What is not a product of two matrices
(LoHa, LoKr, DoRA) takes a slot for the whole difference of the kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.adapters.changes import Change
from diffuse_jax.adapters.lora_file import Adapter, flax_pair
from diffuse_jax.adapters.merging import KERNEL, difference
from diffuse_jax.messages import brief
from diffuse_jax.models.base import Params
from diffuse_jax.rounding import power_of_two
from diffuse_jax.weights.names import Path, flatten, unflatten

Weight = float | Mapping[str, Any]
"""The strength of an adapter: one number, or ``{"unet": 0.5, "text_encoder": 1.0}``, in which the UNet may have
``{"down": 0.5, "mid": 1.0, "up": {"block_0": 0.5, "block_1": [0.4, 0.8, 1.0]}}``, numbers for blocks or for their
layers; what is not named has 1."""


class Slot(NamedTuple):
    """The room of a layer: a rank, and whether there is one for a whole difference."""

    rank: int = 0
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters of a pipeline; immutable, as the pipeline is.

    Attributes:
      named: name -> network -> path of the layer -> change of its kernel.
      weights: active name -> its weight.
      enabled: whether the active ones act.
      slots: network -> path -> slot.
      fused: the names that are merged into the kernels at the moment.
      originals: network -> path -> the kernel before it was merged.
      scale: factor of all active ones in one call.
    """

    named: Mapping[str, Adapter] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, Weight] = dataclasses.field(default_factory=dict)
    enabled: bool = True
    slots: Mapping[str, Mapping[Path, Slot]] = dataclasses.field(default_factory=dict)
    fused: tuple[str, ...] = ()
    originals: Mapping[str, Mapping[Path, jax.Array]] = dataclasses.field(default_factory=dict)
    scale: Any = 1.0

    def live(self) -> list[tuple[str, Weight]]:
        """The adapters that act beside the kernels, with their weights."""
        active = [(name, weight) for name, weight in self.weights.items() if name not in self.fused]
        return active if self.enabled else []

    def loaded(self, name: str, adapter: Adapter, max_rank: int = 0) -> Adapters:
        """A copy with one more adapter, which becomes the only active one.

        Raises:
          ValueError: the name is taken.
        """
        if name in self.named:
            raise ValueError(f"there is already an adapter {name!r}; delete it first, or choose another adapter_name")
        new = dataclasses.replace(self, named={**self.named, name: adapter}, weights={name: 1.0}, enabled=True)
        return new.with_slots(max_rank)

    def active(self, names: str | Sequence[str], weights: Weight | Sequence[Weight | None] | None = None) -> Adapters:
        """A copy with exactly these adapters active.

        Raises:
          ValueError: a name is unknown, the numbers of names and weights differ, or a weight names an unknown block.
        """
        names = [names] if isinstance(names, str) else [*names]
        self.check(names)
        weights = plain(weights)
        each: list[Any] = [*weights] if isinstance(weights, list | tuple) else [weights] * len(names)
        if len(each) != len(names):
            raise ValueError(f"{len(names)} adapters, {', '.join(names)}, have {len(each)} weights, {brief(each)}")
        chosen: dict[str, Weight] = {}
        for name, weight in zip(names, each, strict=True):
            chosen[name] = 1.0 if weight is None else weight
            for network, changes in self.named[name].items():
                for path in changes:
                    weight_at(chosen[name], network, path)
        return dataclasses.replace(self, weights=chosen).with_slots()

    def without(self, names: str | Sequence[str]) -> Adapters:
        """A copy with these adapters deleted.

        Raises:
          ValueError: a name is unknown, or its adapter is fused.
        """
        names = [names] if isinstance(names, str) else [*names]
        self.check(names)
        if fused := [name for name in names if name in self.fused]:
            raise ValueError(f"{', '.join(fused)} cannot be deleted while fused; call unfuse_lora first")
        keep = lambda table: {name: value for name, value in table.items() if name not in names}
        return dataclasses.replace(self, named=keep(self.named), weights=keep(self.weights))

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError if an adapter is not there."""
        if unknown := [name for name in names if name not in self.named]:
            have = f"there are {', '.join(self.named)}" if self.named else "there are none; load with adapter_name="
            raise ValueError(f"no adapter is called {brief(unknown[0])}; {have}")

    def with_slots(self, max_rank: int = 0) -> Adapters:
        """A copy with room for the active adapters, and for a rank of at least ``max_rank`` in their layers."""
        slots = {network: dict(table) for network, table in self.slots.items()}
        for network, changes in by_layer(self).items():
            table = slots.setdefault(network, {})
            for path, found in changes.items():
                old = table.get(path, Slot())
                rank = sum(change.pair_rank for change, _ in found if change.low_rank)
                room = max(old.rank, power_of_two(rank), max_rank) if rank else old.rank
                table[path] = Slot(room, old.whole or not all(change.low_rank for change, _ in found))
        return dataclasses.replace(self, slots=slots)


def by_layer(adapters: Adapters) -> dict[str, dict[Path, list[tuple[Change, float]]]]:
    """Network -> path -> the changes of the active adapters that act beside the kernels, with their weights there."""
    found: dict[str, dict[Path, list[tuple[Change, float]]]] = {}
    for name, weight in adapters.live():
        for network, changes in adapters.named[name].items():
            for path, change in changes.items():
                place = found.setdefault(network, {}).setdefault(path, [])
                place.append((change, weight_at(weight, network, path)))
    return found


def live_params(adapters: Adapters, params: Mapping[str, Params]) -> dict[str, Params]:
    """Network -> the tree ``{..., "to_q": {"down", "up"}}`` (or ``{"whole"}``, or both) that :func:`lora.live
    <diffuse_jax.adapters.lora.live>` takes, in the kernels' dtypes; empty if no adapter acts."""
    if not adapters.live():
        return {}
    changes, trees = by_layer(adapters), {}
    for network, slots in adapters.slots.items():
        kernels = flatten(params[network])
        flat: dict[Path, jax.Array] = {}
        for path, slot in slots.items():
            kernel = kernels[(*path, KERNEL)]
            arrays = filled(slot, changes.get(network, {}).get(path, []), kernel)
            flat |= {(*path, name): jnp.asarray(array, kernel.dtype) for name, array in arrays.items()}
        trees[network] = unflatten(flat)
    return trees


def filled(slot: Slot, changes: Sequence[tuple[Change, float]], kernel: jax.Array) -> dict[str, np.ndarray]:
    """The arrays of a slot, float32."""
    arrays: dict[str, np.ndarray] = {}
    if slot.rank:
        pairs = [(flax_pair(change), weight) for change, weight in changes if change.low_rank]
        down = np.zeros((*kernel.shape[:-1], slot.rank), np.float32)
        up = np.zeros((slot.rank, kernel.shape[-1]), np.float32)
        at = 0
        for pair, weight in pairs:
            end = at + len(pair["up"])
            down[..., at:end], up[at:end] = pair["down"], np.float32(weight) * pair["up"]
            at = end
        arrays |= {"down": down, "up": up}
    if slot.whole:
        whole = np.zeros(kernel.shape, np.float32)
        for change, weight in changes:
            if not change.low_rank:
                whole += np.float32(weight) * difference(change, kernel)
        arrays["whole"] = whole
    return arrays


BLOCKS = {"down": "down_blocks_", "mid": "mid_block", "up": "up_blocks_"}


def weight_at(weight: Weight, network: str, path: Path) -> float:
    """The weight of an adapter in one layer.

    Raises:
      ValueError: the weight names an unknown network or block, has a list that is too short, or is not a number.
    """
    if not isinstance(weight, Mapping):
        return checked(weight)
    if unknown := [name for name in weight if name not in ("unet", "text_encoder", "text_encoder_2", "controlnet")]:
        raise ValueError(
            f"the weights of an adapter name {brief(unknown[0])}; expected networks, as in {{'unet': 0.5}}"
        )
    inner = weight.get(network, 1.0)
    if not isinstance(inner, Mapping):
        return checked(inner)
    if unknown := [name for name in inner if name not in BLOCKS]:
        raise ValueError(f"the weights of {network} name {brief(unknown[0])}; expected down, mid or up")
    side = next((name for name, prefix in BLOCKS.items() if path[0].startswith(prefix)), None)
    of_side = inner.get(side, 1.0) if side else 1.0
    if not isinstance(of_side, Mapping):
        return checked(of_side)
    if unknown := [name for name in of_side if not str(name).startswith("block_")]:
        raise ValueError(f"the weights of {network} {side} name {brief(unknown[0])}; expected block_0, block_1 ...")
    of_block = of_side.get(f"block_{path[0].rpartition('_')[2]}", 1.0)
    if not isinstance(of_block, list | tuple):
        return checked(of_block)
    kind, _, number = path[1].rpartition("_") if len(path) > 1 else ("", "", "")
    if kind not in ("attentions", "resnets"):
        return 1.0
    if len(of_block) == 1:
        return checked(of_block[0])
    if int(number) >= len(of_block):
        raise ValueError(f"{path[0]} has a layer {number}, but its weights are {brief(of_block)}")
    return checked(of_block[int(number)])


def plain(value: Any) -> Any:
    """A copy whose numbers and arrays of NumPy and JAX are numbers and lists of Python, at any depth."""
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic | jax.Array) else value


def checked(weight: Any, what: str = "the weight of an adapter") -> float:
    """A finite number as a float; ``what`` it is, for the message.

    Raises:
      ValueError: it is not one.
    """
    weight = plain(weight)
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not np.isfinite(weight):
        raise ValueError(f"{what} must be a finite number, got {brief(weight)}")
    return float(weight)
