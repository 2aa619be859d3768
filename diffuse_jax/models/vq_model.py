"""The vector-quantised autoencoder (van den Oord et al. 2017; Esser et al. 2021), and MoVQ (Zheng et al. 2022)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from diffuse_jax.allowed import Layers, Levels, Positive
from diffuse_jax.config import NOT_QUANTIZED, Config
from diffuse_jax.models.autoencoder_kl import AutoencoderKLConfig, check_images, check_levels
from diffuse_jax.models.autoencoder_layers import Decoder, Encoder
from diffuse_jax.models.autoencoder_tiny import Encoded
from diffuse_jax.models.base import Model
from diffuse_jax.models.codebook import Codebook
from diffuse_jax.models.layers import Conv
from diffuse_jax.models.remat import check_policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQConfig(Config):
    """``config.json`` of a ``VQModel``.

    ``norm_type="spatial"`` is MoVQ: every norm of the decoder is scaled and shifted by the latents. ``vq_embed_dim``,
    the length of the codebook's vectors, is ``latent_channels`` if None.
    """

    class_name: ClassVar[str] = "VQModel"
    fixed: ClassVar[Mapping[str, Any]] = NOT_QUANTIZED
    harmless: ClassVar[Mapping[str, str]] = AutoencoderKLConfig.harmless
    shift_factor: ClassVar[None] = None
    latents_mean: ClassVar[None] = None
    latents_std: ClassVar[None] = None

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: Levels = (64,)
    layers_per_block: Layers = 1
    act_fn: str = "silu"
    latent_channels: int = 3
    sample_size: int = 32
    num_vq_embeddings: int = 256
    norm_num_groups: int = 32
    vq_embed_dim: int | None = None
    scaling_factor: Positive = 0.18215
    norm_type: str = "group"
    mid_block_add_attention: bool = True
    lookup_from_codebook: bool = False
    force_upcast: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_levels(
            self, ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
        )
        if self.norm_type not in ("group", "spatial"):
            raise ValueError(f"VQModel: norm_type={self.norm_type!r}; expected 'group' or 'spatial'")
        if self.norm_type == "spatial" and self.code_channels != self.latent_channels:
            raise ValueError(
                "VQModel: norm_type='spatial' scales by the latents, so vq_embed_dim must be "
                f"latent_channels={self.latent_channels} (or left out), got {self.vq_embed_dim}"
            )

    @property
    def code_channels(self) -> int:
        """The channels of the latents that it encodes to and decodes."""
        return self.vq_embed_dim or self.latent_channels

    @property
    def encoded_channels(self) -> int:
        """What the encoder makes: latents."""
        return self.latent_channels

    @property
    def scale(self) -> int:
        """Pixels per latent along an edge."""
        return 2 ** (len(self.block_out_channels) - 1)


class VQModel(Model):
    """Maps images ``[B,H,W,3]`` in [-1, 1] to latents ``[B,H/scale,W/scale,code_channels]`` and back.

    The latents of :meth:`encode` are not quantised; :meth:`decode` does it first, unless told otherwise.
    """

    config: VQConfig = VQConfig()
    remat: str = "none"  # or "blocks", "full": what the backward pass recomputes; see models/remat.py
    config_class: ClassVar[type[Config]] = VQConfig

    def setup(self) -> None:
        c = self.config
        check_policy(self.remat)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.encoder = Encoder(c, **dtypes, remat=self.remat)
        self.decoder = Decoder(c, **dtypes, remat=self.remat)
        self.quantize = Codebook(c.num_vq_embeddings, c.code_channels, **dtypes)
        self.quant_conv = Conv(c.code_channels, kernel_size=1, padding=0, **dtypes)
        self.post_quant_conv = Conv(c.latent_channels, kernel_size=1, padding=0, **dtypes)

    def example_inputs(self) -> dict[str, Any]:
        edge = self.config.scale
        return {"images": jax.ShapeDtypeStruct((1, edge, edge, self.config.in_channels), jnp.float32)}

    def encode(self, images: jax.Array) -> Encoded:
        """``images [B,H,W,3]`` in [-1, 1] -> latents, float32. ``H``, ``W``: multiples of ``scale``."""
        check_images(images, self.config)
        return Encoded(self.quant_conv(self.encoder(jnp.asarray(images, self.dtype))).astype(jnp.float32))

    def indices(self, latents: jax.Array) -> jax.Array:
        """The codebook's indices ``[B,h,w]`` int32 of the vectors nearest to ``latents [B,h,w,code_channels]``."""
        return self.quantize.nearest(self.checked(latents))

    def decode(self, latents: jax.Array, force_not_quantize: bool = False) -> jax.Array:
        """Latents -> images ``[B,H,W,3]``, about [-1, 1], in ``dtype``.

        Args:
          latents: ``[B,h,w,code_channels]``, not scaled.
          force_not_quantize: decode them as they are, without the codebook. With ``lookup_from_codebook``, ``latents``
            are then indices ``[B,h,w]`` of the codebook's vectors.

        Raises:
          ValueError: wrong shape or dtype.
        """
        if not force_not_quantize:
            codes = self.quantize(self.checked(latents))
        elif self.config.lookup_from_codebook:
            codes = self.lookup(latents)
        else:
            codes = self.checked(latents)
        codes = codes.astype(self.dtype)
        seen = codes if self.config.norm_type == "spatial" else None
        return self.decoder(self.post_quant_conv(codes), codes=seen)

    def lookup(self, indices: jax.Array) -> jax.Array:
        """The codebook's vectors ``[B,h,w,code_channels]``, float32, of integer ``indices [B,h,w]``.

        Raises:
          ValueError: wrong shape or dtype.
        """
        indices = jnp.asarray(indices)
        if indices.ndim != 3 or not jnp.issubdtype(indices.dtype, jnp.integer):
            raise ValueError(f"indices of the codebook must be integers [B,h,w], got {indices.dtype} {indices.shape}")
        return self.quantize.lookup(indices)

    def checked(self, latents: jax.Array) -> jax.Array:
        """The latents, or ``ValueError`` if they are not ``[B,h,w,code_channels]``."""
        if latents.ndim != 4 or latents.shape[-1] != self.config.code_channels:
            raise ValueError(f"latents must be [B,h,w,{self.config.code_channels}], got {latents.shape}")
        return latents

    def __call__(self, images: jax.Array) -> jax.Array:
        """Reconstruction through quantised latents."""
        return self.decode(self.encode(images).latents)
