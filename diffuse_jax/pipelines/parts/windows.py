"""Samples larger than the network was trained for: predictions on overlapping windows, averaged (MultiDiffusion)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.pipelines.method import Params, Part, Rows, Step
from diffuse_jax.pipelines.parts.guidance import without_keys

LEVELS = ("adapter_features",)
"""Rows with maps of several resolutions, each a whole fraction of the sample's."""


@dataclasses.dataclass(frozen=True)
class Windows(Part):
    """The mean of a denoiser's predictions on windows (Bar-Tal et al. 2023, arXiv 2302.08113, equation 5).

    With every sampler whose step is linear in sample and prediction (all but those that clip) this is the mean of the
    windows' steps. Rows ``[B,h,w,C]`` of the sample's height and width (masks, features of a control image) are cut
    with it, and so are the features of T2I-Adapters, which are coarser; all others are the same for every window.

    Attributes:
      inner: the denoiser, guidance included.
      size: edge of a window in latent pixels.
      stride: from one window to the next.
      batch: windows that are computed at once.
      circular: join left and right edge, for panoramas of 360 degrees.
    """

    inner: Any
    size: int = 64
    stride: int = 8
    batch: int = 1
    circular: bool = False

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        places = window_places(x.shape[1:3], self.size, self.stride, self.circular)
        batch = min(self.batch, len(places))
        groups = np.resize(places, (-(-len(places) // batch) * batch, 2)).reshape(-1, batch, 2)
        weights = (np.arange(groups.size // 2) < len(places)).reshape(-1, batch)  # 0 where a window is repeated
        high, wide = (np.arange(min(self.size, length)) for length in x.shape[1:3])
        indices = lambda place: (place[0] + high[:, None], (place[1] + wide) % x.shape[2])
        levels = [name for name in LEVELS if name in rows]
        for name in levels:
            check_levels(rows[name], x.shape[1:3], [*places.ravel(), len(high), len(wide)])
        cut_levels = lambda maps, at: tuple(
            jnp.concatenate([y[:, r[::f] // f, c[::f] // f] for r, c in at])
            for y, f in ((y, x.shape[1] // y.shape[1]) for y in maps)
        )

        def add(sums: tuple[jax.Array, jax.Array], group: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            at = [indices(place) for place in group[0]]
            is_map = lambda value: value.ndim == 4 and value.shape[1:3] == x.shape[1:3]
            cut = lambda value: jnp.concatenate([value[:, r, c] if is_map(value) else value for r, c in at])
            here = jax.tree.map(cut, without_keys(rows)) | {name: cut_levels(rows[name], at) for name in levels}
            output = self.inner(params, here, cut(x), step).astype(jnp.float32)
            total, count = sums
            for k, (r, c) in enumerate(at):
                total = total.at[:, r, c].add(group[1][k] * output[k * len(x) : (k + 1) * len(x)])
                count = count.at[:, r, c].add(group[1][k])
            return (total, count), None

        zeros = jnp.zeros(x.shape, jnp.float32), jnp.zeros((1, *x.shape[1:3], 1), jnp.float32)
        (total, count), _ = jax.lax.scan(add, zeros, (jnp.asarray(groups), jnp.asarray(weights, jnp.float32)))
        return total / count


def check_levels(maps: Sequence[jax.Array], size: tuple[int, ...], lengths: Sequence[int]) -> None:
    """Check that windows can be cut from maps of lower resolutions.

    Raises:
      ValueError: a place or size of a window (``lengths``) is not a whole number of a map's pixels.
    """
    for height, width in (y.shape[1:3] for y in maps):
        factor = size[0] // height
        if (factor * height, factor * width) != tuple(size) or any(length % factor for length in lengths):
            raise ValueError(
                f"size and stride of windows, and the sample's {size[0]}x{size[1]}, must be multiples of {factor} with "
                f"this T2I-Adapter, which has features of {height}x{width}"
            )


def window_places(size: tuple[int, ...], window: int, stride: int, circular: bool) -> np.ndarray:
    """First row and column of each window, int32 ``[n, 2]``; the last ones end at the edges.

    On a circular axis (the columns), windows go over the right edge.
    """

    def starts(length: int) -> list[int]:
        last = max(length - window, 0)
        return [*range(0, last, stride), last]

    columns = [*range(0, size[1], stride)] if circular and size[1] > window else starts(size[1])
    return np.array([(row, column) for row in starts(size[0]) for column in columns], np.int32)
