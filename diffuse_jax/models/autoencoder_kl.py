"""The variational autoencoder between pixels and latents (Kingma & Welling 2014; Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffuse_jax.allowed import Layers, Length, Levels, Positive, Signed
from diffuse_jax.config import NOT_QUANTIZED, Config
from diffuse_jax.messages import brief
from diffuse_jax.models.autoencoder_layers import Decoder, Encoder
from diffuse_jax.models.base import Model
from diffuse_jax.models.layers import ACTIVATIONS, Conv
from diffuse_jax.models.one_file import OneFile
from diffuse_jax.models.remat import check_policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig(Config):
    """``config.json`` of an ``AutoencoderKL``; ``scaling_factor`` is what latents are multiplied by after encoding."""

    class_name: ClassVar[str] = "AutoencoderKL"
    fixed: ClassVar[Mapping[str, Any]] = NOT_QUANTIZED
    harmless: ClassVar[Mapping[str, str]] = {
        "sample_size": "sizes the tiles of diffusers; here the pipeline's vae_tiling does"
    }

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: Levels = (64,)
    layers_per_block: Layers = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: Positive = 0.18215
    shift_factor: Signed | None = None
    latents_mean: Annotated[tuple[Signed, ...], Length(65_536)] | None = None
    latents_std: Annotated[tuple[Positive, ...], Length(65_536)] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_levels(self, ("DownEncoderBlock2D",), ("UpDecoderBlock2D",))
        for name, values in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if values is not None and len(values) != self.latent_channels:
                raise ValueError(
                    f"AutoencoderKL: {name} must have one number for each of the "
                    f"latent_channels={self.latent_channels}, got {brief(values)}"
                )

    @property
    def encoded_channels(self) -> int:
        """What the encoder makes: mean and log variance of the latents."""
        return 2 * self.latent_channels

    @property
    def scale(self) -> int:
        """Pixels per latent along an edge: 8 in all of Stable Diffusion."""
        return 2 ** (len(self.block_out_channels) - 1)


def check_levels(config: Any, down: tuple[str, ...], up: tuple[str, ...]) -> None:
    """Check the levels of an autoencoder whose two halves have the same widths.

    Args:
      config: its configuration.
      down, up: the known types of the encoder's and the decoder's levels.

    Raises:
      ValueError: an unknown type or activation, or not one type for each width.
    """
    name, c = config.class_name, config
    for field, known in (("down_block_types", down), ("up_block_types", up)):
        if unknown := sorted(set(getattr(c, field)) - set(known)):
            expected = " or ".join(map(repr, known))
            raise ValueError(f"{name}: {field} must be {expected} at every level, got {brief(unknown)}")
    if c.act_fn not in ACTIVATIONS:
        raise ValueError(f"{name}: act_fn={c.act_fn!r}; expected one of {tuple(ACTIVATIONS)}")
    if not len(c.down_block_types) == len(c.up_block_types) == len(c.block_out_channels):
        raise ValueError(
            f"{name}: down_block_types has {len(c.down_block_types)} and up_block_types "
            f"{len(c.up_block_types)} entries for the {len(c.block_out_channels)} of block_out_channels"
        )


class LatentConfig(Protocol):
    """What every autoencoder's configuration says of its images and latents, so that pipelines can use any of them."""

    @property
    def in_channels(self) -> int: ...
    @property
    def latent_channels(self) -> int: ...
    @property
    def scale(self) -> int: ...
    @property
    def scaling_factor(self) -> float: ...
    @property
    def shift_factor(self) -> float | None: ...
    @property
    def latents_mean(self) -> tuple[float, ...] | None: ...
    @property
    def latents_std(self) -> tuple[float, ...] | None: ...


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents, ``mean`` and ``logvar`` both ``[B,h,w,c]``."""

    mean: jax.Array
    logvar: jax.Array

    @classmethod
    def of_moments(cls, moments: jax.Array) -> Posterior:
        """From an encoder's output ``[B,h,w,2c]``, in float32."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return cls(mean, jnp.clip(logvar, -30.0, 20.0))

    def sample(self, key: jax.Array) -> jax.Array:
        """``mean + std * noise``.

        Args:
          key: one typed key for the batch, or ``[B]`` keys; then each image's latents depend on its own key alone.

        Raises:
          ValueError: ``key`` is neither.
        """
        shape, dtype = self.mean.shape, self.mean.dtype
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), shape[:1]):
            raise ValueError(
                f"key must be one typed key (jax.random.key) or [{shape[0]}] of them, one per image; "
                f"got {key.dtype} {key.shape}"
            )
        draw = lambda key, shape: jax.random.normal(key, shape, dtype)
        noise = jax.vmap(lambda k: draw(k, shape[1:]))(key) if key.ndim else draw(key, shape)
        return self.at(noise)

    def at(self, noise: jax.Array) -> jax.Array:
        """``mean + std * noise`` for given standard normal ``noise [B,h,w,c]``."""
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def mode(self) -> jax.Array:
        """The most likely latents, which is the mean."""
        return self.mean

    def kl(self) -> jax.Array:
        """KL divergence from the standard normal, summed per sample: ``[B]`` in nats."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * terms.sum((1, 2, 3))


class AutoencoderKL(OneFile, Model):
    """Maps images ``[B,H,W,3]`` in [-1, 1] to latents ``[B,H/scale,W/scale,latent_channels]`` and back.

    Latents are unscaled here; :func:`scale_latents` gives those that a UNet works on.
    """

    config: AutoencoderKLConfig = AutoencoderKLConfig()
    remat: str = "none"  # or "blocks", "full": what the backward pass recomputes; see models/remat.py
    config_class: ClassVar[type[Config]] = AutoencoderKLConfig

    def setup(self) -> None:
        c = self.config
        check_policy(self.remat)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.encoder = Encoder(c, **dtypes, remat=self.remat)
        self.decoder = Decoder(c, **dtypes, remat=self.remat)
        if c.use_quant_conv:
            self.quant_conv = Conv(2 * c.latent_channels, kernel_size=1, padding=0, **dtypes)
        if c.use_post_quant_conv:
            self.post_quant_conv = Conv(c.latent_channels, kernel_size=1, padding=0, **dtypes)

    def example_inputs(self) -> dict[str, Any]:
        edge = self.config.scale
        return {"images": jax.ShapeDtypeStruct((1, edge, edge, self.config.in_channels), jnp.float32)}

    def encode(self, images: jax.Array) -> Posterior:
        """``images [B,H,W,3]`` in [-1, 1] -> posterior over latents, float32. ``H``, ``W``: multiples of ``scale``."""
        check_images(images, self.config)
        moments = self.encoder(jnp.asarray(images, self.dtype))
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        return Posterior.of_moments(moments)

    def decode(self, latents: jax.Array) -> jax.Array:
        """``latents [B,h,w,c]`` (not scaled) -> images ``[B,H,W,3]``, about [-1, 1], in ``dtype``."""
        check_latents(latents, self.config)
        x = jnp.asarray(latents, self.dtype)
        if self.config.use_post_quant_conv:
            x = self.post_quant_conv(x)
        return self.decoder(x)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Reconstruction through the mode of the posterior."""
        return self.decode(self.encode(images).mode())


def check_images(images: jax.Array, config: LatentConfig) -> None:
    """Raise ``ValueError`` unless ``images`` is ``[B,H,W,C]`` with edges that are multiples of ``config.scale``."""
    if images.ndim != 4 or images.shape[-1] != config.in_channels:
        raise ValueError(f"images must be [B,H,W,{config.in_channels}] (channel-last), got {images.shape}")
    if any(edge % config.scale for edge in images.shape[1:3]):
        raise ValueError(f"image height and width must be multiples of {config.scale}, got {images.shape[1:3]}")


def check_latents(latents: jax.Array, config: LatentConfig) -> None:
    """Raise ``ValueError`` unless ``latents`` is ``[B,h,w,latent_channels]``."""
    if latents.ndim != 4 or latents.shape[-1] != config.latent_channels:
        raise ValueError(f"latents must be [B,h,w,{config.latent_channels}], got {latents.shape}")


def scale_latents(latents: jax.Array, config: LatentConfig) -> jax.Array:
    """The encoder's latents scaled to about unit variance, as the denoising network expects them."""
    mean, std = latent_statistics(config)
    return (latents - mean) * config.scaling_factor / std


def unscale_latents(latents: jax.Array, config: LatentConfig) -> jax.Array:
    """The inverse of :func:`scale_latents`: what :meth:`AutoencoderKL.decode` takes."""
    mean, std = latent_statistics(config)
    return latents * std / config.scaling_factor + mean


def latent_statistics(config: LatentConfig) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation per channel, ``[1,1,1,c]``; by default ``shift_factor`` (or zero) and one."""
    shape = (1, 1, 1, config.latent_channels)
    if config.latents_mean is not None and config.latents_std is not None:
        mean, std = config.latents_mean, config.latents_std
    else:
        mean, std = (config.shift_factor or 0.0,) * config.latent_channels, (1.0,) * config.latent_channels
    return jnp.array(mean, jnp.float32).reshape(shape), jnp.array(std, jnp.float32).reshape(shape)
