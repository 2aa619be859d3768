"""Decode and encode large images in overlapping tiles, with the memory and the compiled program of a single tile.

Inside ``jit`` the tiles are one loop. Outside, the function is called for each tile, so give one that is jitted itself.

All tiles have the same size, so that one program serves them; their starts are spread evenly so that the last one ends
at the edge. Where tiles overlap, linear ramps that add up to one blend them. An autoencoder's group norms and attention
see the whole image, so a tile differs slightly from that part of the whole; the overlap hides the difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def tiled_decode(
    decode: Callable[[jax.Array], Any], latents: jax.Array, tile: int = 64, overlap: int = 16, scale: int = 8
) -> Any:
    """``decode(latents)``, tile by tile; works inside ``jit``.

    Args:
      decode: ``[B,h,w,c]`` -> ``[B,h*scale,w*scale,C]``, for example
        ``lambda z: vae.apply({"params": params}, z, method="decode")``.
      latents: ``[B,h,w,c]``.
      tile: edge length of a tile, in latents. Latents no larger than a tile are passed to ``decode`` whole.
      overlap: minimum overlap of neighbouring tiles, in latents; 0 to ``tile - 1``.
      scale: pixels per latent along an edge, ``vae.config.scale``.

    Returns: the decoded images, in the dtype of ``decode``.

    Raises:
      ValueError: ``overlap`` is out of range, or ``decode`` does not upsample by ``scale``.
    """
    return _tiled(decode, latents, (tile, overlap), (1, scale))


def tiled_encode(
    encode: Callable[[jax.Array], Any], images: jax.Array, tile: int = 64, overlap: int = 16, scale: int = 8
) -> Any:
    """``encode(images)``, tile by tile; works inside ``jit``.

    Args:
      encode: ``[B,h*scale,w*scale,C]`` -> an array ``[B,h,w,c]`` or a tree of them, such as a :class:`Posterior`.
      images: ``[B,H,W,C]``; ``H`` and ``W`` must be multiples of ``scale``.
      tile, overlap: as in :func:`tiled_decode`, also in latents: a tile of 64 is ``64 * scale`` pixels wide.
      scale: pixels per latent along an edge, ``vae.config.scale``.

    Returns: the encoding of the images; means and log variances are blended alike.

    Raises:
      ValueError: ``overlap`` is out of range, or ``encode`` does not downsample by ``scale``.
    """
    if any(edge % scale for edge in images.shape[1:3]):
        raise ValueError(f"image height and width must be multiples of {scale}, got {images.shape[1:3]}")
    return _tiled(encode, images, (tile, overlap), (scale, 1))


def tile_starts(length: int, tile: int, overlap: int) -> np.ndarray:
    """Start positions of the fewest tiles that cover ``length`` and overlap by at least ``overlap``, ``[n]`` int32."""
    count = max(1, math.ceil((length - overlap) / (tile - overlap)))
    return np.linspace(0, max(length - tile, 0), count).astype(np.int32)


def blend_weights(starts: np.ndarray, length: int, tile: int, overlap: int) -> np.ndarray:
    """Weight of each position of each tile, ``[n, tile]`` float32; over all tiles they add up to one everywhere.

    ``starts``, ``length``, ``tile`` and ``overlap`` are in pixels of the result.
    """
    rising = np.arange(1, tile + 1)
    ramp = np.minimum(np.minimum(rising, rising[::-1]), max(overlap, 1)).astype(np.float64)
    positions = starts[:, None] + np.arange(tile)[None, :]
    total = np.zeros(length)
    np.add.at(total, positions, np.broadcast_to(ramp, positions.shape))
    return (ramp / total[positions]).astype(np.float32)


def _tiled(function: Callable[[jax.Array], Any], x: jax.Array, tiling: tuple[int, int], pixels: tuple[int, int]) -> Any:
    """``tiling``: tile and overlap, in latents; ``pixels``: input and output pixels per latent along an edge."""
    (tile, overlap), (scale_in, scale_out) = tiling, pixels
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap must be 0 to {tile - 1} for tiles of {tile} latents, got {overlap}")
    size = (x.shape[1] // scale_in, x.shape[2] // scale_in)
    if max(size) <= tile:
        return function(x)
    edges = (min(size[0], tile), min(size[1], tile))
    crop = (x.shape[0], edges[0] * scale_in, edges[1] * scale_in, x.shape[3])
    steps = _steps(size, edges, overlap, scale_out)

    def part_at(step: tuple[jax.Array, ...]) -> Any:
        return function(jax.lax.dynamic_slice(x, (0, step[0] * scale_in, step[1] * scale_in, 0), crop))

    def add(canvas: Any, step: tuple[jax.Array, ...], part: Any = None) -> tuple[Any, None]:
        row, column, rows, columns = step
        part = part_at(step) if part is None else part
        weight = (rows[:, None] * columns[None, :])[None, :, :, None]
        at = (0, row * scale_out, column * scale_out, 0)
        return jax.tree.map(lambda whole, y: _add_at(whole, y.astype(jnp.float32) * weight, at), canvas, part), None

    blank = lambda y: jnp.zeros((y.shape[0], size[0] * scale_out, size[1] * scale_out, y.shape[3]), jnp.float32)
    each = [tuple(values[k] for values in steps) for k in range(len(steps[0]))]
    first = None if _traced(x) else part_at(each[0])
    parts = jax.eval_shape(function, jax.ShapeDtypeStruct(crop, x.dtype)) if _traced(x, first) else first
    _check_parts(parts, crop[1:3], (edges[0] * scale_out, edges[1] * scale_out))
    canvas = jax.tree.map(blank, parts)
    if _traced(x, first):
        canvas, _ = jax.lax.scan(add, canvas, steps)
    else:  # outside of jit a scan would be compiled at every call
        for step in each:
            canvas, _ = add(canvas, step, first)
            first = None
    return jax.tree.map(lambda whole, y: whole.astype(y.dtype), canvas, parts)


def _traced(*trees: Any) -> bool:
    """Whether something is being traced, by ``jit`` or a transformation."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def _steps(size: tuple[int, int], edges: tuple[int, int], overlap: int, scale_out: int) -> tuple[jax.Array, ...]:
    """For every tile: its first row and column (in latents) and the weights of its rows and columns (in pixels)."""
    starts = [tile_starts(length, edge, min(overlap, edge - 1)) for length, edge in zip(size, edges)]
    weights = [
        blend_weights(first * scale_out, length * scale_out, edge * scale_out, overlap * scale_out)
        for first, length, edge in zip(starts, size, edges)
    ]
    rows, columns = (index.ravel() for index in np.indices((len(starts[0]), len(starts[1]))))
    steps = (starts[0][rows], starts[1][columns], weights[0][rows], weights[1][columns])
    return tuple(jnp.asarray(values) for values in steps)


def _check_parts(parts: Any, given: tuple[int, ...], expected: tuple[int, int]) -> None:
    """Raise ``ValueError`` unless a tile becomes arrays of the expected height and width."""
    for leaf in jax.tree.leaves(parts):
        if leaf.shape[1:3] != expected:
            raise ValueError(f"a tile {given} became {leaf.shape[1:3]}, expected {expected}; is scale right?")


def _add_at(whole: jax.Array, part: jax.Array, at: tuple[Any, ...]) -> jax.Array:
    """``whole`` with ``part`` added at position ``at``."""
    return jax.lax.dynamic_update_slice(whole, jax.lax.dynamic_slice(whole, at, part.shape) + part, at)
