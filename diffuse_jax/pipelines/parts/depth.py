"""Depth maps as a further input of the network."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffuse_jax.models.resampling import bicubic
from diffuse_jax.pipelines.method import Net, Params, Part, Rows


@dataclasses.dataclass(frozen=True)
class DepthMap(Part):
    """``depth_map [B,h,w,1]``: relative depth at the resolution of the latents, from -1 (farthest) to 1 in each image.

    Reads ``depth [B,H,W]``, of any range and resolution; or with an ``estimator`` ``depth_images [B,H,W,3]``, what it
    takes. A depth that is the same everywhere becomes -1.

    Attributes:
      size: (height, width) of the latents.
      estimator: a depth estimator; None if the request has the depth.
    """

    size: tuple[int, int]
    estimator: Net | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        return ("depth" if self.estimator is None else "depth_images",)

    @property
    def adds(self) -> tuple[str, ...]:
        return ("depth_map",)

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        depth = rows["depth"] if self.estimator is None else self.estimator.apply(params, rows["depth_images"])
        x = bicubic(depth.astype(jnp.float32)[..., None], self.size)
        low, high = (extreme(x, axis=(1, 2, 3), keepdims=True) for extreme in (jnp.min, jnp.max))
        return rows | {"depth_map": 2 * (x - low) / jnp.where(high > low, high - low, 1.0) - 1}
