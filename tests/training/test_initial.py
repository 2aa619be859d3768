"""Fresh parameters: their statistics, and that they need nothing but shapes and a seed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.training.initial import initial_params


def shape(*edges: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(edges, jnp.float32)


SHAPES = {
    "conv1": {"kernel": shape(3, 3, 64, 64), "bias": shape(64)},
    "block": {"conv2": {"kernel": shape(3, 3, 8, 8)}},
    "norm": {"scale": shape(64), "bias": shape(64)},
    "token": {"embedding": shape(500, 32)},
}


def test_layers_keep_the_variance_of_their_input() -> None:
    params = initial_params(SHAPES, seed=0)
    assert params["conv1"]["kernel"].std() == pytest.approx((9 * 64) ** -0.5, rel=0.02)
    assert params["token"]["embedding"].std() == pytest.approx(0.02, rel=0.02)
    np.testing.assert_array_equal(params["norm"]["scale"], 1)
    np.testing.assert_array_equal(params["norm"]["bias"], 0)
    np.testing.assert_array_equal(params["block"]["conv2"]["kernel"], 0)
    assert initial_params(SHAPES, 0, zero=())["block"]["conv2"]["kernel"].any()


def test_the_seed_decides() -> None:
    first, again, other = (initial_params(SHAPES, seed)["conv1"]["kernel"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_unknown_leaf_is_an_error() -> None:
    with pytest.raises(ValueError, match="'gamma'"):
        initial_params({"layer": {"gamma": shape(3)}}, 0)
