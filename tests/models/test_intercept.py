"""Layers are changed from outside: everything they are given and return, at the right paths, recomputed or not."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.models import UNet2DConditionConfig, UNet2DConditionModel
from diffuse_jax.models.attention import Attention, FeedForward, TransformerBlock
from diffuse_jax.models.intercept import Call, changed_layers, recorded_layers
from diffuse_jax.models.layers import LayerNorm
from diffuse_jax.models.remat import POLICIES
from diffuse_jax.weights.names import flatten, unflatten
from tests.models.filling import random_params
from tests.models.small import one_level
from tests.models.test_precision import UNET

RECOMPUTED = [pytest.param("blocks", marks=pytest.mark.slow) if name == "blocks" else name for name in POLICIES]
"""All policies for networks that are compiled; the ordinary suite has the one that keeps most and the one that keeps
least."""

WEIGHT = 0.6
"""What the second attention of the tests is multiplied by."""


def unet_case(
    rng: np.random.Generator, remat: str = "none", config: UNet2DConditionConfig = UNET
) -> tuple[UNet2DConditionModel, Any, dict[str, Any]]:
    model = UNet2DConditionModel(config, remat=remat)
    inputs = {
        "sample": jnp.asarray(rng.standard_normal((2, 8, 8, 4)), jnp.float32),
        "timesteps": jnp.array([10, 900]),
        "encoder_hidden_states": jnp.asarray(rng.standard_normal((2, 5, 24)), jnp.float32),
    }
    return model, random_params(model.shapes(), rng), inputs


def second_attention(pairs: dict[tuple[str, ...], dict[str, jax.Array]], tokens: jax.Array) -> Any:
    """What an IP-Adapter does: the query of a cross-attention attends to image tokens ``[B,K,D]`` too."""

    def change(call: Call) -> Any:
        y = call.output()
        if call.name != "attend" or call.path[:-1] not in pairs:
            return y
        query, *_ = call.inputs
        key, value = (
            (tokens @ pairs[call.path[:-1]][name]).reshape(*tokens.shape[:2], *query.shape[2:])
            for name in ("to_k", "to_v")
        )
        return y + WEIGHT * softmax_attention(query, key, value)

    return change


def softmax_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Written out; ``[B,L,H,D]``."""
    scores = jnp.einsum("blhd,bkhd->bhlk", query, key) / np.sqrt(query.shape[-1])
    return jnp.einsum("bhlk,bkhd->blhd", jax.nn.softmax(scores, -1), value)


def test_a_second_cross_attention_equals_one_written_out(rng: np.random.Generator) -> None:
    heads, width = 4, 16
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    x, text, image = normal(2, 9, width), normal(2, 5, 24), normal(2, 3, 24)
    block = TransformerBlock(heads)
    params = random_params(jax.eval_shape(block.init, jax.random.key(0), x, text)["params"], rng)
    pair = {"to_k": normal(24, width) / 5, "to_v": normal(24, width) / 5}
    with changed_layers(second_attention({("attn2",): pair}, image)):
        ours = block.apply({"params": params}, x, text)

    run = lambda layer, name, *given: layer.apply({"params": params[name]}, *given)
    h = x + run(Attention(heads), "attn1", run(LayerNorm(), "norm1", x))
    normed = run(LayerNorm(), "norm2", h)
    split = lambda y: y.reshape(2, -1, heads, width // heads)
    kernel = lambda name: params["attn2"][name]["kernel"]
    second = softmax_attention(split(normed @ kernel("to_q")), split(image @ pair["to_k"]), split(image @ pair["to_v"]))
    h = h + run(Attention(heads), "attn2", normed, text) + WEIGHT * second.reshape(2, 9, width) @ kernel("to_out_0")
    expected = h + run(FeedForward(), "ff", run(LayerNorm(), "norm3", h))
    np.testing.assert_allclose(ours, expected, atol=2e-5)
    assert np.abs(ours - block.apply({"params": params}, x, text)).max() > 0.1


@pytest.mark.parametrize("remat", RECOMPUTED)
def test_attending_twice_to_the_text_counts_it_more(remat: str, rng: np.random.Generator) -> None:
    """A second attention with the same projections and text equals the first; gradients reach its projections."""
    model, params, inputs = unet_case(rng, remat, one_level(UNET))
    flat = flatten(params)
    pairs = {
        path[:-2]: {name: flat[*path[:-2], name, "kernel"] for name in ("to_k", "to_v")}
        for path in flat
        if path[-3:-1] == ("attn2", "to_k")
    }
    assert len(pairs) == 3  # one downward, two upward

    def run(pairs: Any) -> jax.Array:
        with changed_layers(second_attention(pairs, inputs["encoder_hidden_states"])):
            return model.apply({"params": params}, **inputs)

    louder = {
        path: leaf * (1 + WEIGHT) if path[-3:] == ("attn2", "to_out_0", "kernel") else leaf
        for path, leaf in flat.items()
    }
    expected = jax.jit(lambda p: model.apply({"params": p}, **inputs))(unflatten(louder))
    np.testing.assert_allclose(jax.jit(run)(pairs), expected, atol=2e-5)
    gradients = jax.jit(jax.grad(lambda pairs: jnp.square(run(pairs)).sum()))(pairs)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("remat", RECOMPUTED)
def test_inputs_of_a_join_can_be_changed(remat: str, rng: np.random.Generator) -> None:
    """Scaling the first join's features and skip (FreeU) is adding a multiple of each where they come from."""
    model, params, inputs = unet_case(rng, remat)
    place = ("up_blocks_0", "joins_0")
    run = jax.jit(lambda **more: model.apply({"params": params}, **inputs, **more))

    def scale(call: Call) -> Any:
        if call.path != place:
            return call.output()
        x, skip = call.inputs
        return call.output(1.3 * x, 0.5 * skip)

    def changed() -> jax.Array:
        with changed_layers(scale):
            return model.apply({"params": params}, **inputs)

    def joined() -> list[jax.Array]:
        given: list[jax.Array] = []

        def look(call: Call) -> Any:
            given.extend(call.inputs if call.path == place else [])
            return call.output()

        with changed_layers(look):
            UNet2DConditionModel(UNET).apply({"params": params}, **inputs)
        return given

    x, skip = jax.jit(joined)()
    assert x.shape == skip.shape == (2, 4, 4, 32)
    residuals = [jnp.zeros(shape) for shape in [(2, 8, 8, 16), (2, 8, 8, 16), (2, 4, 4, 16)]]
    expected = run(
        down_block_additional_residuals=[*residuals, -0.5 * skip],
        mid_block_additional_residual=0.3 * x,
    )
    output = jax.jit(changed)()
    np.testing.assert_allclose(output, expected, atol=2e-5)
    assert np.abs(output - run()).max() > 0.1


@pytest.mark.parametrize("remat", POLICIES)
def test_every_layer_is_seen_once_at_the_path_of_its_parameters(remat: str, rng: np.random.Generator) -> None:
    model, params, inputs = unet_case(rng, remat)
    seen: list[tuple[str, ...]] = []

    def look(call: Call) -> Any:
        seen.append(call.path)
        return call.output()

    with changed_layers(look):
        jax.eval_shape(jax.grad(lambda p: model.apply({"params": p}, **inputs).sum()), params)
    assert set(Counter(seen).values()) == {1}
    owners = {path[:i] for path in flatten(params) for i in range(len(path))}
    assert owners <= set(seen)
    assert {path[-1].rstrip("0123456789") for path in set(seen) - owners} == {"joins_", "attend"}


def test_a_layer_can_be_replaced_without_being_computed(rng: np.random.Generator) -> None:
    """Blocks of several inputs included: without its transformers the UNet no longer looks at the text."""
    model, params, inputs = unet_case(rng)

    def skip(call: Call) -> Any:
        x, *others = call.inputs or [None]
        if not call.name.startswith("attentions_"):
            return call.output()
        assert [y.shape for y in others] == [(2, 5, 24)]
        return x

    paths: set[tuple[str, ...]] = set()

    @jax.jit
    def run(text: jax.Array) -> jax.Array:
        with changed_layers(skip), recorded_layers() as layers:
            y = model.apply({"params": params}, **inputs | {"encoder_hidden_states": text})
        paths.update(layer.path for layer in layers)
        return y

    text = inputs["encoder_hidden_states"]
    np.testing.assert_array_equal(run(text), run(jnp.zeros_like(text)))
    assert ("up_blocks_1", "resnets_0") in paths
    assert not [path for path in paths if "attn2" in path]


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_the_inner_context_is_nearer_to_the_layer(order: tuple[int, int]) -> None:
    """``2 (y + 1)`` outside in, ``2 y + 1`` the other way."""
    changes = {1: lambda call: call.output() + 1, 2: lambda call: call.output() * 2}
    x = jnp.ones((1, 4))
    norm = LayerNorm()
    params = {"scale": jnp.zeros(4), "bias": jnp.full(4, 3.0)}
    with contextlib.ExitStack() as stack:
        for which in order:
            stack.enter_context(changed_layers(changes[which]))
        y = norm.apply({"params": params}, x)
    np.testing.assert_array_equal(y, {(1, 2): 7.0, (2, 1): 8.0}[order])
