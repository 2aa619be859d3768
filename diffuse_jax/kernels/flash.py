"""Third-party fused attention kernels, with inputs padded to supported shapes: cuDNN on NVIDIA GPUs, Pallas on TPUs.

Zeros along the head axis change no score, padded keys are masked out, and padded queries are sliced off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, PartitionSpec


def cudnn_attention(query: Array, key: Array, value: Array, mask: Array | None, is_causal: bool, scale: float) -> Array:
    """cuDNN flash attention; arguments as in :func:`diffuse_jax.kernels.attention`, mask of rank 4 or None.

    Query lengths are padded to even numbers and key lengths to multiples of 8 (77 text tokens become 80), because
    cuDNN's backward pass does not support odd lengths; head sizes are padded to multiples of 8. Without a mask, cuDNN
    is passed the true key length. A mask is broadcast over queries and keys, as cuDNN's interface requires, but not
    over batch and heads.

    Raises:
      ValueError: the dtype is neither bfloat16 nor float16.
    """
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"cuDNN attention takes bfloat16 or float16, got {query.dtype}; use implementation='blocked'")
    batch, rows, columns, depth = query.shape[0], query.shape[1], key.shape[1], query.shape[3]
    q = _pad(query, {1: 2, 3: 8})
    k, v = (_pad(x, {1: 8, 3: 8}) for x in (key, value))
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], rows, columns))
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, q.shape[1] - rows), (0, k.shape[1] - columns)))
    needs_lengths = mask is None and k.shape[1] != columns
    lengths = jnp.full((batch,), columns, jnp.int32) if needs_lengths else None
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=is_causal, scale=scale, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :rows, :, :depth]


def is_key_mask(mask: Array | None) -> bool:
    """Whether a mask (rank 4 or None) is the same for every head and every query."""
    return mask is None or mask.shape[1] == mask.shape[2] == 1


def flash_attention(query: Array, key: Array, value: Array, mask: Array | None, is_causal: bool, scale: float) -> Array:
    """Pallas flash attention for TPUs; arguments as in :func:`diffuse_jax.kernels.attention`, mask of rank 4 or None.

    Lengths are padded to multiples of 128, and so are head sizes above 128. Queries are scaled in their own dtype. A
    Pallas kernel is opaque to XLA's partitioner, so under a mesh set with ``jax.set_mesh`` it runs on each device's
    part of batch and heads.

    Raises:
      ValueError: the mask differs between heads or queries.
    """
    if mask is not None and not is_key_mask(mask):
        raise ValueError(f"flash attention takes masks [B,1,1,Lk], got {mask.shape}; use implementation='blocked'")
    batch, rows, heads, depth = query.shape
    columns = key.shape[1]
    multiples = {1: 128, 3: 128 if depth > 128 else 1}
    q, k, v = (jnp.swapaxes(_pad(x, multiples), 1, 2) for x in (query, key, value))
    visible = None if mask is None else jnp.broadcast_to(mask[:, 0, 0], (batch, columns))
    kernel = _on_each_device(partial(_splash, columns=columns, is_causal=is_causal, scale=scale), batch, heads)
    return jnp.swapaxes(kernel(q, k, v, visible), 1, 2)[:, :rows, :, :depth]


def _splash(
    q: Array, k: Array, v: Array, visible: Array | None, *, columns: int, is_causal: bool, scale: float
) -> Array:
    """JAX's splash kernel on ``[B,H,L,D]`` with ``columns`` keys before the padding, of which ``visible`` bool
    ``[B,columns]`` are seen. By the TPU compiler's estimate, what its backward pass needs around the kernels takes a
    third of the time that ``flash_attention`` of the same folder needs for it, and half the memory."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import; only TPUs need it

    batch, heads, rows, _ = q.shape
    padded = k.shape[2]
    row_block, column_block = (next(n for n in (512, 256, 128) if length % n == 0) for length in (rows, padded))
    names = (name for name in splash.BlockSizes.__dataclass_fields__ if name.startswith("block_"))
    sizes: Any = {name: row_block if name.startswith("block_q") else column_block for name in names}
    pattern = (splash.CausalMask if is_causal else splash.FullMask)((rows, padded))

    def attend(q: Array, k: Array, v: Array, seen: Array | None) -> Any:
        mask, blocks = splash.MultiHeadMask([pattern] * len(q)), splash.BlockSizes(**sizes)
        kernel: Any = splash.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1)
        if seen is None:
            return kernel(q * scale, k, v)
        seen = jnp.pad(seen, (0, padded - columns)).astype(jnp.int32)
        return kernel(q * scale, k, v, splash.SegmentIds(jnp.ones(rows, jnp.int32), seen))

    if visible is not None:  # every image has its own mask, which the kernel does not take
        return jax.lax.map(lambda one: attend(*one), (q, k, v, visible))
    seen = None if padded == columns else jnp.ones(columns, bool)
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    return attend(flat(q), flat(k), flat(v), seen).reshape(batch, heads, rows, -1)


def _on_each_device(kernel: Callable[..., Array], batch: int, heads: int) -> Callable[..., Array]:
    """``kernel`` under ``shard_map`` over the automatic axes of the current mesh that divide batch and heads evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    automatic = {n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    over_batch, left = [], batch
    for axis in ("data", "fsdp"):
        if axis in automatic and left % mesh.shape[axis] == 0:
            over_batch.append(axis)
            left //= mesh.shape[axis]
    over_heads = "tensor" if "tensor" in automatic and heads % mesh.shape["tensor"] == 0 else None
    if not automatic:
        return kernel
    # Axes of size one divide nothing; naming them here spares the backward pass a sum over them.
    over_batch += [axis for axis in sorted(automatic - {*over_batch, over_heads}) if mesh.shape[axis] == 1]
    array = PartitionSpec(tuple(over_batch) or None, over_heads)
    ids = PartitionSpec(tuple(over_batch) or None)

    def mapped(q: Array, k: Array, v: Array, visible: Array | None) -> Array:
        specs = (array, array, array, None if visible is None else ids)
        return jax.shard_map(kernel, in_specs=specs, out_specs=array, axis_names=automatic, check_vma=False)(
            q, k, v, visible
        )

    return mapped


def _pad(x: Array, multiples: dict[int, int]) -> Array:
    """``x`` with zeros appended along each axis, up to a multiple of ``multiples[axis]``."""
    widths = [(0, math.ceil(n / multiples.get(axis, 1)) * multiples.get(axis, 1) - n) for axis, n in enumerate(x.shape)]
    return jnp.pad(x, widths) if any(high for _, high in widths) else x
