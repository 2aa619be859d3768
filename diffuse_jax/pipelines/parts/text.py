"""Text encoders as conditioning: token ids to prompt embeddings, once, before the loop."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffuse_jax.pipelines.method import Net, Params, Part, Rows
from diffuse_jax.pipelines.parts.guidance import count_branches, is_branches, per_image, stacked, unstacked


@dataclasses.dataclass(frozen=True)
class EncodeText(Part):
    """Base of the families' text encoding; in :meth:`states`, a subclass turns the encoders' outputs into the UNet's
    inputs.

    Reads ``ids``, a dict from encoder to token ids ``[B,L]``; adds ``states [B,L,D]`` and whatever else :meth:`states`
    returns. ``attention_mask``, a dict from encoder to bool ``[B,L]``, masks tokens where it is false. ``embeds_mask``,
    1 or 0 per prompt, replaces prompt embeddings by zeros where it is 0.

    Attributes:
      nets: the encoders.
      clip_skip: take the conditional branches' hidden states this many layers earlier.
      negatives: how many branches, the first ones, are not conditional, where there are several.
    """

    nets: tuple[Net, ...]
    clip_skip: int | None = None
    negatives: int = 1

    @property
    def reads(self) -> tuple[str, ...]:
        return ("ids",)

    @property
    def adds(self) -> tuple[str, ...]:
        return ("states",)

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        ids = rows["ids"]
        count = count_branches(ids)
        flat = lambda tokens: {name: stacked(value) for name, value in tokens.items()}
        encoded = self.encode(params, flat(ids), count, flat(rows.get("attention_mask", {})))
        if "embeds_mask" in rows:
            mask = stacked(rows["embeds_mask"])
            encoded = {name: x * per_image(mask, x).astype(x.dtype) for name, x in encoded.items()}
        branched = any(is_branches(value) for value in ids.values())
        return rows | ({name: unstacked(x, count) for name, x in encoded.items()} if branched else encoded)

    def encode(
        self,
        params: Params,
        ids: Mapping[str, jax.Array],
        count: int = 1,
        mask: Mapping[str, jax.Array] = types.MappingProxyType({}),
    ) -> dict[str, jax.Array]:
        """Prompt embeddings of token ids ``[B,L]`` by encoder; with ``count`` branches, of ``[count B,L]``.

        Args:
          params: parameters of the networks.
          ids: encoder -> token ids.
          count: number of guidance branches.
          mask: encoder -> bool of the shape of the ids, false where a token is masked; encoders without one see all.
        """
        outputs = [
            net.apply(params, ids[net.name], *([mask[net.name]] if net.name in mask else [])) for net in self.nets
        ]
        plain = self.states(params, outputs, None)
        if self.clip_skip is None:
            return plain
        skipped = self.states(params, outputs, self.clip_skip)
        first = lambda x: len(x) // count * min(self.negatives, count - 1)  # of the conditional branches
        return {name: jnp.concatenate([x[: first(x)], skipped[name][first(x) :]]) for name, x in plain.items()}

    def states(self, params: Params, outputs: list[Any], clip_skip: int | None) -> dict[str, jax.Array]:
        """The UNet's inputs: ``states [B,L,D]``, and ``pooled [B,P]`` if it takes pooled embeddings."""
        raise NotImplementedError
