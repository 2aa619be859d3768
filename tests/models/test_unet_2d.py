"""What the UNet over pixels refuses before anything is compiled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.models import UNet2DConfig, UNet2DModel
from diffuse_jax.models.resampling import smooth_down, smooth_up

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


NCSNPP = UNet2DConfig(
    block_out_channels=(8, 16),
    down_block_types=("SkipDownBlock2D",) * 2,
    up_block_types=("SkipUpBlock2D",) * 2,
    norm_num_groups=None,
    time_embedding_type="fourier",
    attention_head_dim=None,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, "down_block_types=.* must be at the finest levels"),
        ({"up_block_types": ("SkipUpBlock2D", "UpBlock2D")}, "up_block_types=.* must be at the finest levels"),
        ({"in_channels": 4}, "in_channels=4; blocks with Skip in their name are for images of 3 channels"),
        ({"out_channels": 6}, "out_channels=6; blocks with Skip"),
        ({"up_block_types": ("UpBlock2D", "SkipUpBlock2D")}, "norm_num_groups=None; blocks without Skip"),
        ({"up_block_types": ("UpBlock2D", "SkipUpBlok2D")}, "unknown block type 'SkipUpBlok2D'"),
        ({"mid_block_scale_factor": 0.0}, "mid_block_scale_factor"),
    ],
)
def test_a_path_of_images_that_leads_nowhere_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NCSNPP.replace(**changes)


def test_resampling_keeps_constants_and_is_a_transpose(rng: np.random.Generator) -> None:
    """Inside, a constant stays; and up is four times the transpose of down."""
    ones = jnp.ones((1, 8, 12, 2))
    np.testing.assert_allclose(smooth_down(ones)[:, 1:-1, 1:-1], 1)
    np.testing.assert_allclose(smooth_up(ones)[:, 1:-1, 1:-1], 1)
    small, large = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 4, 2), (2, 6, 8, 2)))
    np.testing.assert_allclose(np.vdot(smooth_up(small), large), 4 * np.vdot(small, smooth_down(large)), rtol=1e-5)


def test_one_head_of_any_width_where_attention_has_no_head_dim() -> None:
    """Head width counts only where there is attention."""
    odd = SMALL.replace(block_out_channels=(8, 20), attention_head_dim=None)
    assert UNet2DModel(odd).shapes()["mid_block"]["attentions_0"]["to_q"]["kernel"].shape == (20, 20)
    plain = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
    SMALL.replace(block_out_channels=(8, 20), down_block_types=plain[0], up_block_types=plain[1], add_attention=False)
    with pytest.raises(ValueError, match="attention over 20 channels cannot be split"):
        SMALL.replace(block_out_channels=(8, 20))
