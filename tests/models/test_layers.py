"""Parameters of layers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError

from diffuse_jax.models.layers import Dense, parameter


def test_a_given_parameter_is_used_without_tracing_its_initializer() -> None:
    traced = []

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        traced.append(shape)
        return jnp.full(shape, 2, dtype)

    class Scale(nn.Module):
        param_dtype: Any = jnp.bfloat16

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return x * parameter(self, "scale", init, (3,))

    variables = Scale().init(jax.random.key(0), jnp.ones(3))
    assert variables["params"]["scale"].dtype == jnp.bfloat16
    before = len(traced)
    assert (Scale().apply(variables, jnp.ones(3)) == 2).all()
    assert len(traced) == before


def test_a_parameter_of_another_shape_is_named() -> None:
    params = {"layer": {"kernel": jnp.zeros((4, 5)), "bias": jnp.zeros(5)}}

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return Dense(5, name="layer")(x)

    with pytest.raises(ScopeParamShapeError, match=r'"kernel" in "/?layer".*\(3, 5\).*\(4, 5\)'):
        Net().apply({"params": params}, jnp.zeros((1, 3)))
    with pytest.raises(ScopeParamNotFoundError, match="bias"):
        Net().apply({"params": {"layer": {"kernel": jnp.zeros((3, 5))}}}, jnp.zeros((1, 3)))
