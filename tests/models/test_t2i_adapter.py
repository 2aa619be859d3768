"""T2I-Adapters: what they and the UNets that they steer refuse, from shapes alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.models import T2IAdapter, T2IAdapterConfig, UNet2DConditionModel
from diffuse_jax.models.remat import POLICIES
from tests.models.filling import random_params
from tests.models.test_precision import UNET


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (shape(2, 3, 64, 64), r"control images must be \[B,H,W,3\] \(channel-last\), got \(2, 3, 64, 64\)"),
        (shape(2, 64, 68, 3), "must be multiples of 8, got 64 x 68"),
    ],
)
def test_wrong_images_are_refused(images: jax.ShapeDtypeStruct, message: str) -> None:
    model = T2IAdapter(T2IAdapterConfig(channels=(8, 16)))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p, x: model.apply({"params": p}, x), model.shapes(), images)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapter_type": "full"}, "adapter_type='full'; expected one of"),
        ({"channels": ()}, "at least one entry"),
        ({"channels": (8, 8, 16, 32), "adapter_type": "full_adapter_xl"}, "must be equal from the third on"),
        ({"channels": (3,), "adapter_type": "light_adapter"}, "must be 4 or more"),
    ],
)
def test_wrong_configurations_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"T2IAdapter: .*{message}"):
        T2IAdapterConfig(**values)


@pytest.mark.parametrize(
    ("residuals", "message"),
    [
        ([shape(2, 4, 4, 16)], r"residual of down_blocks_0 must be \(2, 8, 8, 16\) .* got \(2, 4, 4, 16\)"),
        ([shape(2, 8, 8, 16), shape(2, 4, 4, 16)], r"residual of down_blocks_1 must be \(2, 4, 4, 32\)"),
        ([shape(2, 8, 8, 16), *[shape(2, 4, 4, 32)] * 3], "at most 3 arrays to this network, got 4"),
        ([shape(2, 8, 8, 16), shape(2, 4, 4, 32), shape(2, 2, 2, 32)], "residual of the middle block must be"),
    ],
)
def test_what_a_unet_cannot_add_is_refused(residuals: list[Any], message: str) -> None:
    model = UNet2DConditionModel(UNET)
    inputs = {"sample": shape(2, 8, 8, 4), "timesteps": shape(2), "encoder_hidden_states": shape(2, 5, 24)}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda p, i, r: model.apply({"params": p}, **i, down_intrablock_additional_residuals=r),
            model.shapes(),
            inputs,
            residuals,
        )


def test_recomputation_changes_no_gradient(rng: np.random.Generator) -> None:
    config = T2IAdapterConfig(channels=(8, 12), num_res_blocks=1, downscale_factor=2)
    params = random_params(T2IAdapter(config).shapes(), rng)
    images = jnp.asarray(rng.uniform(0, 1, (2, 8, 8, 3)), jnp.float32)

    def gradients(remat: str) -> Any:
        model = T2IAdapter(config, remat=remat)
        return jax.grad(lambda p: sum(jnp.sum(y**2) for y in model.apply({"params": p}, images)))(params)

    for policy in POLICIES[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients(policy), gradients("none")
        )
