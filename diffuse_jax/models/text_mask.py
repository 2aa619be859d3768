"""Masks of a prompt's tokens in a UNet: attention to the prompt leaves out those that are masked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from diffuse_jax.models.intercept import Call, changed_layers


@contextlib.contextmanager
def masked_text(mask: jax.Array | None) -> Iterator[None]:
    """Inside this context layers that attend to a prompt see its token ``j`` of image ``i`` where ``mask[i, j]``.

    Pixels, to which the same layer may attend after the prompt, are all seen; layers without a prompt do not change.

    Args:
      mask: bool ``[B,L]``; None changes nothing.
    """
    if mask is None:
        yield
        return
    seen = jnp.asarray(mask, bool)

    def change(call: Call) -> jax.Array:
        if call.name != "attend" or not attends_to_text(call.path):
            return call.output()
        query, key, value = call.inputs
        pixels = jnp.ones((len(seen), key.shape[1] - seen.shape[1]), bool)
        return call.output(query, key, value, jnp.concatenate([seen, pixels], 1)[:, None, None])

    with changed_layers(change):
        yield


def attends_to_text(path: tuple[str, ...]) -> bool:
    """Whether an ``attend`` is of a cross-attention, or of joint attention, which is a level higher."""
    return path[-2] == "attn2" or path[-2].startswith("attentions_")
