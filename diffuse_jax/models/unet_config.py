"""Configuration of what ControlNets copy from a UNet: conditioning, downward path and middle block."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

from diffuse_jax.allowed import Depth, Index, Layers, Levels, Share, Signed
from diffuse_jax.config import NOT_QUANTIZED, Config, thaw

HAS_ATTENTION = {
    "DownBlock2D": False,
    "UpBlock2D": False,
    "UNetMidBlock2D": False,
    "CrossAttnDownBlock2D": True,
    "CrossAttnUpBlock2D": True,
    "UNetMidBlock2DCrossAttn": True,
    "KDownBlock2D": False,
    "KUpBlock2D": False,
    "KCrossAttnDownBlock2D": True,
    "KCrossAttnUpBlock2D": True,
    "ResnetDownsampleBlock2D": False,
    "ResnetUpsampleBlock2D": False,
    "SimpleCrossAttnDownBlock2D": True,
    "SimpleCrossAttnUpBlock2D": True,
    "UNetMidBlock2DSimpleCrossAttn": True,
}

JOINT = frozenset(kind for kind in HAS_ATTENTION if "Simple" in kind or "sample" in kind)
"""Blocks that change resolution in residual blocks and attend to pixels and prompt at once (DeepFloyd IF)."""

HINT_CHANNELS = 4
"""Channels that a hint adds to the sample, ``addition_embed_type="image_hint"``."""

MIDDLES = tuple(kind for kind in HAS_ATTENTION if "Mid" in kind)


class Level(NamedTuple):
    """One resolution of the UNet."""

    channels: int
    layers: int
    heads: int
    depths: tuple[int, ...]  # transformer blocks after each residual block; empty where there is no attention
    only_cross_attention: bool
    joint: bool = False  # of the kinds in JOINT


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(Config):
    """JSON fields that UNets and ControlNets share; a field that may differ by level is one value or one per level.

    ``num_attention_heads`` is what the JSON calls ``attention_head_dim``, a misnomer in every published file.
    ``cross_attention_dim`` is the width of the prompt embeddings. An entry of ``transformer_layers_per_block`` is one
    number, or one for each residual block of the level; the middle block has the last entry's first.
    """

    fixed: ClassVar[Mapping[str, Any]] = {
        **NOT_QUANTIZED,
        "mid_block_scale_factor": 1,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "addition_embed_type_num_heads": "of addition_embed_type='text', which is refused",
    }

    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "addition_embed_type": (None, "text_time"),
        "resnet_time_scale_shift": ("default", "scale_shift"),
    }
    """Field -> implemented values."""

    in_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: Signed = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: Levels = (320, 640, 1280, 1280)
    layers_per_block: Layers | tuple[Layers, ...] = 2
    downsample_padding: Index = 1
    act_fn: str = "silu"
    norm_num_groups: int | None = 32
    norm_eps: Share = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: Depth | tuple[Depth | tuple[Depth, ...], ...] = 1
    num_attention_heads: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: int | None = None
    upcast_attention: bool = False
    resnet_time_scale_shift: str = "default"
    projection_class_embeddings_input_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        data = dict(data)
        heads = data.pop("attention_head_dim", 8)
        if data.get("num_attention_heads") is None:
            data["num_attention_heads"] = heads
        try:
            return super().from_json(data)
        except ValueError as error:
            if "num_attention_heads" not in str(error):
                raise
            raise ValueError(f"{error} (files call it attention_head_dim)") from error

    def to_json(self) -> dict[str, Any]:
        data = super().to_json()
        return data | {"attention_head_dim": data["num_attention_heads"], "num_attention_heads": None}

    def _check(self) -> None:
        network = self.class_name
        for name, allowed in self.choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{network}: {name}={getattr(self, name)!r}; expected one of {allowed}")
        sizes = ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
        if self.addition_embed_type == "text_time" and not all(getattr(self, name) for name in sizes):
            raise ValueError(f"{network}: addition_embed_type='text_time' needs {sizes[0]} and {sizes[1]}")
        self.check_blocks("down_block_types", "Down")
        self.down_levels()
        if self.norm_num_groups is None and not self.has_k_blocks:
            raise ValueError(f"{network}: norm_num_groups must be a whole number, got null; only K blocks go without")

    def check_blocks(self, name: str, direction: str) -> None:
        """Raise ``ValueError`` unless the field ``name`` has one known kind of block ("Down" or "Up") per level."""
        kinds, levels = getattr(self, name), len(self.block_out_channels)
        plain = {kind for kind in HAS_ATTENTION if kind[0] != "K" and kind not in JOINT}
        known = sorted(
            kind for kind in HAS_ATTENTION if direction in kind and (self.may_have_any_block or kind in plain)
        )
        unknown = sorted(set(kinds) - set(known))
        if unknown:
            raise ValueError(f"{self.class_name}: unknown block type {unknown[0]!r} in {name}; known: {known}")
        if len(kinds) != levels:
            raise ValueError(
                f"{self.class_name}: {name} has {len(kinds)} entries for {levels} levels of block_out_channels"
            )

    def down_levels(self) -> list[Level]:
        """The levels of the downward path, finest first."""
        return self.with_heads(self.levels(self.down_block_types, "transformer_layers_per_block"))

    def mid_level(self) -> Level:
        """The middle block: like the coarsest level, with attention if ``mid_block_type`` has it."""
        name, kind = "transformer_layers_per_block", self.mid_block_type
        attends, joint = kind is not None and HAS_ATTENTION[kind], kind in JOINT
        depth = 1 if joint else self.per_level(name)[-1]
        only = self.mid_block_only_cross_attention
        if only is None:
            only = self.only_cross_attention is True
        level = Level(
            self.block_out_channels[-1],
            1,
            self.per_level("num_attention_heads")[-1],
            self._depths(name, depth, 1) if attends else (),
            joint and only,
            joint,
        )
        return self.with_heads([level], -1)[0]

    def with_heads(self, levels: list[Level], first: int = 0) -> list[Level]:
        """The levels, with the number of heads for which ``attention_head_dim`` of joint attention is the width.

        That field is read in the order of the downward path from ``first``, as PyTorch diffusers reads it for both
        paths.
        """
        dims = self.per_level("num_attention_heads")[first:]
        for level, dim in zip(levels, dims, strict=True):
            if level.joint and level.depths and level.channels % dim:
                raise ValueError(
                    f"{self.class_name}: {level.channels} channels cannot be split into heads of {dim} "
                    "(attention_head_dim)"
                )
        return [
            level._replace(heads=level.channels // dim) if level.joint and level.depths else level
            for level, dim in zip(levels, dims, strict=True)
        ]

    def levels(
        self, kinds: tuple[str, ...], depths: str, *, coarsest_first: bool = False, more: int = 0
    ) -> list[Level]:
        """The levels with blocks of these kinds, in their order.

        Args:
          kinds: the type of block of each level.
          depths: the field with the numbers of transformer blocks; in the order of ``kinds`` if it differs by level.
          coarsest_first: the order of ``kinds``; fields other than ``depths`` are in the opposite one.
          more: how many residual blocks each level has beyond ``layers_per_block``.
        """
        order = -1 if coarsest_first else 1
        names = ("block_out_channels", "layers_per_block", "num_attention_heads", "only_cross_attention")
        fields = [self.per_level(name)[::order] for name in names]
        transformers = lambda kind, depth, n: self._depths(depths, 1 if kind in JOINT else depth, n)
        return [
            Level(
                width,
                n + more,
                heads,
                transformers(kind, depth, n + more) if HAS_ATTENTION[kind] else (),
                only,
                kind in JOINT,
            )
            for kind, depth, width, n, heads, only in zip(kinds, self.per_level(depths), *fields, strict=True)
        ]

    def _depths(self, name: str, depth: int | tuple[int, ...], blocks: int) -> tuple[int, ...]:
        """An entry of the field ``name`` as one number per residual block; like diffusers it may have more."""
        depths = (depth,) * blocks if isinstance(depth, int) else depth[:blocks]
        if len(depths) < blocks:
            raise ValueError(
                f"{self.class_name}: {name} has {thaw(depth)} for a level of {blocks} residual blocks; expected one "
                f"number, or {blocks}"
            )
        return depths

    def per_level(self, name: str) -> tuple[Any, ...]:
        """The field ``name`` as one value per level."""
        value, n = getattr(self, name), len(self.block_out_channels)
        if not isinstance(value, tuple):
            return (value,) * n
        if len(value) != n:
            raise ValueError(f"{self.class_name}: {name} has {len(value)} entries for {n} levels of block_out_channels")
        return value

    @property
    def time_embed_dim(self) -> int:
        """Width of the embedding of timestep, classes and other non-spatial conditioning."""
        return 4 * self.block_out_channels[0]

    may_have_any_block: ClassVar[bool] = False

    @property
    def has_k_blocks(self) -> bool:
        """Whether the levels are those of k-diffusion, :mod:`diffuse_jax.models.k_blocks`."""
        return "K" in {kind[0] for kind in self.down_block_types}

    @property
    def has_joint_attention(self) -> bool:
        """Whether a block is one of :data:`JOINT`, whose resolution cannot be odd before it is halved."""
        return not JOINT.isdisjoint({*self.down_block_types, self.mid_block_type})

    @property
    def divisor(self) -> int:
        """How many pixels of the sample along an edge become one of the coarsest level."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def groups(self) -> int:
        """``norm_num_groups`` of blocks that need it."""
        return self.norm_num_groups or 0

    @property
    def time_embedding_type(self) -> str:
        """ "positional", or in UNets "fourier"."""
        return "positional"

    @property
    def timestep_post_act(self) -> str | None:
        """Activation after the embedding of the timestep; in UNets only."""
        return None

    @property
    def time_cond_proj_dim(self) -> int | None:
        """Width of LCM's embedded guidance scale; UNets may have one, ControlNets do not."""
        return None

    @property
    def class_embeddings_concat(self) -> bool:
        """Whether class embeddings are concatenated to the timestep's instead of added; in UNets only."""
        return False

    @property
    def mid_block_scale_factor(self) -> float:
        """What sums of the middle's residual blocks are divided by; the following eight are in UNets only."""
        return 1.0

    @property
    def resnet_out_scale_factor(self) -> float:
        """The same of the other residual blocks, in the levels of :data:`JOINT`."""
        return 1.0

    @property
    def resnet_skip_time_act(self) -> bool:
        """Whether residual blocks of :data:`JOINT` take the embedding of the timestep without activation."""
        return False

    @property
    def cross_attention_norm(self) -> str | None:
        """Norm of the prompt embeddings in joint attention."""
        return None

    @property
    def mid_block_only_cross_attention(self) -> bool | None:
        """Whether joint attention in the middle reads the prompt alone; None for what all levels do."""
        return None

    @property
    def time_embedding_act_fn(self) -> str | None:
        """Activation after the sum of all embeddings."""
        return None

    @property
    def projection(self) -> str | None:
        """How the prompt's sequence comes from what is given: "text_proj", "image_proj", "text_image_proj"."""
        return None

    @property
    def encoder_hid_dim(self) -> int | None:
        """Width of what is projected to the prompt's sequence."""
        return None

    @property
    def addition_embed_type_num_heads(self) -> int:
        """Heads of the pooling of the prompt, ``addition_embed_type="text"``."""
        return 64

    @property
    def sample_channels(self) -> int:
        """Channels of the sample; the rest of ``in_channels`` come from the hint of ``"image_hint"``."""
        return self.in_channels - (HINT_CHANNELS if self.addition_embed_type == "image_hint" else 0)

    @property
    def text_width(self) -> int:
        """Width of the prompt embeddings."""
        return self.encoder_hid_dim or max(self.per_level("cross_attention_dim"))

    @property
    def reads_text(self) -> bool:
        """Whether there are prompt embeddings; without, attention reads projected images."""
        return self.projection != "image_proj"

    @property
    def image_width(self) -> int | None:
        """Width of the image embedding in ``added_cond_kwargs``; None without one."""
        if self.projection == "text_image_proj" or self.addition_embed_type == "text_image":
            return max(self.per_level("cross_attention_dim"))
        images = self.projection == "image_proj" or self.addition_embed_type in ("image", "image_hint")
        return self.encoder_hid_dim if images else None
