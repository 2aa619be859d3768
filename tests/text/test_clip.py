"""What the text encoder promises beyond its outputs: causality, where a text ends, clear errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.text import CLIPTextConfig, CLIPTextModel
from diffuse_jax.text.clip import end_of_text
from tests.models.filling import random_params

CONFIG = CLIPTextConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=10,
    eos_token_id=49,
)


@pytest.fixture(scope="module")
def encode() -> Any:
    model = CLIPTextModel(CONFIG)
    params = random_params(model.shapes(), np.random.default_rng(0))
    return jax.jit(lambda ids: model.apply({"params": params}, ids))


def test_a_token_does_not_see_later_ones(encode: Any, rng: np.random.Generator) -> None:
    ids = rng.integers(0, 48, (2, 10)).astype(np.int32)
    changed = ids.copy()
    changed[:, 6:] = 48
    before, after = encode(ids), encode(changed)
    np.testing.assert_allclose(before.last_hidden_state[:, :6], after.last_hidden_state[:, :6], atol=1e-6)
    assert not np.allclose(before.last_hidden_state[:, 6:], after.last_hidden_state[:, 6:], atol=1e-2)


def test_shorter_input_is_the_beginning_of_a_longer_one(encode: Any, rng: np.random.Generator) -> None:
    ids = rng.integers(0, 48, (2, 10)).astype(np.int32)
    np.testing.assert_allclose(encode(ids[:, :4]).last_hidden_state, encode(ids).last_hidden_state[:, :4], atol=1e-5)


def test_the_two_rules_for_the_end_of_the_text() -> None:
    ids = jnp.array([[5, 49, 7, 40, 40], [40, 5, 5, 5, 49]])
    np.testing.assert_array_equal(end_of_text(ids, 40), [3, 0])  # the first token with that id
    np.testing.assert_array_equal(end_of_text(ids, 2), [1, 4])  # the largest id


def test_skipping_counts_layers_from_the_end(encode: Any) -> None:
    output = encode(jnp.zeros((1, 4), jnp.int32))
    assert len(output.hidden_states) == 4
    assert output.skipped(0) is output.hidden_states[3]
    assert output.skipped(2) is output.hidden_states[1]
    assert output.skipped(3) is output.hidden_states[0]
    with pytest.raises(ValueError, match="clip_skip must be from 0 to 3, got 4"):
        output.skipped(4)


@pytest.mark.parametrize("shape", [(1, 11), (5,)])
def test_wrong_lengths_are_refused_while_tracing(shape: tuple[int, ...]) -> None:
    model = CLIPTextModel(CONFIG)
    with pytest.raises(ValueError, match="L up to 10"):
        jax.eval_shape(
            lambda p, i: model.apply({"params": p}, i), model.shapes(), jax.ShapeDtypeStruct(shape, jnp.int32)
        )
