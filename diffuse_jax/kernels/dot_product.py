"""Scaled dot-product attention behind one name, with the best algorithm for each platform.

No implementation stores all [B,H,Lq,Lk] scores: ``blocked`` computes them block by block, ``cudnn`` and ``flash`` tile
by tile inside one kernel. The choice depends on shapes, dtype and platform alone and is made while tracing:

=============  =========  ==================================================================================
platform       chosen     where
=============  =========  ==================================================================================
CPU, others    blocked    always
GPU            cudnn      bfloat16 or float16 with head size up to 128 (256 on compute capability 9.0 or later)
GPU            blocked    float32 and larger heads, which cuDNN does not take
TPU            flash      at least 1024 queries and 1024 keys; a mask, if any, is shared by heads and queries
TPU            blocked    shorter sequences (the 77 text tokens, small images), where a dense block is faster
=============  =========  ==================================================================================

On a mesh with an axis ``sequence``, each device along it computes its part of the queries, with the implementation that
is chosen for all of them.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from diffuse_jax.kernels.blocked import blocked_attention
from diffuse_jax.kernels.flash import cudnn_attention, flash_attention, is_key_mask
from diffuse_jax.kernels.platform import current_platform
from diffuse_jax.kernels.sequence import each_its_queries, is_divided

Implementation = Literal["blocked", "cudnn", "flash"]

_FUNCTIONS = {"blocked": blocked_attention, "cudnn": cudnn_attention, "flash": flash_attention}
_FLASH_LENGTH = 1024


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Array | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Array:
    """softmax(scale · q kᵀ) v for every head (Vaswani et al. 2017, equation 1); the softmax is float32.

    Args:
      query: [B, Lq, H, D].
      key, value: [B, Lk, H, D], of the query's dtype.
      mask: boolean, broadcastable to [B, H, Lq, Lk], True where a query may attend to a key. A query that may attend
        to no key gets some finite value.
      is_causal: query i attends to keys 0 … i only.
      scale: factor of the scores; D ** -0.5 if None.
      implementation: "blocked", "cudnn" or "flash"; if None, chosen by the table above.

    Returns:
      [B, Lq, H, D] in the query's dtype.

    Raises:
      ValueError: shapes, dtypes or the mask do not match, or the implementation is unknown or does not support them.
    """
    _check(query, key, value, mask)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if implementation is not None and implementation not in _FUNCTIONS:
        raise ValueError(f"implementation must be one of {sorted(_FUNCTIONS)} or None, got {implementation!r}")

    function = _FUNCTIONS[implementation or choose_implementation(query, key, mask)]
    run = lambda query, key, value, mask: function(query, key, value, mask, is_causal, scale)
    if is_causal or not is_divided(query.shape[1]):  # causal attention is that of text, which is short
        return run(query, key, value, mask)
    return each_its_queries(run, query, key, value, mask)


def choose_implementation(query: Array, key: Array, mask: Array | None) -> Implementation:
    """The choice by the table at the top of this file; arguments as in :func:`attention`, mask of rank 4."""
    platform = current_platform()
    if platform == "gpu" and query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] <= _cudnn_head_limit():
        return "cudnn"
    if platform == "tpu" and min(query.shape[1], key.shape[1]) >= _FLASH_LENGTH and is_key_mask(mask):
        return "flash"
    return "blocked"


def _cudnn_head_limit() -> int:
    """256 if all GPUs of this process have compute capability 9.0 or later, else 128 (also without a GPU)."""
    if jax.default_backend() != "gpu":
        return 128
    return 256 if all(float(d.compute_capability) >= 9 for d in jax.local_devices()) else 128


def _check(query: Array, key: Array, value: Array, mask: Array | None) -> None:
    if (
        query.ndim != 4
        or key.shape != value.shape
        or (query.shape[0], *query.shape[2:]) != (key.shape[0], *key.shape[2:])
    ):
        raise ValueError(
            f"attention takes query [B,Lq,H,D] and key, value [B,Lk,H,D], got {query.shape}, {key.shape}, {value.shape}"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value must share a dtype, got {query.dtype}, {key.dtype}, {value.dtype}")
    if mask is None:
        return
    full = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    fits = mask.ndim <= 4 and all(m in (1, n) for m, n in zip(mask.shape[::-1], full[::-1], strict=False))
    if mask.dtype != bool or not fits:
        raise ValueError(f"mask must be bool and broadcastable to [B,H,Lq,Lk] = {full}, got {mask.dtype} {mask.shape}")
