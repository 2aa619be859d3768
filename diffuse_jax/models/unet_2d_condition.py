"""The text-conditioned UNet of Stable Diffusion 1.x, 2.x and XL (Rombach et al. 2022; Podell et al. 2023)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffuse_jax.allowed import Range, Share
from diffuse_jax.config import NO_DROPOUT, Config
from diffuse_jax.models import k_blocks
from diffuse_jax.models.k_blocks import GROUP, KLevel
from diffuse_jax.models.layers import ACTIVATIONS, Conv, GroupNorm
from diffuse_jax.models.one_file import OneFile
from diffuse_jax.models.remat import check_policy, remat_level
from diffuse_jax.models.unet_blocks import UpBlock, add_residuals
from diffuse_jax.models.unet_config import HAS_ATTENTION, MIDDLES, EncoderConfig, Level
from diffuse_jax.models.unet_encoder import EncoderModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNet2DConditionConfig(EncoderConfig):
    """``config.json`` of a ``UNet2DConditionModel``; a field that may differ by level is one value or one per level.

    ``num_attention_heads`` is what the JSON calls ``attention_head_dim``, a misnomer in every published file.
    ``cross_attention_dim`` is the width of the prompt embeddings, ``sample_size`` the edge of the latents.
    """

    class_name: ClassVar[str] = "UNet2DConditionModel"
    fixed: ClassVar[Mapping[str, Any]] = {
        **EncoderConfig.fixed,
        "dual_cross_attention": False,
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_act_fn": None,
        "attention_type": "default",
        "cross_attention_norm": None,
    }
    harmless: ClassVar[Mapping[str, str]] = {
        **EncoderConfig.harmless,
        "mid_block_only_cross_attention": "of mid_block_type='UNetMidBlock2DSimpleCrossAttn', which is refused",
        "dropout": NO_DROPOUT,
    }
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **EncoderConfig.choices,
        "mid_block_type": (None, *MIDDLES),
        "class_embed_type": (None, "timestep", "identity", "projection", "simple_projection"),
        "act_fn": tuple(ACTIVATIONS),
        "time_embedding_type": ("positional", "fourier"),
        "timestep_post_act": (None, *ACTIVATIONS),
    }

    sample_size: int | tuple[int, int] | None = None
    out_channels: int = 4
    center_input_sample: bool = False
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    dropout: Share = 0.0
    reverse_transformer_layers_per_block: tuple[Annotated[int, Range(1, 64)], ...] | None = None
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    timestep_post_act: str | None = None
    time_cond_proj_dim: int | None = None
    conv_in_kernel: Annotated[int, Range(1, 31)] = 3
    conv_out_kernel: Annotated[int, Range(1, 31)] = 3
    class_embeddings_concat: bool = False

    def _check(self) -> None:
        super()._check()
        self.check_blocks("up_block_types", "Up")
        name = self.class_name
        if self.time_embedding_type == "fourier" and (self.class_embed_type == "timestep" or self.time_embed_dim % 2):
            raise ValueError(f"{name}: time_embedding_type='fourier' needs an even width and other class_embed_type")
        if len({kind[0] == "K" for kind in (*self.down_block_types, *self.up_block_types)}) > 1:
            raise ValueError(f"{name}: blocks of k-diffusion (K...) do not go together with others")
        if self.has_k_blocks:
            self._check_k_blocks()

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
        depth = self.reverse_transformer_layers_per_block
        name = "transformer_layers_per_block" if depth is None else "reverse_transformer_layers_per_block"
        levels = self._levels(self.up_block_types[::-1], name, reverse=depth is not None)[::-1]
        return [level._replace(layers=level.layers + 1) for level in levels]

    may_have_k_blocks: ClassVar[bool] = True

    @property
    def time_embed_dim(self) -> int:
        ratio = 2 if self.time_embedding_type == "fourier" else 4
        return self.time_embedding_dim or ratio * self.block_out_channels[0]


class UNet2DConditionModel(OneFile, EncoderModel):
    """Predicts noise (or velocity, or the sample) from a noisy sample, a timestep and prompt embeddings.

    Covers SD 1.x, 2.x, SDXL base and refiner, the inpainting, InstructPix2Pix and depth variants (more input channels),
    the x4 upscaler (class labels, ``only_cross_attention``), the x2 latent upscaler (blocks of k-diffusion) and LCM
    (``timestep_cond``). Dropout is never applied:
    ``config.dropout`` is only kept to be saved again.
    """

    config: UNet2DConditionConfig = UNet2DConditionConfig()
    config_class: ClassVar[type[Config]] = UNet2DConditionConfig

    @nn.compact
    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array,
        encoder_hidden_states: jax.Array,
        added_cond_kwargs: Mapping[str, jax.Array] | None = None,
        class_labels: jax.Array | None = None,
        timestep_cond: jax.Array | None = None,
        *,
        down_block_additional_residuals: Sequence[jax.Array] | None = None,
        mid_block_additional_residual: jax.Array | None = None,
        down_intrablock_additional_residuals: Sequence[jax.Array] | None = None,
    ) -> jax.Array:
        """One evaluation of the network.

        Args:
          sample: ``[B,h,w,in_channels]``.
          timesteps: ``[B]`` or a scalar, in units of the training schedule (0 to 999).
          encoder_hidden_states: ``[B,L,cross_attention_dim]`` prompt embeddings.
          added_cond_kwargs: for SDXL ``{"text_embeds": [B,1280], "time_ids": [B,6]}`` (5 ids in the refiner).
          class_labels: ``[B]`` noise levels for the upscaler, or ``[B,D]`` for projected classes.
          timestep_cond: ``[B,time_cond_proj_dim]``, LCM's embedded guidance scale.
          down_block_additional_residuals: what a ControlNet adds to the skip connections, finest first: one array for
            each, of the same shape or ``[B,1,1,C]``.
          mid_block_additional_residual: the same for the output of the middle block.
          down_intrablock_additional_residuals: what a T2I-Adapter adds inside the downward path, one array for each of
            the first levels, finest first; one more is added to the output of the middle block.

        Returns: ``[B,h,w,out_channels]`` in ``dtype``.

        Raises:
          ValueError: the channels of ``sample``, the conditioning or the residuals do not match the configuration.
        """
        c = self.config
        check_policy(self.remat)
        self.check_inputs(sample, encoder_hidden_states)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        temb = self.embed_conditions(sample.shape[0], timesteps, added_cond_kwargs, class_labels, timestep_cond)
        context = jnp.asarray(encoder_hidden_states, self.dtype)
        x = jnp.asarray(sample, self.dtype)
        if c.center_input_sample:
            x = 2 * x - 1

        padding = (c.conv_in_kernel - 1) // 2
        x = Conv(c.block_out_channels[0], c.conv_in_kernel, padding=padding, **dtypes, name="conv_in")(x)
        residuals = (
            down_block_additional_residuals,
            mid_block_additional_residual,
            down_intrablock_additional_residuals,
        )
        if not c.has_k_blocks:
            x = self.levels(x, temb, context, *residuals)
        elif any(each is not None for each in residuals):
            raise ValueError("a UNet of K blocks has no places for the residuals of a ControlNet or T2I-Adapter")
        else:
            down, up = c.k_levels()
            levels = k_blocks.KLevels(c.norm_eps, c.act_fn, **dtypes, down=down, up=up, remat=self.remat, name=None)
            nn.share_scope(self, levels)
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
