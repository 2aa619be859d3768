"""The levels of the pixel-space UNets."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.models.attention import SpatialAttention
from diffuse_jax.models.layers import Conv, GroupNorm
from diffuse_jax.models.remat import remat_block
from diffuse_jax.models.resampling import smooth_down, smooth_up
from diffuse_jax.models.resnet import Downsample, ResnetBlock, Upsample
from diffuse_jax.models.unet_2d_config import KINDS, SKIP_ATTENTION_GROUPS, SKIP_CHANNELS, UNet2DConfig, quarter


class Block(nn.Module):
    """Base class of the three kinds of block."""

    config: UNet2DConfig
    kind: str
    channels: int
    resamples: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def dtypes(self) -> dict[str, DTypeLike]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    @property
    def output_scale(self) -> float:
        """What sums are divided by."""
        return 1.0

    def groups(self, channels: int) -> int:
        """Groups of a norm of residual blocks."""
        return self.config.groups(channels)

    def resnet(self, name: str, x: jax.Array, temb: jax.Array, resample: str | None = None, **more: Any) -> jax.Array:
        c = self.config
        options: dict[str, Any] = {"groups": self.groups(x.shape[-1]), "groups_out": self.groups(self.channels)} | more
        return remat_block(ResnetBlock, self.remat)(
            self.channels,
            eps=c.norm_eps,
            act_fn=c.act_fn,
            time_scale_shift=c.resnet_time_scale_shift,
            resample=resample,
            output_scale=self.output_scale,
            **options,
            **self.dtypes,
            name=name,
        )(x, temb)

    def attend(self, i: int, x: jax.Array, groups: int | None) -> jax.Array:
        width = self.config.attention_head_dim or self.channels
        attention = remat_block(SpatialAttention, self.remat)
        heads = self.channels // width
        h = x + attention(heads, groups, self.config.norm_eps, **self.dtypes, name=f"attentions_{i}")(x)
        return h if self.output_scale == 1 else h / self.output_scale

    def layer(self, i: int, x: jax.Array, temb: jax.Array) -> jax.Array:
        """Residual block ``i``, with attention in blocks that have it."""
        x = self.resnet(f"resnets_{i}", x, temb)
        return self.attend(i, x, self.config.norm_num_groups) if KINDS[self.kind][0] else x


class DownBlock(Block):
    """One level of the downward path; returns its output, its skip connections, and ``image`` as it is."""

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array, image: jax.Array) -> tuple[jax.Array, list[jax.Array], jax.Array]:
        c, skips = self.config, []
        for i in range(c.layers_per_block):
            x = self.layer(i, x, temb)
            skips.append(x)
        if self.resamples:
            if (KINDS[self.kind][1] or c.downsample_type) == "resnet":
                x = self.resnet("downsamplers_0", x, temb, "down")
            else:
                x = Downsample(self.channels, c.downsample_padding, **self.dtypes, name="downsamplers_0")(x)
            skips.append(x)
        return x, skips, image


class ImagePath(Block):
    """Base class of NCSN++'s levels: sums divided by the root of 2, and norms with a group for four channels."""

    @property
    def output_scale(self) -> float:
        return math.sqrt(2.0)

    def groups(self, channels: int) -> int:
        return quarter(channels)

    def resampled(self, name: str, x: jax.Array, temb: jax.Array, direction: str) -> jax.Array:
        """A residual block that changes the resolution with a smoothing filter, and always has a shortcut layer."""
        return self.resnet(name, x, temb, f"smooth_{direction}", shortcut=True)


class SkipDownBlock(ImagePath):
    """One level of the downward path of NCSN++, which sees the image of its resolution (Song et al. 2021, appendix H).

    Returns its output, its skip connections, and the image for the next level.
    """

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array, image: jax.Array) -> tuple[jax.Array, list[jax.Array], jax.Array]:
        skips = []
        for i in range(self.config.layers_per_block):
            x = self.resnet(f"resnets_{i}", x, temb)
            x = self.attend(i, x, SKIP_ATTENTION_GROUPS) if KINDS[self.kind][0] else x
            skips.append(x)
        if self.resamples:
            image = smooth_down(image)
            seen = Conv(self.channels, kernel_size=1, padding=0, **self.dtypes, name="skip_conv")(image)
            x = seen + self.resampled("resnet_down", x, temb, "down")
            skips.append(x)
        return x, skips, image


class MidBlock(Block):
    """Residual block, attention unless ``add_attention`` is off, residual block."""

    @property
    def output_scale(self) -> float:
        return self.config.mid_block_scale_factor

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array) -> jax.Array:
        c = self.config
        x = self.resnet("resnets_0", x, temb)
        if c.add_attention:
            groups = self.groups(self.channels) if c.resnet_time_scale_shift == "default" else None
            x = self.attend(0, x, c.attn_norm_num_groups or groups)
        return self.resnet("resnets_1", x, temb)


class UpBlock(Block):
    """One level of the upward path; each residual block takes one skip connection. Returns ``image`` as it is."""

    @nn.compact
    def __call__(
        self, x: jax.Array, skips: list[jax.Array], temb: jax.Array, image: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        c = self.config
        for i in range(c.layers_per_block + 1):
            x = self.layer(i, jnp.concatenate([x, skips[-1 - i]], -1), temb)
        if not self.resamples:
            return x, image
        if (KINDS[self.kind][1] or c.upsample_type) == "resnet":
            return self.resnet("upsamplers_0", x, temb, "up"), image
        return Upsample(self.channels, **self.dtypes, name="upsamplers_0")(x), image


class SkipUpBlock(ImagePath):
    """One level of the upward path of NCSN++, which adds to an image of its resolution (Song et al. 2021, appendix H).

    ``image`` is that of the level below, None if there is none. Returns the output and the image; the finest level
    only enlarges it.
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, skips: list[jax.Array], temb: jax.Array, image: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        c, attends = self.config, KINDS[self.kind][0]
        for i in range(c.layers_per_block + 1):
            skip = skips[-1 - i]
            joined = jnp.concatenate([x, skip], -1)
            # The published blocks with attention divide only the skip connection's channels by four.
            groups = min(x.shape[-1] + skip.shape[-1] // 4, 32) if attends else self.groups(joined.shape[-1])
            x = self.resnet(f"resnets_{i}", joined, temb, groups=groups)
        if attends:
            x = self.attend(0, x, SKIP_ATTENTION_GROUPS)
        image = None if image is None else smooth_up(image)
        if not self.resamples:
            return x, image
        h = nn.silu(GroupNorm(self.groups(self.channels), c.norm_eps, **self.dtypes, name="skip_norm")(x))
        added = Conv(SKIP_CHANNELS, **self.dtypes, name="skip_conv")(h)
        return self.resampled("resnet_up", x, temb, "up"), added if image is None else image + added


DOWN = {False: DownBlock, True: SkipDownBlock}
"""Whether a type of block has a path of images -> the level of the downward path."""

UP = {False: UpBlock, True: SkipUpBlock}
"""The same for the upward path."""
