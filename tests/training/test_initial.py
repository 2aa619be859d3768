"""Fresh parameters: their statistics, and that they need nothing but shapes and a seed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.training.initial import initial_params
from tests.models.test_precision import NETWORKS


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


@pytest.mark.parametrize("name", ["unet of K blocks", "NCSN++", "vision encoder", "depth estimator"])
def test_parameters_that_are_no_kernels_start_as_in_the_network_itself(name: str) -> None:
    """The Fourier weights of the x2 upscaler and of NCSN++, the tokens and positions of vision transformers."""
    kind, config = NETWORKS[name]
    model = kind(config)
    own = jax.jit(lambda: _unusual(model.init(jax.random.key(0), **_zeros(model.example_inputs()))["params"]))()
    ours = _unusual(initial_params(model, 0))
    assert own.keys() == ours.keys() != set()
    assert [path for path in own if not _alike(np.asarray(own[path]), ours[path])] == []


def test_frequencies_of_noise_levels() -> None:
    kind, config = NETWORKS["NCSN++"]
    params = initial_params(kind(config.replace(block_out_channels=(512, 32))), 0)
    assert params["time_proj"]["weight"].std() == pytest.approx(16, rel=0.1), "GaussianFourierProjection(scale=16)"


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _unusual(params: Any) -> dict[str, Any]:
    """The parameters that are neither kernels nor belong to norms, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(p): x for p, x in leaves if p[-1].key not in ("kernel", "scale", "bias")}


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two samples have about the same mean and deviation; constants exactly."""
    spread = max(a.std(), b.std())
    if spread == 0:
        return bool((a == b).all())
    return abs(a.mean() - b.mean()) < 6 * spread / a.size**0.5 and 0.5 < (a.std() / b.std()) < 2


def test_unknown_leaf_is_an_error() -> None:
    with pytest.raises(ValueError, match="'gamma'"):
        initial_params({"layer": {"gamma": shape(3)}}, 0)
