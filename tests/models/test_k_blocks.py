"""UNets of K blocks: how they change resolution, what they refuse, and that recomputation changes no gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.models import UNet2DConditionModel
from diffuse_jax.models.image_attention import cross_attentions
from diffuse_jax.models.k_blocks import doubled, halved
from tests.models.filling import random_params
from tests.models.test_precision import K_BLOCKS


def test_resolutions_change_linearly() -> None:
    """A plane stays one away from the edges, where it is reflected; a constant everywhere."""
    row, column = jnp.meshgrid(jnp.arange(8.0), jnp.arange(12.0), indexing="ij")
    plane = (2 * row + 3 * column)[None, :, :, None]
    at = lambda n, step: (jnp.arange(n) + 0.5) * step - 0.5
    expected = lambda h, w, step: (2 * at(h, step)[:, None] + 3 * at(w, step)[None, :])[1:-1, 1:-1]
    np.testing.assert_allclose(halved(plane)[0, 1:-1, 1:-1, 0], expected(4, 6, 2), atol=1e-5)
    np.testing.assert_allclose(doubled(plane)[0, 1:-1, 1:-1, 0], expected(16, 24, 0.5), atol=1e-5)
    for change in (halved, doubled):
        np.testing.assert_allclose(change(jnp.full((1, 4, 6, 2), 3.0)), 3.0, rtol=1e-6)


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": shape(2, 8, 10, 4)}, "must be multiples of 4, 8 or more, got 8 x 10"),
        ({"sample": shape(2, 4, 8, 4)}, "got 4 x 8"),
        ({"mid_block_additional_residual": shape(2, 2, 2, 64)}, "no places for the residuals"),
        ({"down_intrablock_additional_residuals": [shape(2, 8, 8, 32)]}, "no places for the residuals"),
    ],
)
def test_wrong_inputs_are_refused(changes: dict[str, Any], message: str) -> None:
    model = UNet2DConditionModel(K_BLOCKS)
    inputs = {"sample": shape(2, 8, 8, 4), "timesteps": shape(2), "encoder_hidden_states": shape(2, 5, 24)} | changes
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p, i: model.apply({"params": p}, **i), model.shapes(), inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ("DownBlock2D", *K_BLOCKS.down_block_types[1:])}, "do not go together with others"),
        ({"mid_block_type": "UNetMidBlock2D"}, "no mid_block_type"),
        ({"block_out_channels": (64, 64, 64)}, "only the two coarsest levels as wide"),
        ({"time_embedding_dim": 128}, r"embedding of the timestep \(128\), got \(32, 64, 64\)"),
        ({"down_block_types": ("KDownBlock2D",) * 3}, "attention at the coarsest"),
        ({"num_attention_heads": 24}, r"multiples of 32 and of attention_head_dim \(24, 24, 24\)"),
    ],
)
def test_configurations_without_consistent_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        K_BLOCKS.replace(**changes)


def test_there_are_no_ip_adapters_for_it() -> None:
    with pytest.raises(ValueError, match="no IP-Adapters for a UNet with K blocks"):
        cross_attentions(K_BLOCKS)


def test_recomputation_changes_no_gradient_and_frequencies_have_none(rng: np.random.Generator) -> None:
    normal = lambda *sizes: jnp.asarray(rng.standard_normal(sizes), jnp.float32)
    inputs = (normal(1, 8, 8, 4), jnp.array([0.3]), normal(1, 5, 24))
    params = random_params(UNet2DConditionModel(K_BLOCKS).shapes(), rng)

    def gradients(remat: str) -> Any:
        model = UNet2DConditionModel(K_BLOCKS, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.mean(model.apply({"params": p}, *inputs) ** 2)))(params)

    plain = gradients("none")
    assert not np.any(plain["time_proj"]["weight"])
    assert np.any(plain["down_blocks_0"]["resnets_0"]["conv1"]["kernel"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradients("full"), plain)
