"""What the UNet over pixels refuses before anything is compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from diffuse_jax.models import UNet2DConfig, UNet2DModel

SMALL = UNet2DConfig(
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=4,
)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 7, 8, 3), r"multiples of 2, got \(7, 8\)"),
        ((1, 8, 8, 4), r"\[B,h,w,3\] \(channel-last\)"),
        ((8, 8, 3), r"got \(8, 8, 3\)"),
    ],
)
def test_wrong_samples_are_refused_while_tracing(shape: tuple[int, ...], message: str) -> None:
    model, sample = UNet2DModel(SMALL), jax.ShapeDtypeStruct(shape, jnp.float32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p, x: model.apply({"params": p}, x, 0), model.shapes(), sample)


def test_one_head_of_any_width_where_attention_has_no_head_dim() -> None:
    """Head width counts only where there is attention."""
    odd = SMALL.replace(block_out_channels=(8, 20), attention_head_dim=None)
    assert UNet2DModel(odd).shapes()["mid_block"]["attentions_0"]["to_q"]["kernel"].shape == (20, 20)
    plain = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
    SMALL.replace(block_out_channels=(8, 20), down_block_types=plain[0], up_block_types=plain[1], add_attention=False)
    with pytest.raises(ValueError, match="attention over 20 channels cannot be split"):
        SMALL.replace(block_out_channels=(8, 20))
