"""The text-conditioned UNet of Stable Diffusion 1.x, 2.x and XL (Rombach et al. 2022; Podell et al. 2023)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.config import Config, thaw
from diffuse_jax.models.attention import Transformer2D
from diffuse_jax.models.base import Model
from diffuse_jax.models.embeddings import Embedding, TimestepEmbedding, sinusoidal_embedding
from diffuse_jax.models.layers import ACTIVATIONS, Conv, Dense, GroupNorm
from diffuse_jax.models.remat import check_policy, remat_block, remat_level
from diffuse_jax.models.resnet import Downsample, ResnetBlock, Upsample

HAS_ATTENTION = {
    "DownBlock2D": False,
    "UpBlock2D": False,
    "UNetMidBlock2D": False,
    "CrossAttnDownBlock2D": True,
    "CrossAttnUpBlock2D": True,
    "UNetMidBlock2DCrossAttn": True,
}

FIXED: dict[str, Any] = {
    "mid_block_scale_factor": 1,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "dual_cross_attention": False,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "attention_type": "default",
    "cross_attention_norm": None,
}
"""Options of the JSON that change the network and for which only this value is implemented."""


class Level(NamedTuple):
    """One resolution of the UNet."""

    channels: int
    layers: int
    heads: int
    depth: int  # transformer blocks after each residual block; 0 where there is no attention
    only_cross_attention: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNet2DConditionConfig(Config):
    """``config.json`` of a ``UNet2DConditionModel``; a field that may differ by level is one value or one per level.

    ``num_attention_heads`` is what the JSON calls ``attention_head_dim``, a misnomer kept by every published file.
    ``cross_attention_dim`` and ``sample_size`` describe the checkpoint (width of the text states, latents' edge).
    """

    class_name: ClassVar[str] = "UNet2DConditionModel"

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    reverse_transformer_layers_per_block: tuple[int, ...] | None = None
    num_attention_heads: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: int | None = None
    upcast_attention: bool = False
    resnet_time_scale_shift: str = "default"
    time_embedding_dim: int | None = None
    time_cond_proj_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    projection_class_embeddings_input_dim: int | None = None
    class_embeddings_concat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        data = dict(data)
        heads = data.pop("attention_head_dim", 8)
        if data.get("num_attention_heads") is None:
            data["num_attention_heads"] = heads
        return super().from_json(data)

    def to_json(self) -> dict[str, Any]:
        data = super().to_json()
        return data | {"attention_head_dim": data["num_attention_heads"], "num_attention_heads": None}

    def _check(self) -> None:
        options = dict(self.extra)
        for name, value in FIXED.items():
            if options.get(name, value) != value:
                raise ValueError(
                    f"UNet2DConditionModel: {name}={options[name]!r} is not supported, only {value!r} (or leave it out)"
                )
        choices = {
            "mid_block_type": (None, *(kind for kind in HAS_ATTENTION if "Mid" in kind)),
            "addition_embed_type": (None, "text_time"),
            "class_embed_type": (None, "timestep", "identity", "projection", "simple_projection"),
            "resnet_time_scale_shift": ("default", "scale_shift"),
            "act_fn": tuple(ACTIVATIONS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"UNet2DConditionModel: {name}={getattr(self, name)!r}; expected one of {allowed}")
        for name, way in (("down_block_types", "Down"), ("up_block_types", "Up")):
            known = sorted(kind for kind in HAS_ATTENTION if way in kind)
            unknown = sorted(set(getattr(self, name)) - set(known))
            if unknown:
                raise ValueError(f"UNet2DConditionModel: unknown block type {unknown[0]!r} in {name}; known: {known}")
        sizes = ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
        if self.addition_embed_type == "text_time" and not all(getattr(self, name) for name in sizes):
            raise ValueError(f"UNet2DConditionModel: addition_embed_type='text_time' needs {sizes[0]} and {sizes[1]}")
        n = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"UNet2DConditionModel: {name} has {len(getattr(self, name))} entries for {n} levels")
        self.down_levels()

    def down_levels(self) -> list[Level]:
        """What each level of the downward path consists of, finest first."""
        return self._levels(self.down_block_types, self.transformer_layers_per_block)

    def up_levels(self) -> list[Level]:
        """The same for the upward path, coarsest first; it has one residual block more at each level."""
        depth = self.reverse_transformer_layers_per_block
        depths = self.transformer_layers_per_block if depth is None else depth[::-1]
        levels = self._levels(self.up_block_types[::-1], depths)[::-1]
        return [level._replace(layers=level.layers + 1) for level in levels]

    def mid_level(self) -> Level:
        """The middle: as the coarsest level, with attention if ``mid_block_type`` has it."""
        depths = per_level(self, "transformer_layers_per_block")
        level = self.down_levels()[-1]
        attends = self.mid_block_type is not None and HAS_ATTENTION[self.mid_block_type]
        return level._replace(layers=1, depth=depths[-1] if attends else 0, only_cross_attention=False)

    def _levels(self, kinds: tuple[str, ...], depths: int | tuple[int, ...]) -> list[Level]:
        n = len(self.block_out_channels)
        depths = (depths,) * n if isinstance(depths, int) else depths
        if not all(isinstance(depth, int) for depth in depths):
            raise ValueError(
                "UNet2DConditionModel: transformer_layers_per_block is one number, or one per level, got "
                f"{thaw(depths)}; a number for each block of a level is not supported"
            )
        rows = zip(
            self.block_out_channels,
            per_level(self, "layers_per_block"),
            per_level(self, "num_attention_heads"),
            [d if HAS_ATTENTION[k] else 0 for d, k in zip(depths, kinds, strict=True)],
            per_level(self, "only_cross_attention"),
            strict=True,
        )
        return [Level(*row) for row in rows]

    @property
    def time_embed_dim(self) -> int:
        return self.time_embedding_dim or 4 * self.block_out_channels[0]


def per_level(config: UNet2DConditionConfig, name: str) -> tuple[Any, ...]:
    """The field ``name`` as one value per level."""
    value, n = getattr(config, name), len(config.block_out_channels)
    if not isinstance(value, tuple):
        return (value,) * n
    if len(value) != n:
        raise ValueError(f"UNet2DConditionModel: {name} has {len(value)} entries for {n} levels of block_out_channels")
    return value


class UNet2DConditionModel(Model):
    """Predicts noise (or velocity, or the sample) from a noisy sample, a timestep and text states.

    Takes every configuration of SD 1.x, 2.x, SDXL base and refiner, the inpainting, InstructPix2Pix and depth variants
    (more input channels), the four-times upscaler (class labels, ``only_cross_attention``) and LCM (``timestep_cond``).
    Dropout is never applied: ``config.dropout`` is kept for the file only.
    """

    config: UNet2DConditionConfig = UNet2DConditionConfig()
    remat: str = "none"  # or "blocks", "full": what the backward pass computes again; see models/remat.py
    config_class: ClassVar[type[Config]] = UNet2DConditionConfig

    def example_inputs(self) -> dict[str, Any]:
        c = self.config
        size = 2 ** (len(c.block_out_channels) - 1)
        array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
        inputs: dict[str, Any] = {
            "sample": array(1, size, size, c.in_channels),
            "timesteps": array(1),
            "encoder_hidden_states": array(1, 1, max(per_level(c, "cross_attention_dim"))),
        }
        if c.addition_embed_type == "text_time":
            pooled = (c.projection_class_embeddings_input_dim or 0) - (c.addition_time_embed_dim or 0)
            inputs["added_cond_kwargs"] = {"text_embeds": array(1, pooled), "time_ids": array(1, 1)}
        if c.class_embed_type in ("projection", "simple_projection", "identity"):
            inputs["class_labels"] = array(1, c.projection_class_embeddings_input_dim or c.time_embed_dim)
        elif c.class_embed_type == "timestep":
            inputs["class_labels"] = array(1)
        elif c.num_class_embeds is not None:
            inputs["class_labels"] = array(1, dtype=jnp.int32)
        return inputs

    @nn.compact
    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array,
        encoder_hidden_states: jax.Array,
        added_cond_kwargs: Mapping[str, jax.Array] | None = None,
        class_labels: jax.Array | None = None,
        timestep_cond: jax.Array | None = None,
    ) -> jax.Array:
        """One evaluation of the network.

        Args:
          sample: ``[B,h,w,in_channels]``.
          timesteps: ``[B]`` or a scalar, in units of the training schedule (0 to 999).
          encoder_hidden_states: ``[B,L,cross_attention_dim]`` text states.
          added_cond_kwargs: for SDXL ``{"text_embeds": [B,1280], "time_ids": [B,6]}`` (5 ids in the refiner).
          class_labels: ``[B]`` noise level of the upscaler, or ``[B,D]`` for projected classes.
          timestep_cond: ``[B,time_cond_proj_dim]`` embedded guidance scale of LCM.

        Returns: ``[B,h,w,out_channels]`` in ``dtype``.

        Raises:
          ValueError: the channels of ``sample`` or the conditions do not fit the configuration.
        """
        c = self.config
        check_policy(self.remat)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if sample.ndim != 4 or sample.shape[-1] != c.in_channels:
            raise ValueError(f"sample must be [B,h,w,{c.in_channels}] (channel-last), got {sample.shape}")
        width = max(per_level(c, "cross_attention_dim"))
        given = encoder_hidden_states.shape
        if len(given) != 3 or (given[0], given[2]) != (sample.shape[0], width):
            raise ValueError(f"encoder_hidden_states must be [B,L,{width}] with B={sample.shape[0]}, got {given}")
        temb = self.embed_conditions(sample.shape[0], timesteps, added_cond_kwargs, class_labels, timestep_cond)
        context = jnp.asarray(encoder_hidden_states, self.dtype)
        x = jnp.asarray(sample, self.dtype)
        if c.center_input_sample:
            x = 2 * x - 1

        padding = (c.conv_in_kernel - 1) // 2
        x = Conv(c.block_out_channels[0], c.conv_in_kernel, padding=padding, **dtypes, name="conv_in")(x)
        skips = [x]
        down, up = c.down_levels(), c.up_levels()
        down_block, mid_block = (remat_level(level, self.remat) for level in (DownBlock, MidBlock))
        up_block = remat_level(UpBlock, self.remat, static_argnums=(5,))
        shared = {**dtypes, "remat": self.remat}
        for i, level in enumerate(down):
            x, new = down_block(c, level, i + 1 < len(down), **shared, name=f"down_blocks_{i}")(x, temb, context)
            skips += new
        if c.mid_block_type is not None:
            x = mid_block(c, c.mid_level(), **shared, name="mid_block")(x, temb, context)
        for i, level in enumerate(up):
            here, skips = skips[-level.layers :], skips[: -level.layers]
            size = None if i + 1 == len(up) else skips[-1].shape[1:3]
            x = up_block(c, level, **shared, name=f"up_blocks_{i}")(x, here, temb, context, size)

        x = GroupNorm(c.norm_num_groups, c.norm_eps, **dtypes, name="conv_norm_out")(x)
        x = ACTIVATIONS[c.act_fn](x)
        padding = (c.conv_out_kernel - 1) // 2
        return Conv(c.out_channels, c.conv_out_kernel, padding=padding, **dtypes, name="conv_out")(x)

    def embed_conditions(
        self,
        batch: int,
        timesteps: jax.Array,
        added: Mapping[str, jax.Array] | None,
        class_labels: jax.Array | None,
        timestep_cond: jax.Array | None,
    ) -> jax.Array:
        """Everything that is not spatial as one vector ``[B,time_embed_dim]``."""
        c = self.config
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        waves = lambda t, dim: sinusoidal_embedding(
            t, dim, flip_sin_to_cos=c.flip_sin_to_cos, freq_shift=c.freq_shift
        ).astype(self.dtype)
        t = jnp.broadcast_to(jnp.asarray(timesteps), (batch,))
        embed = TimestepEmbedding(c.time_embed_dim, c.act_fn, c.time_cond_proj_dim, **dtypes, name="time_embedding")
        temb = embed(waves(t, c.block_out_channels[0]), timestep_cond)

        if c.class_embed_type is not None or c.num_class_embeds is not None:
            if class_labels is None:
                raise ValueError("this UNet needs class_labels (class_embed_type or num_class_embeds is set)")
            labels = self.embed_class(class_labels, waves)
            temb = jnp.concatenate([temb, labels], -1) if c.class_embeddings_concat else temb + labels

        if c.addition_embed_type == "text_time":
            if added is None or {"text_embeds", "time_ids"} - set(added):
                raise ValueError("this UNet needs added_cond_kwargs={'text_embeds': [B,D], 'time_ids': [B,n]}")
            ids = waves(added["time_ids"].reshape(-1), c.addition_time_embed_dim).reshape(batch, -1)
            vector = jnp.concatenate([jnp.asarray(added["text_embeds"], self.dtype), ids], -1)
            if vector.shape[-1] != c.projection_class_embeddings_input_dim:
                raise ValueError(
                    f"text_embeds {added['text_embeds'].shape} and time_ids {added['time_ids'].shape} make a vector of "
                    f"{vector.shape[-1]}, but this UNet takes {c.projection_class_embeddings_input_dim}"
                )
            temb = temb + TimestepEmbedding(c.time_embed_dim, c.act_fn, **dtypes, name="add_embedding")(vector)
        return temb

    def embed_class(self, labels: jax.Array, waves: Any) -> jax.Array:
        c = self.config
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype, "name": "class_embedding"}
        match c.class_embed_type:
            case None:
                return Embedding(c.num_class_embeds or 0, c.time_embed_dim, **dtypes)(labels)
            case "timestep":
                return TimestepEmbedding(c.time_embed_dim, c.act_fn, **dtypes)(waves(labels, c.block_out_channels[0]))
            case "projection":
                return TimestepEmbedding(c.time_embed_dim, c.act_fn, **dtypes)(jnp.asarray(labels, self.dtype))
            case "simple_projection":
                return Dense(c.time_embed_dim, **dtypes)(labels)
            case _:
                return jnp.asarray(labels, self.dtype)


class Block(nn.Module):
    """What the three kinds of block share: their config, their level and how they make a residual and an attention."""

    config: UNet2DConditionConfig
    level: Level
    downsample: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def resnet(self, i: int, x: jax.Array, temb: jax.Array) -> jax.Array:
        c = self.config
        return remat_block(ResnetBlock, self.remat)(
            self.level.channels,
            c.norm_num_groups,
            c.norm_eps,
            c.act_fn,
            c.resnet_time_scale_shift,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=f"resnets_{i}",
        )(x, temb)

    def attend(self, i: int, x: jax.Array, context: jax.Array) -> jax.Array:
        if not self.level.depth:
            return x
        return Transformer2D(
            self.level.heads,
            self.level.depth,
            self.config.norm_num_groups,
            self.config.use_linear_projection,
            self.level.only_cross_attention,
            self.remat,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=f"attentions_{i}",
        )(x, context)


class DownBlock(Block):
    """One level downward; returns the result and every tensor that the upward path will want."""

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array, context: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        skips = []
        for i in range(self.level.layers):
            x = self.attend(i, self.resnet(i, x, temb), context)
            skips.append(x)
        if self.downsample:
            x = Downsample(
                self.level.channels,
                self.config.downsample_padding,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name="downsamplers_0",
            )(x)
            skips.append(x)
        return x, skips


class MidBlock(Block):
    """Residual, attention, residual at the coarsest level; the kind without attention is one residual block."""

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array, context: jax.Array) -> jax.Array:
        x = self.resnet(0, x, temb)
        return self.resnet(1, self.attend(0, x, context), temb) if self.level.depth else x


class UpBlock(Block):
    """One level upward: each residual block takes one tensor from the way down; then the size of the next level."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        skips: list[jax.Array],
        temb: jax.Array,
        context: jax.Array,
        size: tuple[int, int] | None,
    ) -> jax.Array:
        for i in range(self.level.layers):
            x = self.attend(i, self.resnet(i, jnp.concatenate([x, skips[-1 - i]], -1), temb), context)
        if size is None:
            return x
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Upsample(self.level.channels, **dtypes, name="upsamplers_0")(x, size)
