"""The text-conditioned UNet of Stable Diffusion 1.x, 2.x and XL (Rombach et al. 2022; Podell et al. 2023)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffuse_jax.allowed import MAX_REPEATED, Range, Share
from diffuse_jax.config import NO_DROPOUT, NOT_QUANTIZED, Config, thaw
from diffuse_jax.models import k_blocks
from diffuse_jax.models.joint_attention import NORM_GROUPS
from diffuse_jax.models.k_blocks import GROUP, KLevel
from diffuse_jax.models.layers import ACTIVATIONS, Conv, GroupNorm
from diffuse_jax.models.one_file import OneFile
from diffuse_jax.models.remat import check_policy, remat_level
from diffuse_jax.models.text_mask import masked_text
from diffuse_jax.models.unet_blocks import UpBlock, add_residuals
from diffuse_jax.models.unet_config import HAS_ATTENTION, HINT_CHANNELS, MIDDLES, EncoderConfig, Level
from diffuse_jax.models.unet_encoder import EncoderModel

Scale = Annotated[float, Range(1e-3, 1e3)]
UpDepth = Annotated[int, Range(0, 64)]  # not Repeats: a UNet has either this or the mirrored downward path, not both


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNet2DConditionConfig(EncoderConfig):
    """``config.json`` of a ``UNet2DConditionModel``; a field that may differ by level is one value or one per level.

    ``num_attention_heads`` is what the JSON calls ``attention_head_dim``, a misnomer in every published file.
    ``cross_attention_dim`` is the width of the prompt embeddings, ``sample_size`` the edge of the latents. An entry of
    ``transformer_layers_per_block`` is one number, or one for each residual block of the level; in the upward path,
    coarsest level first, ``reverse_transformer_layers_per_block`` takes its place if it is not None.
    """

    class_name: ClassVar[str] = "UNet2DConditionModel"
    fixed: ClassVar[Mapping[str, Any]] = {
        **NOT_QUANTIZED,
        "dual_cross_attention": False,
        "attention_type": "default",
    }
    harmless: ClassVar[Mapping[str, str]] = {"dropout": NO_DROPOUT}
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **EncoderConfig.choices,
        "mid_block_type": (None, *MIDDLES),
        "class_embed_type": (None, "timestep", "identity", "projection", "simple_projection"),
        "act_fn": tuple(ACTIVATIONS),
        "time_embedding_type": ("positional", "fourier"),
        "timestep_post_act": (None, *ACTIVATIONS),
        "time_embedding_act_fn": (None, *ACTIVATIONS),
        "addition_embed_type": (None, "text_time", "text", "text_image", "image", "image_hint"),
        "encoder_hid_dim_type": (None, "text_proj", "image_proj", "text_image_proj"),
        "cross_attention_norm": (None, "layer_norm", "group_norm"),
    }

    sample_size: int | tuple[int, int] | None = None
    out_channels: int = 4
    center_input_sample: bool = False
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    dropout: Share = 0.0
    reverse_transformer_layers_per_block: tuple[UpDepth | tuple[UpDepth, ...], ...] | None = None
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    timestep_post_act: str | None = None
    time_cond_proj_dim: int | None = None
    conv_in_kernel: Annotated[int, Range(1, 31)] = 3
    conv_out_kernel: Annotated[int, Range(1, 31)] = 3
    class_embeddings_concat: bool = False
    mid_block_scale_factor: Scale = 1.0
    mid_block_only_cross_attention: bool | None = None
    resnet_out_scale_factor: Scale = 1.0
    resnet_skip_time_act: bool = False
    cross_attention_norm: str | None = None
    time_embedding_act_fn: str | None = None
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    addition_embed_type_num_heads: int = 64

    def _check(self) -> None:
        super()._check()
        self.check_blocks("up_block_types", "Up")
        name = self.class_name
        if self.time_embedding_type == "fourier" and (self.class_embed_type == "timestep" or self.time_embed_dim % 2):
            raise ValueError(f"{name}: time_embedding_type='fourier' needs an even width and other class_embed_type")
        if len({kind[0] == "K" for kind in (*self.down_block_types, *self.up_block_types)}) > 1:
            raise ValueError(f"{name}: blocks of k-diffusion (K...) do not go together with others")
        self._check_conditions()
        if self.has_k_blocks:
            self._check_k_blocks()
        elif sum(sum(level.depths) for level in self.up_levels()) > MAX_REPEATED:
            raise ValueError(f"{name}: the upward path has more than {MAX_REPEATED} transformer blocks")

    def _check_conditions(self) -> None:
        """The combinations of the blocks and conditions of IF and Kandinsky that have consistent shapes."""
        name, added, projection = self.class_name, self.addition_embed_type, self.projection
        if (projection or added in ("image", "image_hint")) and self.encoder_hid_dim is None:
            what = f"encoder_hid_dim_type={projection!r}" if projection else f"addition_embed_type={added!r}"
            raise ValueError(f"{name}: {what} needs encoder_hid_dim")
        if (projection or added == "text_image") and isinstance(self.cross_attention_dim, tuple):
            raise ValueError(f"{name}: cross_attention_dim must be one number, got {thaw(self.cross_attention_dim)}")
        if projection == "image_proj" and added not in ("image", "image_hint", None):
            raise ValueError(f"{name}: encoder_hid_dim_type='image_proj' has no text for addition_embed_type={added!r}")
        if added == "text" and self.text_width % self.addition_embed_type_num_heads:
            raise ValueError(
                f"{name}: prompt embeddings of {self.text_width} cannot be split into "
                f"addition_embed_type_num_heads={self.addition_embed_type_num_heads}"
            )
        if self.sample_channels < 1:
            raise ValueError(
                f"{name}: addition_embed_type='image_hint' needs in_channels of {HINT_CHANNELS + 1} or more, got "
                f"{self.in_channels}"
            )
        if self.cross_attention_norm == "group_norm" and any(
            dim % NORM_GROUPS for dim in self.per_level("cross_attention_dim")
        ):
            raise ValueError(
                f"{name}: cross_attention_norm='group_norm' needs cross_attention_dim to be a multiple of "
                f"{NORM_GROUPS}, got {thaw(self.cross_attention_dim)}"
            )
        widths = {level.channels for level in (*self.down_levels(), *self.up_levels()) if level.joint and level.depths}
        if self.cross_attention_norm == "layer_norm" and widths - {*self.per_level("cross_attention_dim")}:
            raise ValueError(
                f"{name}: cross_attention_norm='layer_norm' needs cross_attention_dim "
                f"{thaw(self.cross_attention_dim)} to be the width of the levels with attention, {sorted(widths)}"
            )

    def _check_k_blocks(self) -> None:
        """The combinations for which PyTorch diffusers has consistent shapes."""
        channels, heads = self.block_out_channels, self.per_level("num_attention_heads")
        own = self.time_embed_dim * (1 + self.class_embeddings_concat)
        coarse = (len(channels) > 1, self.mid_block_type is None, channels[-2:] == (own, own))
        attends = (
            self.down_block_types[-1] == "KCrossAttnDownBlock2D" and self.up_block_types[0] == "KCrossAttnUpBlock2D"
        )
        again = own in channels[:-2] or (own == channels[0] and HAS_ATTENTION[self.up_block_types[-1]])
        if not all(coarse) or not attends or again:
            raise ValueError(
                f"{self.class_name}: K blocks need two levels or more, attention at the coarsest, no mid_block_type, "
                f"and only the two coarsest levels as wide as the embedding of the timestep ({own}), got {channels}"
            )
        if any(c % GROUP for c in channels) or any(c % dim for c in channels for dim in heads):
            raise ValueError(
                f"{self.class_name}: block_out_channels of K blocks must be multiples of {GROUP} and of "
                f"attention_head_dim {heads}, got {channels}"
            )

    def k_levels(self) -> tuple[tuple[KLevel, ...], tuple[KLevel, ...]]:
        """Downward and upward path of a UNet with K blocks; ``attention_head_dim`` is the width of their heads."""
        sizes = (self.block_out_channels, self.per_level("layers_per_block"), self.per_level("num_attention_heads"))
        attends = lambda kinds: tuple(HAS_ATTENTION[kind] for kind in kinds)
        down = k_blocks.down_levels(*sizes, attends(self.down_block_types))
        return tuple(down), tuple(k_blocks.up_levels(*sizes, attends(self.up_block_types)))

    def up_levels(self) -> list[Level]:
        """The levels of the upward path, coarsest first; each has one residual block more than in the downward path."""
        if self.reverse_transformer_layers_per_block is not None:
            name = "reverse_transformer_layers_per_block"
            return self.with_heads(self.levels(self.up_block_types, name, coarsest_first=True, more=1))
        name = "transformer_layers_per_block"
        if any(isinstance(depth, tuple) for depth in self.per_level(name)):
            raise ValueError(
                f"{self.class_name}: {name} differs within a level, so reverse_{name} must say what the upward path "
                "has: one entry per level, coarsest first"
            )
        return self.with_heads(self.levels(self.up_block_types[::-1], name, more=1)[::-1])

    may_have_any_block: ClassVar[bool] = True

    @property
    def projection(self) -> str | None:
        return self.encoder_hid_dim_type or ("text_proj" if self.encoder_hid_dim else None)

    @property
    def time_embed_dim(self) -> int:
        ratio = 2 if self.time_embedding_type == "fourier" else 4
        return self.time_embedding_dim or ratio * self.block_out_channels[0]


class UNet2DConditionModel(OneFile, EncoderModel):
    """Predicts noise (or velocity, or the sample) from a noisy sample, a timestep and prompt embeddings.

    Covers SD 1.x, 2.x, SDXL base and refiner, the inpainting, InstructPix2Pix and depth variants (more input channels),
    the x4 upscaler (class labels, ``only_cross_attention``), the x2 latent upscaler (blocks of k-diffusion), LCM
    (``timestep_cond``), and the pixel networks of DeepFloyd IF and decoders of Kandinsky (joint attention, image
    embeddings and hints in ``added_cond_kwargs``). Dropout is never applied: ``config.dropout`` is only kept to be
    saved again.
    """

    config: UNet2DConditionConfig = UNet2DConditionConfig()
    config_class: ClassVar[type[Config]] = UNet2DConditionConfig

    @nn.compact
    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array,
        encoder_hidden_states: jax.Array | None = None,
        added_cond_kwargs: Mapping[str, jax.Array] | None = None,
        class_labels: jax.Array | None = None,
        timestep_cond: jax.Array | None = None,
        *,
        encoder_attention_mask: jax.Array | None = None,
        down_block_additional_residuals: Sequence[jax.Array] | None = None,
        mid_block_additional_residual: jax.Array | None = None,
        down_intrablock_additional_residuals: Sequence[jax.Array] | None = None,
    ) -> jax.Array:
        """One evaluation of the network.

        Args:
          sample: ``[B,h,w,in_channels]``; four channels fewer with a hint.
          timesteps: ``[B]`` or a scalar, in units of the training schedule (0 to 999).
          encoder_hidden_states: ``[B,L,D]`` prompt embeddings; ``D`` is ``encoder_hid_dim`` where it is set, else
            ``cross_attention_dim``. None where images take their place (``encoder_hid_dim_type="image_proj"``).
          added_cond_kwargs: for SDXL ``{"text_embeds": [B,1280], "time_ids": [B,6]}`` (5 ids in the refiner); for
            Kandinsky 2.1 ``{"text_embeds": [B,D], "image_embeds": [B,D]}``, for 2.2 ``{"image_embeds": [B,D]}``, with a
            hint also ``{"hint": [B,8h,8w,3]}``.
          class_labels: ``[B]`` noise levels for the upscaler, or ``[B,D]`` for projected classes.
          timestep_cond: ``[B,time_cond_proj_dim]``, LCM's embedded guidance scale.
          encoder_attention_mask: bool ``[B,L]``, true where a token of the prompt may be attended to; all of them if
            None.
          down_block_additional_residuals: what a ControlNet adds to the skip connections, finest first: one array for
            each, of the same shape or ``[B,1,1,C]``.
          mid_block_additional_residual: the same for the output of the middle block.
          down_intrablock_additional_residuals: what a T2I-Adapter adds inside the downward path, one array for each of
            the first levels, finest first; one more is added to the output of the middle block.

        Returns: ``[B,h,w,out_channels]`` in ``dtype``.

        Raises:
          ValueError: the channels of ``sample``, the conditioning, its mask or the residuals do not match the
            configuration.
        """
        c = self.config
        check_policy(self.remat)
        self.check_inputs(sample, encoder_hidden_states, added_cond_kwargs)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        temb, hint = self.embed_conditions(
            sample.shape[0], timesteps, added_cond_kwargs, class_labels, timestep_cond, encoder_hidden_states
        )
        context = self.context(encoder_hidden_states, added_cond_kwargs)
        mask = encoder_attention_mask
        if mask is not None and mask.shape != context.shape[:2]:
            raise ValueError(f"encoder_attention_mask must be {context.shape[:2]}, got {mask.shape}")
        x = jnp.asarray(sample, self.dtype)
        if c.center_input_sample:
            x = 2 * x - 1
        x = x if hint is None else jnp.concatenate([x, hint], -1)

        padding = (c.conv_in_kernel - 1) // 2
        x = Conv(c.block_out_channels[0], c.conv_in_kernel, padding=padding, **dtypes, name="conv_in")(x)
        residuals = (
            down_block_additional_residuals,
            mid_block_additional_residual,
            down_intrablock_additional_residuals,
        )
        if not c.has_k_blocks:
            with masked_text(mask):
                x = self.levels(x, temb, context, *residuals)
        elif any(each is not None for each in residuals):
            raise ValueError("a UNet of K blocks has no places for the residuals of a ControlNet or T2I-Adapter")
        else:
            down, up = c.k_levels()
            levels = k_blocks.KLevels(c.norm_eps, c.act_fn, **dtypes, down=down, up=up, remat=self.remat, name=None)
            nn.share_scope(self, levels)
            with masked_text(mask):
                x = levels(x, temb, context)

        if c.norm_num_groups is not None:
            x = GroupNorm(c.norm_num_groups, c.norm_eps, **dtypes, name="conv_norm_out")(x)
            x = ACTIVATIONS[c.act_fn](x)
        padding = (c.conv_out_kernel - 1) // 2
        return Conv(c.out_channels, c.conv_out_kernel, padding=padding, **dtypes, name="conv_out")(x)

    def levels(
        self,
        x: jax.Array,
        temb: jax.Array,
        context: jax.Array,
        down_block_additional_residuals: Sequence[jax.Array] | None,
        mid_block_additional_residual: jax.Array | None,
        down_intrablock_additional_residuals: Sequence[jax.Array] | None,
    ) -> jax.Array:
        """From the output of ``conv_in`` to that of the upward path, both ``[B,h,w,C]``."""
        c = self.config
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        skips, x = self.encode(x, temb, context, down_intrablock_additional_residuals or ())
        if down_block_additional_residuals is not None:
            skips = add_residuals(skips, down_block_additional_residuals, "down_block_additional_residuals")
        if mid_block_additional_residual is not None:
            (x,) = add_residuals([x], [mid_block_additional_residual], "mid_block_additional_residual")

        up = c.up_levels()
        up_block = remat_level(UpBlock, self.remat, static_argnums=(5,))
        for i, level in enumerate(up):
            taken, skips = skips[-level.layers :], skips[: -level.layers]
            size = None if i + 1 == len(up) else skips[-1].shape[1:3]
            block = up_block(c, level, **dtypes, remat=self.remat, name=f"up_blocks_{i}")
            x = block(x, taken, temb, context, size)
        return x
