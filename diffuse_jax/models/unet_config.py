"""Configuration of what ControlNets copy from a UNet: conditioning, downward path and middle block."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

from diffuse_jax.allowed import Index, Layers, Levels, Share, Signed
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
}

MIDDLES = tuple(kind for kind in HAS_ATTENTION if "Mid" in kind)


class Level(NamedTuple):
    """One resolution of the UNet."""

    channels: int
    layers: int
    heads: int
    depth: int  # transformer blocks after each residual block; 0 where there is no attention
    only_cross_attention: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(Config):
    """JSON fields that UNets and ControlNets share; a field that may differ by level is one value or one per level.

    ``num_attention_heads`` is what the JSON calls ``attention_head_dim``, a misnomer in every published file.
    ``cross_attention_dim`` is the width of the prompt embeddings.
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
    transformer_layers_per_block: Layers | tuple[Layers | tuple[Layers, ...], ...] = 1
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
        known = sorted(
            kind for kind in HAS_ATTENTION if direction in kind and (self.may_have_k_blocks or kind[0] != "K")
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
        return self._levels(self.down_block_types, "transformer_layers_per_block")

    def mid_level(self) -> Level:
        """The middle block: like the coarsest level, with attention if ``mid_block_type`` has it."""
        depths = self.per_level("transformer_layers_per_block")
        level = self.down_levels()[-1]
        attends = self.mid_block_type is not None and HAS_ATTENTION[self.mid_block_type]
        return level._replace(layers=1, depth=depths[-1] if attends else 0, only_cross_attention=False)

    def _levels(self, kinds: tuple[str, ...], name: str, *, reverse: bool = False) -> list[Level]:
        """Levels of these kinds, finest first, with the depths of the field ``name`` (``reverse``: coarsest first)."""
        depths = self.per_level(name)
        depths = depths[::-1] if reverse else depths
        if not all(isinstance(depth, int) for depth in depths):
            raise ValueError(
                f"{self.class_name}: {name} must be one number or one per level, got "
                f"{thaw(depths)}; one number per block of a level is not supported"
            )
        rows = zip(
            self.block_out_channels,
            self.per_level("layers_per_block"),
            self.per_level("num_attention_heads"),
            [d if HAS_ATTENTION[k] else 0 for d, k in zip(depths, kinds, strict=True)],
            self.per_level("only_cross_attention"),
            strict=True,
        )
        return [Level(*row) for row in rows]

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

    may_have_k_blocks: ClassVar[bool] = False

    @property
    def has_k_blocks(self) -> bool:
        """Whether the levels are those of k-diffusion, :mod:`diffuse_jax.models.k_blocks`."""
        return "K" in {kind[0] for kind in self.down_block_types}

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
    def text_width(self) -> int:
        """Width of the prompt embeddings."""
        return max(self.per_level("cross_attention_dim"))
