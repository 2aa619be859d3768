"""Changes inside the network, and predictions on windows."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

from diffuse_jax.pipelines.modifiers.request import Number, changed, numbers, with_network
from diffuse_jax.pipelines.parts import features, windows
from diffuse_jax.pipelines.parts.decode import ToImages
from diffuse_jax.pipelines.running import Request

WRAP = 8
"""Columns of latents from the opposite edge that a circular image is decoded with."""


@dataclasses.dataclass(frozen=True)
class FreeU:
    """FreeU; see :class:`~diffuse_jax.pipelines.parts.features.FreeU`. The defaults are those for Stable Diffusion 1;
    for 2: b 1.1 and 1.2, for XL: s 0.6 and 0.4, b 1.1 and 1.2.

    Attributes:
      s1, s2: factors of the skip connections' low frequencies at the two coarsest upward levels.
      b1, b2: factors of half of the features there.
    """

    s1: Number = 0.9
    s2: Number = 0.2
    b1: Number = 1.2
    b2: Number = 1.4

    def __call__(self, request: Request, pipe: Any) -> Request:
        rows = {"freeu": numbers(request, self.b1, self.b2, self.s1, self.s2, name="FreeU")}
        return changed(request, rows, lambda d: with_network(d, features.FreeU))


@dataclasses.dataclass(frozen=True)
class DeepCache:
    """Deep features kept for some evaluations; see :class:`~diffuse_jax.pipelines.parts.features.DeepCache`.

    Attributes:
      interval: evaluations from one that computes everything to the next; compiled in.
      skips: how many of the finest skip connections are computed each time; compiled in.
    """

    interval: int = 3
    skips: int = 1

    def __call__(self, request: Request, pipe: Any) -> Request:
        config = pipe.components["unet"].config
        most = sum(level.layers for level in config.up_levels())
        if self.interval < 1 or not 1 <= self.skips <= most:
            raise ValueError(
                f"interval must be at least 1 and skips from 1 to {most}, got interval={self.interval}, "
                f"skips={self.skips}"
            )
        wrap = lambda network: features.DeepCache(network, self.interval, self.skips)
        return changed(request, {}, lambda d: with_network(d, wrap))


@dataclasses.dataclass(frozen=True)
class Windows:
    """MultiDiffusion on overlapping windows, for images larger than the network was trained for.

    Attributes:
      size, stride: of the windows, in latent pixels.
      batch: windows that are computed at once: faster, and more memory.
      circular: join left and right edge, for panoramas of 360 degrees. The image is decoded with ``WRAP`` columns of
        latents from the opposite edge on either side.
    """

    size: int = 64
    stride: int = 8
    batch: int = 1
    circular: bool = False

    def __call__(self, request: Request, pipe: Any) -> Request:
        if not 1 <= self.stride <= self.size or self.batch < 1:
            raise ValueError(
                f"windows need 1 <= stride <= size and a batch of at least 1, got stride={self.stride}, "
                f"size={self.size}, batch={self.batch}"
            )
        around = lambda d: windows.Windows(d, self.size, self.stride, self.batch, self.circular)
        decode = request.method.decode
        if self.circular and isinstance(decode, ToImages):
            request = request._replace(method=replace(request.method, decode=replace(decode, wrap=WRAP)))
        return changed(request, {}, around)
