"""Means of group normalisation by matrix products, as on TPUs, against plain ones in float64; run on any platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.kernels import group_mean, target_platform
from diffuse_jax.models.layers import GroupNorm


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.float32])
def test_products_give_the_mean(kind, offset: float, rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((2, 64, 4, 10)) + offset, kind)
    with target_platform("tpu"):
        found = jax.jit(lambda x: group_mean(x, jnp.bfloat16))(x)
    expected = np.asarray(x, np.float64).mean((1, 3), keepdims=True)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=2**-16, atol=2e-6)


def test_only_networks_in_bfloat16_on_tpus_use_products() -> None:
    x = jnp.ones((2, 64, 4, 10), jnp.bfloat16)
    uses = lambda dtype: "dot_general" in str(jax.make_jaxpr(lambda x: group_mean(x, dtype))(x))
    assert not uses(jnp.bfloat16)
    with target_platform("tpu"):
        assert uses(jnp.bfloat16)
        assert not uses(jnp.float32)


def test_a_layer_and_its_gradient_are_the_same(rng: np.random.Generator) -> None:
    layer = GroupNorm(4, dtype=jnp.bfloat16)
    x = jnp.asarray(rng.standard_normal((2, 8, 8, 24)) * 3 + 5, jnp.bfloat16)
    params = {"scale": rng.standard_normal(24).astype(np.float32), "bias": rng.standard_normal(24).astype(np.float32)}
    weight = rng.standard_normal(x.shape).astype(np.float32)

    def run(x, params):
        return (layer.apply({"params": params}, x).astype(jnp.float32) * weight).sum()

    plain = jax.jit(jax.value_and_grad(run, (0, 1)))(x, params)
    with target_platform("tpu"):
        products = jax.jit(jax.value_and_grad(run, (0, 1)))(x, params)
        assert jax.jvp(lambda x: run(x, params), (x,), (x,))[1].shape == ()
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(products), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-2, atol=2e-2)
