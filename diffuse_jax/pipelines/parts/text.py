"""Text encoders as conditioning: token ids to prompt embeddings, once, before the loop."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffuse_jax.pipelines.method import Net, Params, Part, Rows
from diffuse_jax.pipelines.parts.guidance import count_branches, is_branches, per_image, stacked, unstacked
from diffuse_jax.text.prompts import PLAIN, Style

TOKEN_ROWS = ("ids", "attention_mask", "text_weights")
"""The rows with tokens, each a dict by encoder."""


@dataclasses.dataclass(frozen=True)
class EncodeText(Part):
    """Base of the families' text encoding; a subclass says which of an encoder's states the UNet takes.

    Reads ``ids``, a dict from encoder to token ids ``[B,L]``; adds ``states [B,L,D]``, and ``pooled [B,P]`` if
    :meth:`pooled` returns something. ``attention_mask``, a dict from encoder to bool ``[B,L]``, masks tokens where it
    is false. ``embeds_mask``, 1 or 0 per prompt, replaces prompt embeddings by zeros where it is 0.

    With a style of prompts that is not plain, ids and masks are ``[B,V,K,L]``: ``V`` versions of ``K`` chunks, which
    are encoded separately. The chunks become one sequence, ``states [B,K L,D]``, and the versions are added with
    ``text_weights [B,V,K,L]``; see :func:`combined`.

    Attributes:
      nets: the encoders.
      clip_skip: take the conditional branches' hidden states this many layers earlier.
      negatives: how many branches, the first ones, are not conditional, where there are several.
      style: how prompts are read.
    """

    nets: tuple[Net, ...]
    clip_skip: int | None = None
    negatives: int = 1
    style: Style = PLAIN

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
        encoded = self.encode(params, {name: flat(rows[name]) for name in TOKEN_ROWS if name in rows}, count)
        if "embeds_mask" in rows:
            mask = stacked(rows["embeds_mask"])
            encoded = {name: x * per_image(mask, x).astype(x.dtype) for name, x in encoded.items()}
        branched = any(is_branches(value) for value in ids.values())
        return rows | ({name: unstacked(x, count) for name, x in encoded.items()} if branched else encoded)

    def encode(self, params: Params, tokens: Rows, count: int = 1) -> dict[str, jax.Array]:
        """Prompt embeddings of tokens.

        Args:
          params: parameters of the networks.
          tokens: the rows ``ids``, ``attention_mask`` and ``text_weights``, those that there are, by encoder. Encoders
            without a mask see all tokens.
          count: number of guidance branches; the arrays have ``count B`` prompts, branch by branch.
        """
        ids, mask = tokens["ids"], tokens.get("attention_mask", {})
        flat = lambda array: array.reshape(-1, array.shape[-1])
        outputs = [
            net.apply(params, flat(ids[net.name]), *([flat(mask[net.name])] if net.name in mask else []))
            for net in self.nets
        ]
        plain = self.embeddings(params, outputs, tokens, None)
        if self.clip_skip is None:
            return plain
        skipped = self.embeddings(params, outputs, tokens, self.clip_skip)
        first = lambda x: len(x) // count * min(self.negatives, count - 1)  # of the conditional branches
        return {name: jnp.concatenate([x[: first(x)], skipped[name][first(x) :]]) for name, x in plain.items()}

    def embeddings(self, params: Params, outputs: list[Any], tokens: Rows, clip_skip: int | None) -> Rows:
        """The UNet's inputs from the encoders' outputs."""
        ids, weights = tokens["ids"], tokens.get("text_weights", {})
        mean = self.style.syntax == "a1111"
        states = [
            combined(self.states(params, net, out, clip_skip), ids[net.name], weights.get(net.name), keep_mean=mean)
            for net, out in zip(self.nets, outputs, strict=True)
        ]
        found = {"states": jnp.concatenate(states, -1)}
        if (pooled := self.pooled(outputs)) is not None:
            last = self.nets[-1].name
            found["pooled"] = combined_pooled(pooled, ids[last], weights.get(last))
        return found

    def states(self, params: Params, net: Net, output: Any, clip_skip: int | None) -> jax.Array:
        """The hidden states of one encoder that the UNet takes, ``[B,L,D]``."""
        raise NotImplementedError

    def pooled(self, outputs: list[Any]) -> jax.Array | None:
        """The pooled embeddings ``[B,P]``; None if the UNet takes none."""
        return None


def combined(states: jax.Array, ids: jax.Array, weights: jax.Array | None, *, keep_mean: bool) -> jax.Array:
    """The states of all versions and chunks, ``[B V K,L,D]``, as one sequence ``[B,K L,D]``.

    Each token is the sum of its versions, multiplied by the weights. With ``keep_mean``, each chunk is then scaled to
    the mean over tokens and channels that its first version has (AUTOMATIC1111).

    Args:
      states: hidden states.
      ids: the encoded ids, for their shape: ``[B,V,K,L]``, or ``[B,L]``, whose states are returned as they are.
      weights: float32 ``[B,V,K,L]``; None if there is one version of weight 1.
      keep_mean: whether to restore the mean.
    """
    if ids.ndim == 2:
        return states
    x = states.reshape(*ids.shape, -1)
    first = x[:, 0]
    if weights is not None:
        x, first = x.astype(jnp.float32), first.astype(jnp.float32)
        total = (x * weights[..., None]).sum(1)
        if keep_mean:
            mean = lambda y: y.mean((-2, -1), keepdims=True)
            total = total * (mean(first) / mean(total))
        first = total.astype(states.dtype)
    return first.reshape(len(ids), -1, states.shape[-1])


def combined_pooled(pooled: jax.Array, ids: jax.Array, weights: jax.Array | None) -> jax.Array:
    """The pooled embeddings of the first chunk, ``[B V K,P]`` to ``[B,P]``; versions have the weight of their start
    token, which is that of a token without a weight of its own."""
    if ids.ndim == 2:
        return pooled
    first = pooled.reshape(*ids.shape[:3], -1)[:, :, 0]
    if weights is None:
        return first[:, 0]
    return (first.astype(jnp.float32) * weights[:, :, 0, 0, None]).sum(1).astype(pooled.dtype)
