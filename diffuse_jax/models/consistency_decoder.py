"""The autoencoder of DALL-E 3, whose decoder is a consistency model (Song et al. 2023, 2303.01469)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from diffuse_jax.allowed import Index, Layers, Levels, Positive, Share
from diffuse_jax.config import NOT_QUANTIZED, Config
from diffuse_jax.models.autoencoder_kl import AutoencoderKLConfig, Encoder, Posterior, check_images
from diffuse_jax.models.base import Model
from diffuse_jax.models.layers import Conv
from diffuse_jax.models.remat import check_policy
from diffuse_jax.models.resnet import nearest
from diffuse_jax.models.unet_2d import UNet2DConfig, UNet2DModel
from diffuse_jax.schedulers import ConsistencyDecoderScheduler

MEANS = (0.38862467, 0.02253063, 0.07381133, -0.0171294)
STDS = (0.9654121, 1.0440036, 0.76147926, 0.77022034)
"""Of each channel of Stable Diffusion's scaled latents, which the decoder was trained on."""

WRITTEN = ("block_out_channels", "force_upcast")
"""What PyTorch diffusers writes beside the settings: the encoder's widths again, and false."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencyDecoderVAEConfig(Config):
    """``config.json`` of a ``ConsistencyDecoderVAE``: an encoder as in ``AutoencoderKL``, and a UNet over pixels."""

    class_name: ClassVar[str] = "ConsistencyDecoderVAE"
    fixed: ClassVar[Mapping[str, Any]] = {**NOT_QUANTIZED, "encoder_double_z": True}
    harmless: ClassVar[Mapping[str, str]] = AutoencoderKLConfig.harmless

    scaling_factor: Positive = 0.18215
    latent_channels: int = 4
    sample_size: int = 32
    encoder_act_fn: str = "silu"
    encoder_block_out_channels: Levels = (128, 256, 512, 512)
    encoder_down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    encoder_in_channels: int = 3
    encoder_layers_per_block: Layers = 2
    encoder_norm_num_groups: int = 32
    encoder_out_channels: int = 4
    decoder_add_attention: bool = False
    decoder_block_out_channels: tuple[int, ...] = (320, 640, 1024, 1024)
    decoder_down_block_types: tuple[str, ...] = ("ResnetDownsampleBlock2D",) * 4
    decoder_downsample_padding: Index = 1
    decoder_in_channels: int = 7
    decoder_layers_per_block: int = 3
    decoder_norm_eps: Share = 1e-5
    decoder_norm_num_groups: int = 32
    decoder_num_train_timesteps: int = 1024
    decoder_out_channels: int = 6
    decoder_resnet_time_scale_shift: str = "scale_shift"
    decoder_time_embedding_type: str = "learned"
    decoder_up_block_types: tuple[str, ...] = ("ResnetUpsampleBlock2D",) * 4

    latents_mean: ClassVar[None] = None
    latents_std: ClassVar[None] = None
    shift_factor: ClassVar[None] = None
    force_upcast: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = {
            "latent_channels": len(MEANS),
            "encoder_out_channels": len(MEANS),
            "decoder_in_channels": len(MEANS) + 3,
        }
        for name, value in wanted.items():
            if getattr(self, name) != value:
                raise ValueError(f"{self.class_name}: {name} must be {value}, got {getattr(self, name)}")
        if self.decoder_out_channels < 3:
            raise ValueError(
                f"{self.class_name}: decoder_out_channels must be 3 or more, got {self.decoder_out_channels}"
            )
        self.encoder(), self.decoder_unet()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return super().from_json({key: value for key, value in data.items() if key not in WRITTEN})

    def to_json(self) -> dict[str, Any]:
        data = super().to_json()
        return data | {"block_out_channels": data["encoder_block_out_channels"], "force_upcast": False}

    def encoder(self) -> AutoencoderKLConfig:
        """The autoencoder whose encoder this is."""
        kinds = self.encoder_down_block_types
        return AutoencoderKLConfig(
            in_channels=self.encoder_in_channels,
            down_block_types=kinds,
            up_block_types=("UpDecoderBlock2D",) * len(kinds),
            block_out_channels=self.encoder_block_out_channels,
            layers_per_block=self.encoder_layers_per_block,
            act_fn=self.encoder_act_fn,
            latent_channels=self.latent_channels,
            norm_num_groups=self.encoder_norm_num_groups,
            scaling_factor=self.scaling_factor,
        )

    def decoder_unet(self) -> UNet2DConfig:
        """The UNet of the decoder, from the fields that begin with ``decoder_``."""
        names = [f.name for f in dataclasses.fields(self) if f.name.startswith("decoder_")]
        return UNet2DConfig(**{name.removeprefix("decoder_"): getattr(self, name) for name in names})

    @property
    def in_channels(self) -> int:
        """Channels of images."""
        return self.encoder_in_channels

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """Widths of the encoder."""
        return self.encoder_block_out_channels

    @property
    def scale(self) -> int:
        """Pixels per latent along an edge."""
        return self.encoder().scale


class ConsistencyDecoderVAE(Model):
    """Maps images ``[B,H,W,3]`` in [-1, 1] to latents ``[B,H/scale,W/scale,4]`` and back, in two steps from noise.

    It takes the place of a Stable Diffusion 1.x pipeline's ``vae``.
    """

    config: ConsistencyDecoderVAEConfig = ConsistencyDecoderVAEConfig()
    remat: str = "none"  # or "blocks", "full": what the backward pass recomputes; see models/remat.py
    config_class: ClassVar[type[Config]] = ConsistencyDecoderVAEConfig

    def setup(self) -> None:
        c = self.config
        check_policy(self.remat)
        shared = {"dtype": self.dtype, "param_dtype": self.param_dtype, "remat": self.remat}
        self.encoder = Encoder(c.encoder(), **shared)
        self.quant_conv = Conv(2 * c.latent_channels, 1, padding=0, dtype=self.dtype, param_dtype=self.param_dtype)
        self.decoder_unet = UNet2DModel(c.decoder_unet(), **shared)

    def example_inputs(self) -> dict[str, Any]:
        edge = max(self.config.scale, 2 ** (len(self.config.decoder_block_out_channels) - 1))
        return {"images": jax.ShapeDtypeStruct((1, edge, edge, self.config.in_channels), jnp.float32)}

    def encode(self, images: jax.Array) -> Posterior:
        """As :meth:`AutoencoderKL.encode`."""
        check_images(images, self.config.encoder())
        return Posterior.of_moments(self.quant_conv(self.encoder(jnp.asarray(images, self.dtype))))

    def decode(self, latents: jax.Array, key: jax.Array | None = None, *, noise: jax.Array | None = None) -> jax.Array:
        """Sample images from latents.

        Args:
          latents: ``[B,h,w,4]``, not scaled.
          key: one typed key, or ``[B]`` of them, one per image; ``jax.random.key(0)`` if None.
          noise: instead of ``key``, unit noise for both steps, ``[2,B,H,W,3]``.

        Returns: images ``[B,H,W,3]``, about [-1, 1], in ``dtype``.

        Raises:
          ValueError: the shape of ``latents`` or ``noise`` is wrong.
        """
        c, table = self.config, ConsistencyDecoderScheduler().table(2)
        if latents.ndim != 4 or latents.shape[-1] != c.latent_channels:
            raise ValueError(f"latents must be [B,h,w,{c.latent_channels}], got {latents.shape}")
        B, h, w, _ = latents.shape
        shape = (2, B, h * c.scale, w * c.scale, 3)
        noise = _draw(jax.random.key(0) if key is None else key, shape) if noise is None else jnp.asarray(noise)
        if noise.shape != shape:
            raise ValueError(f"noise must be {shape} for latents {latents.shape}, got {noise.shape}")
        channels = lambda values: jnp.array(values, jnp.float32).reshape(1, 1, 1, -1)
        z = (jnp.asarray(latents, jnp.float32) * c.scaling_factor - channels(MEANS)) / channels(STDS)
        z = nearest(z, shape[2:4])
        number = lambda value: jnp.float32(value)
        x = number(table.init_scale) * noise[0].astype(jnp.float32)
        for i, t in enumerate(table.timesteps):
            given = jnp.concatenate([x * number(table.input_scale[i]), z], -1)
            output = self.decoder_unet(given, jnp.int32(t))[..., :3].astype(jnp.float32)
            x = number(table.to_x0[i, 0]) * x + number(table.to_x0[i, 1]) * output
            if i + 1 < len(noise):
                alpha, sigma = table.levels[i + 1]
                x = number(alpha) * x + number(sigma) * noise[i + 1].astype(jnp.float32)
        return x.astype(self.dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Reconstruction through the mode of the posterior."""
        return self.decode(self.encode(images).mode())


def _draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Unit noise ``[2,B,...]``, of each image's key if there are several."""
    if not key.ndim:
        return jax.random.normal(key, shape, jnp.float32)
    each = jax.vmap(lambda k: jax.random.normal(k, (shape[0], *shape[2:]), jnp.float32))(key)
    return jnp.moveaxis(each, 0, 1)
