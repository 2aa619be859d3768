"""What a run returns: images from latents or pixels, or the sample itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffuse_jax.models.autoencoder_kl import AutoencoderKL, unscale_latents
from diffuse_jax.models.tiling import tiled_decode
from diffuse_jax.models.vq_model import VQModel
from diffuse_jax.pipelines.method import Net, Params, Part, Rows


@dataclasses.dataclass(frozen=True)
class Raw(Part):
    """The unchanged sample, under a name."""

    name: str = "images"

    def __call__(self, params: Params, rows: Rows, sample: jax.Array) -> dict[str, Any]:
        return {self.name: sample}


@dataclasses.dataclass(frozen=True)
class ToPixels(Part):
    """Images from a sample in pixel space, in [-1, 1]: float32 in [0, 1], or with ``uint8`` from 0 to 255."""

    uint8: bool = True

    def __call__(self, params: Params, rows: Rows, sample: jax.Array) -> dict[str, Any]:
        images = to_unit(sample)
        return {"images": to_uint8(images) if self.uint8 else images}


@dataclasses.dataclass(frozen=True)
class UnitPixels(Part):
    """Images from a sample in pixel space, in [0, 1]: float32, clipped, or with ``uint8`` from 0 to 255."""

    uint8: bool = True

    def __call__(self, params: Params, rows: Rows, sample: jax.Array) -> dict[str, Any]:
        images = jnp.clip(sample.astype(jnp.float32), 0.0, 1.0)
        return {"images": to_uint8(images) if self.uint8 else images}


@dataclasses.dataclass(frozen=True)
class ToImages(Part):
    """Images decoded by the autoencoder: float32 ``[B,H,W,3]`` in [0, 1], or with ``uint8`` from 0 to 255.

    Attributes:
      vae: the autoencoder.
      uint8: round to 8 bits.
      tile: edge length of the decoder's tiles, in latent pixels; None decodes without tiling.
      slices: decode one image at a time, which needs the memory of only one.
      wrap: columns of latents from the opposite edge on either side of the decoder's input, for images whose left and
        right edge are joined.
      scaled: whether latents are divided by the autoencoder's ``scaling_factor`` before they are decoded.
      around: the decoder also sees the rows ``image [B,H,W,3]`` in [-1, 1] and ``mask [B,H,W,1]``, and keeps the image
        where the mask is 0 (:class:`~diffuse_jax.models.AsymmetricAutoencoderKL`); not in tiles.
    """

    vae: Net
    uint8: bool = True
    tile: int | None = None
    slices: bool = False
    wrap: int = 0
    around: bool = False
    scaled: bool = True

    @property
    def reads(self) -> tuple[str, ...]:
        return ("image", "mask") if self.around else ()

    def __call__(self, params: Params, rows: Rows, sample: jax.Array) -> dict[str, Any]:
        known = (rows["image"], rows["mask"]) if self.around else ()
        options: dict[str, Any] = {"tile": self.tile, "slices": self.slices, "wrap": self.wrap, "known": known}
        options["scaled"] = self.scaled
        images = decode_latents(self.vae, params, sample, **options)
        return {"images": to_uint8(images) if self.uint8 else images}


def decode_latents(
    vae: Net,
    params: Params,
    latents: jax.Array,
    *,
    tile: int | None = None,
    slices: bool = False,
    wrap: int = 0,
    known: tuple[jax.Array, ...] = (),
    scaled: bool = True,
) -> jax.Array:
    """Denoised latents ``[B,h,w,c]`` -> images ``[B,H,W,3]`` float32 in [0, 1]; arguments as in :class:`ToImages`.

    Raises:
      ValueError: tiles of an image whose known part the decoder sees.
    """
    if tile is not None and known:
        raise ValueError("a decoder that sees the known part of the image cannot decode in tiles; use vae_tiling=None")
    one = lambda *given: vae.apply(params, *given, method="decode")
    decode = one if tile is None else lambda z: tiled_decode(one, z, tile, tile // 4, vae.config.scale)
    z = latents.astype(jnp.float32)
    z = unscale_latents(z, vae.config) if scaled else z
    width = z.shape[2]
    if wrap:
        joined = lambda x, n: jnp.take(x, jnp.arange(-n, x.shape[2] + n) % x.shape[2], axis=2)
        z, known = joined(z, wrap), tuple(joined(x, wrap * vae.config.scale) for x in known)
    given = (z, *known)
    images = jax.lax.map(lambda row: decode(*(x[None] for x in row))[0], given) if slices else decode(*given)
    scale = images.shape[2] // z.shape[2]
    return to_unit(images[:, :, wrap * scale : (wrap + width) * scale])


def to_unit(images: jax.Array) -> jax.Array:
    """[-1, 1] to float32 in [0, 1], clipped."""
    return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0)


def to_uint8(images: jax.Array) -> jax.Array:
    """[0, 1] to integers from 0 to 255, rounded."""
    return jnp.round(images * 255).astype(jnp.uint8)


def autoencoder(vae: Any) -> Any:
    """The autoencoder as pipelines run it: in float32 if float16 would overflow (``force_upcast``, SDXL)."""
    if isinstance(vae, AutoencoderKL | VQModel) and vae.dtype == jnp.float16 and vae.config.force_upcast:
        return type(vae)(vae.config, dtype=jnp.float32, param_dtype=vae.param_dtype)
    return vae
