"""ControlNet: a copy of a UNet's encoder that reads an image and steers the UNet (Zhang et al. 2023, 2302.05543)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax import weights
from diffuse_jax.config import Config
from diffuse_jax.models.base import Params
from diffuse_jax.models.layers import Conv
from diffuse_jax.models.one_file import OneFile
from diffuse_jax.models.remat import check_policy
from diffuse_jax.models.unet_2d_condition import UNet2DConditionModel
from diffuse_jax.models.unet_config import JOINT, MIDDLES, EncoderConfig
from diffuse_jax.models.unet_encoder import EncoderModel
from diffuse_jax.weights.names import Path, flatten, unflatten


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlNetConfig(EncoderConfig):
    """``config.json`` of a ``ControlNetModel``: its UNet's encoder, and how the control image is embedded.

    ``conditioning_embedding_out_channels`` are the widths of the image embedding, each at half the resolution of the
    previous one. ``controlnet_conditioning_channel_order`` is "rgb", or "bgr" if the network was trained with it;
    callers pass RGB in either case. With ``global_pool_conditions`` the residuals are averaged over all positions.
    """

    class_name: ClassVar[str] = "ControlNetModel"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **EncoderConfig.choices,
        "mid_block_type": tuple(kind for kind in MIDDLES if kind not in JOINT),
        "class_embed_type": (None, "timestep", "identity", "projection"),
        "act_fn": ("silu", "swish"),
        "controlnet_conditioning_channel_order": ("rgb", "bgr"),
    }

    conditioning_channels: int = 3
    controlnet_conditioning_channel_order: str = "rgb"
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    global_pool_conditions: bool = False

    def _check(self) -> None:
        super()._check()
        for name in ("layers_per_block", "cross_attention_dim"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"ControlNetModel: {name} must be a single number, got {getattr(self, name)!r}")
        if not self.conditioning_embedding_out_channels:
            raise ValueError("ControlNetModel: conditioning_embedding_out_channels must have at least one width")

    @property
    def scale(self) -> int:
        """Pixels of the control image per latent along an edge: 8 in all of Stable Diffusion."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)


class ControlNetOutput(NamedTuple):
    """Unscaled residuals for a UNet's ``down_block_additional_residuals`` and ``mid_block_additional_residual``.

    Each is ``[B,h,w,C]`` as at its level, or ``[B,1,1,C]`` with ``global_pool_conditions``.
    """

    down_block_res_samples: tuple[jax.Array, ...]
    mid_block_res_sample: jax.Array


class ConditioningEmbedding(nn.Module):
    """Convolutions from an image ``[B,H,W,*]`` to the latents' resolution, ``[B,H/scale,W/scale,channels]``."""

    channels: int
    widths: tuple[int, ...]
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.silu(Conv(self.widths[0], **dtypes, name="conv_in")(x))
        for i, (width, wider) in enumerate(zip(self.widths, self.widths[1:])):
            x = nn.silu(Conv(width, **dtypes, name=f"blocks_{2 * i}")(x))
            x = nn.silu(Conv(wider, stride=2, **dtypes, name=f"blocks_{2 * i + 1}")(x))
        return Conv(self.channels, **dtypes, name="conv_out")(x)


class ControlNetModel(OneFile, EncoderModel):
    """Computes residuals for a UNet with the same encoder so that its samples follow a control image.

    :meth:`embed` is the part that does not depend on the step; a sampler calls it once and passes ``features``. To
    train a ControlNet, start from :meth:`from_unet`.
    """

    config: ControlNetConfig = ControlNetConfig()
    config_class: ClassVar[type[Config]] = ControlNetConfig

    def setup(self) -> None:
        c = self.config
        check_policy(self.remat)
        self.controlnet_cond_embedding = ConditioningEmbedding(
            c.block_out_channels[0],
            c.conditioning_embedding_out_channels,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

    def example_inputs(self) -> dict[str, Any]:
        inputs = super().example_inputs()
        _, h, w, _ = inputs["sample"].shape
        image = (1, h * self.config.scale, w * self.config.scale, self.config.conditioning_channels)
        return inputs | {"controlnet_cond": jax.ShapeDtypeStruct(image, jnp.float32)}

    def embed(self, images: jax.Array) -> jax.Array:
        """Control images ``[B,H,W,conditioning_channels]``, RGB in [0, 1] -> features ``[B,H/scale,W/scale,C]``.

        Raises:
          ValueError: ``images`` has the wrong rank or number of channels.
        """
        channels = self.config.conditioning_channels
        if images.ndim != 4 or images.shape[-1] != channels:
            raise ValueError(f"control images must be [B,H,W,{channels}] (channel-last), got {images.shape}")
        reverse = self.config.controlnet_conditioning_channel_order == "bgr"
        x = jnp.asarray(images, self.dtype)
        return self.controlnet_cond_embedding(x[..., ::-1] if reverse else x)

    @nn.compact
    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array,
        encoder_hidden_states: jax.Array,
        controlnet_cond: jax.Array | None = None,
        added_cond_kwargs: Mapping[str, jax.Array] | None = None,
        class_labels: jax.Array | None = None,
        timestep_cond: jax.Array | None = None,
        *,
        features: jax.Array | None = None,
    ) -> ControlNetOutput:
        """One evaluation of the network; callers multiply the residuals with the conditioning scale.

        Args:
          sample: ``[B,h,w,in_channels]``, the UNet's input.
          timesteps: ``[B]`` or a scalar, in units of the training schedule (0 to 999).
          encoder_hidden_states: ``[B,L,cross_attention_dim]`` prompt embeddings.
          controlnet_cond: control images ``[B,h*scale,w*scale,conditioning_channels]``, RGB in [0, 1].
          added_cond_kwargs: for SDXL ``{"text_embeds": [B,1280], "time_ids": [B,6]}``.
          class_labels: as the UNet's.
          timestep_cond: ignored, since no ControlNet has parameters for it; accepted because UNets take it.
          features: output of :meth:`embed`, ``[B,h,w,C]``, instead of ``controlnet_cond``.

        Returns: residuals in ``dtype``.

        Raises:
          ValueError: neither or both of images and features are given, or an input does not match the configuration or
            another input.
        """
        c = self.config
        self.check_inputs(sample, encoder_hidden_states)
        if (controlnet_cond is None) == (features is None):
            both = "neither" if features is None else "both"
            raise ValueError(f"ControlNetModel takes controlnet_cond (images) or features (from embed), got {both}")
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        temb, _ = self.embed_conditions(sample.shape[0], timesteps, added_cond_kwargs, class_labels, timestep_cond)
        x = Conv(c.block_out_channels[0], **dtypes, name="conv_in")(jnp.asarray(sample, self.dtype))
        if controlnet_cond is not None:
            features = self.embed(controlnet_cond)
        x = x + self._checked(features, x)
        skips, x = self.encode(x, temb, jnp.asarray(encoder_hidden_states, self.dtype))

        zero_conv = lambda x, name: Conv(x.shape[-1], kernel_size=1, padding=0, **dtypes, name=name)(x)
        down = [zero_conv(skip, f"controlnet_down_blocks_{i}") for i, skip in enumerate(skips)]
        middle = zero_conv(x, "controlnet_mid_block")
        if c.global_pool_conditions:
            *down, middle = (residual.mean((1, 2), keepdims=True) for residual in (*down, middle))
        return ControlNetOutput(tuple(down), middle)

    def _checked(self, features: jax.Array | None, x: jax.Array) -> jax.Array:
        """``features`` in ``dtype``, if their shape is that of ``x``."""
        if features is None or features.shape != x.shape:
            B, h, w, C = x.shape
            scale, channels = self.config.scale, self.config.conditioning_channels
            raise ValueError(
                f"control images must be {(B, h * scale, w * scale, channels)} or features {(B, h, w, C)} for this "
                f"sample, got features {None if features is None else features.shape}"
            )
        return jnp.asarray(features, self.dtype)

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        params: Params,
        conditioning_channels: int = 3,
        *,
        conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256),
        controlnet_conditioning_channel_order: str = "rgb",
        key: jax.Array | None = None,
    ) -> tuple[Self, Params]:
        """A ControlNet to train: a copy of the UNet's encoder that adds nothing yet (Zhang et al. 2023, 3.1).

        The output convolutions and the last one of the image embedding are zero; the embedding's others are random.
        ``dtype``, ``param_dtype`` and ``remat`` are the UNet's, and new parameters have the dtype of its ``conv_in``.
        The copy shares no buffers with ``params``, so either may be donated.

        Args:
          unet: the network whose samples are to be controlled.
          params: its parameters.
          conditioning_channels: channels of the control image.
          conditioning_embedding_out_channels: widths of its embedding, each at half the resolution of the one before.
          controlnet_conditioning_channel_order: "rgb" or "bgr".
          key: for the random convolutions; ``jax.random.key(0)`` if None.

        Raises:
          ValueError: this UNet's encoder uses an option that ControlNets do not have.
          WeightsError: the parameters are not this UNet's.
        """
        weights.check_params(params, unet.shapes(), label=type(unet).__name__)
        config = _encoder_of(unet).replace(
            conditioning_channels=conditioning_channels,
            conditioning_embedding_out_channels=tuple(conditioning_embedding_out_channels),
            controlnet_conditioning_channel_order=controlnet_conditioning_channel_order,
        )
        model = cls(config, dtype=unet.dtype, param_dtype=unet.param_dtype, remat=unet.remat)
        shapes, source = flatten(model.shapes()), flatten(params)
        dtype = source["conv_in", "kernel"].dtype
        key = jax.random.key(0) if key is None else key
        flat = {path: source.get(path) for path in shapes}
        fresh = [path for path in shapes if path[0].startswith("controlnet_")]
        for path, k in zip(fresh, jax.random.split(key, len(fresh))):
            flat[path] = _fresh(path, shapes[path].shape, dtype, k)
        return model, unflatten({path: jnp.array(leaf, copy=True) for path, leaf in flat.items()})


def check_fits(net: ControlNetConfig, unet: EncoderConfig) -> None:
    """Refuse a ControlNet that is for another UNet.

    Their input channels may differ: a UNet for inpainting shares ControlNets with its text-to-image sibling.

    Raises:
      ValueError: it is; the message names the first setting that differs.
    """
    for name in ("block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type"):
        have, want = (c.per_level(name) if name == "layers_per_block" else getattr(c, name) for c in (net, unet))
        if have != want:
            raise ValueError(f"this ControlNet is for another UNet: it has {name}={have}, and the UNet {want}")


def _encoder_of(unet: UNet2DConditionModel) -> ControlNetConfig:
    """The part of a UNet's configuration that it shares with its ControlNets."""
    c = unet.config
    plain = {
        "center_input_sample": False,
        "time_embedding_dim": None,
        "time_cond_proj_dim": None,
        "conv_in_kernel": 3,
        "class_embeddings_concat": False,
    }
    for name, value in plain.items():
        if getattr(c, name) != value:
            raise ValueError(f"a ControlNet has no {name}, but this UNet has {name}={getattr(c, name)!r}")
    shared = [field.name for field in dataclasses.fields(EncoderConfig) if field.name != "extra"]
    return ControlNetConfig(**{name: getattr(c, name) for name in shared})


def _fresh(path: Path, shape: tuple[int, ...], dtype: Any, key: jax.Array) -> jax.Array:
    """A parameter that the UNet lacks: random for kernels inside the image embedding, zero for outputs and biases."""
    random = path[0] == "controlnet_cond_embedding" and path[1] != "conv_out" and path[-1] == "kernel"
    return nn.initializers.lecun_normal()(key, shape, dtype) if random else jnp.zeros(shape, dtype)
