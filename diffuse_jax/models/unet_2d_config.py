"""The configuration of the pixel-space UNets, and what their types of block are."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

from diffuse_jax.allowed import Index, Layers, Levels, Positive, Share, Signed
from diffuse_jax.config import NO_DROPOUT, NOT_QUANTIZED, Config
from diffuse_jax.models.layers import ACTIVATIONS

KINDS = {
    "DownBlock2D": (False, "conv"),
    "UpBlock2D": (False, "conv"),
    "ResnetDownsampleBlock2D": (False, "resnet"),
    "ResnetUpsampleBlock2D": (False, "resnet"),
    "AttnDownBlock2D": (True, None),
    "AttnUpBlock2D": (True, None),
    "SkipDownBlock2D": (False, "skip"),
    "SkipUpBlock2D": (False, "skip"),
    "AttnSkipDownBlock2D": (True, "skip"),
    "AttnSkipUpBlock2D": (True, "skip"),
}
"""Block type -> whether it has attention, and how it resamples (None: by ``downsample_type`` or ``upsample_type``).
Blocks that resample by "skip" are those of NCSN++, with a path of images beside the features."""

SKIP_CHANNELS = 3
"""Channels of the images on that path."""

SKIP_ATTENTION_GROUPS = 32
"""Groups of the norm before attention in blocks with such a path, in every checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNet2DConfig(Config):
    """``config.json`` of a ``UNet2DModel``.

    ``time_embedding_type="learned"`` has a table of embeddings for ``num_train_timesteps`` integer timesteps; "fourier"
    is for timesteps that are noise levels, by which the output is divided. ``norm_num_groups=None`` is for NCSN++,
    whose norms have a group for four channels, at most 32. ``mid_block_scale_factor``: what sums in the middle block
    are divided by.
    ``attention_head_dim`` is the width of a head; None means a single head. ``attn_norm_num_groups`` is for the middle
    block's attention: None means ``norm_num_groups``, or with ``scale_shift`` no norm.
    """

    class_name: ClassVar[str] = "UNet2DModel"
    fixed: ClassVar[Mapping[str, Any]] = NOT_QUANTIZED
    harmless: ClassVar[Mapping[str, str]] = {
        "dropout": NO_DROPOUT,
    }

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: Signed = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D",) + ("AttnDownBlock2D",) * 3
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D",) * 3 + ("UpBlock2D",)
    block_out_channels: Levels = (224, 448, 672, 896)
    layers_per_block: Layers = 2
    mid_block_scale_factor: Positive = 1.0
    downsample_padding: Index = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: Share = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int | None = 32
    attn_norm_num_groups: int | None = None
    norm_eps: Share = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "mid_block_type": (None, "UNetMidBlock2D"),
            "time_embedding_type": ("positional", "learned", "fourier"),
            "downsample_type": ("conv", "resnet"),
            "upsample_type": ("conv", "resnet"),
            "resnet_time_scale_shift": ("default", "scale_shift"),
            "class_embed_type": (None, "timestep", "identity"),
            "act_fn": tuple(ACTIVATIONS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"UNet2DModel: {name}={getattr(self, name)!r}; expected one of {allowed}")
        learned = self.time_embedding_type == "learned"
        if learned and (self.num_train_timesteps is None or self.class_embed_type == "timestep"):
            raise ValueError(
                "UNet2DModel: time_embedding_type='learned' needs num_train_timesteps, no class_embed_type='timestep'"
            )
        for name, direction in (("down_block_types", "Down"), ("up_block_types", "Up")):
            kinds, known = getattr(self, name), sorted(kind for kind in KINDS if direction in kind)
            unknown = sorted(set(kinds) - set(known))
            if unknown:
                raise ValueError(f"UNet2DModel: unknown block type {unknown[0]!r} in {name}; known: {known}")
            if len(kinds) != len(self.block_out_channels):
                raise ValueError(
                    f"UNet2DModel: {name} has {len(kinds)} entries for {len(self.block_out_channels)} levels"
                )
        self.check_image_path()
        for width in sorted(self.attention_widths()):
            if width % (self.attention_head_dim or width):
                raise ValueError(
                    f"UNet2DModel: attention over {width} channels cannot be split into heads of width "
                    f"attention_head_dim={self.attention_head_dim}"
                )

    def check_image_path(self) -> None:
        """Check that blocks with a path of images are where the path leads: at the fine levels.

        Raises:
          ValueError: they are not, the channels are not those of images, or another block has no ``norm_num_groups``.
        """
        downs, ups = ([is_skip(kind) for kind in kinds] for kinds in (self.down_block_types, self.up_block_types))
        for name, skips in (("down_block_types", downs), ("up_block_types", ups[::-1])):
            if any(fine < coarse for fine, coarse in itertools.pairwise(skips)):
                raise ValueError(
                    f"UNet2DModel: {name}={getattr(self, name)}; blocks with Skip in their name must be at the finest "
                    "levels, without another block between them and the image"
                )
        for name, skips in (("in_channels", downs), ("out_channels", ups)):
            if any(skips) and getattr(self, name) != SKIP_CHANNELS:
                raise ValueError(
                    f"UNet2DModel: {name}={getattr(self, name)}; blocks with Skip in their name are for images of "
                    f"{SKIP_CHANNELS} channels"
                )
        if self.norm_num_groups is None and not all(downs + ups):
            raise ValueError(
                "UNet2DModel: norm_num_groups=None; blocks without Skip in their name need a number of groups"
            )

    def attention_widths(self) -> set[int]:
        """The channel counts of all attention layers."""
        levels = zip(self.block_out_channels, self.down_block_types, self.up_block_types[::-1], strict=True)
        widths = {channels for channels, down, up in levels if KINDS[down][0] or KINDS[up][0]}
        middle = self.mid_block_type is not None and self.add_attention
        return widths | ({self.block_out_channels[-1]} if middle else set())

    def groups(self, channels: int) -> int:
        """Groups of a norm outside of blocks with a path of images."""
        return self.norm_num_groups or quarter(channels)

    @property
    def time_embed_dim(self) -> int:
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def has_classes(self) -> bool:
        """Whether the network takes ``class_labels``."""
        return self.class_embed_type is not None or self.num_class_embeds is not None

    @property
    def class_count(self) -> int | None:
        """The number of classes that labels are indices of; None where labels are real numbers, or none are taken."""
        return self.num_class_embeds if self.class_embed_type is None else None

    @property
    def label_shape(self) -> tuple[int, ...]:
        """The shape of a label."""
        return (self.time_embed_dim,) if self.class_embed_type == "identity" else ()


def is_skip(kind: str) -> bool:
    """Whether a type of block has a path of images."""
    return KINDS[kind][1] == "skip"


def quarter(channels: int) -> int:
    """Groups of NCSN++'s norms: one for four channels, at most 32."""
    return min(channels // 4, 32)
