"""Counts of operations against formulas, and the same under every remat policy."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from diffuse_jax.training.flops import count_flops, peak_flops

B, D = 8, 32
X, W = jnp.ones((B, D)), jnp.ones((D, D))
PRODUCT = 2 * B * D * D


def layers(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.tanh(x @ w) @ w).sum()


def test_products_and_their_gradient() -> None:
    """Forward 2 products; backward 2 for the weights and 1 for the inner activations, none for the input."""
    assert count_flops(layers, W, X) == 2 * PRODUCT
    assert count_flops(jax.grad(layers), W, X) == (2 + 3) * PRODUCT
    assert count_flops(jax.grad(layers, argnums=(0, 1)), W, X) == (2 + 4) * PRODUCT


def test_recomputation_does_not_count() -> None:
    again = lambda w, x: jax.checkpoint(layers)(w, x) + jnp.tanh(x).sum()
    assert count_flops(jax.grad(again), W, X) == count_flops(jax.grad(layers), W, X)


def test_loops_count_their_iterations() -> None:
    def loop(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, length=5)[0].sum()

    assert count_flops(loop, W, X) == 5 * PRODUCT
    # Each turn backwards: a product for the weights and one for the activations.
    assert count_flops(jax.grad(loop), W, X) == (5 + 10) * PRODUCT


def test_the_larger_branch_counts() -> None:
    one = lambda w, x: x @ w
    two = lambda w, x: x @ w @ (w + 1)
    assert count_flops(lambda p, w, x: jax.lax.cond(p, one, two, w, x), True, W, X) == 2 * PRODUCT


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_and_their_gradients(stride: int) -> None:
    """Each of the two gradients of a convolution is as much work as itself, with and without stride."""
    x, k = jnp.ones((2, 16, 16, 4)), jnp.ones((3, 3, 4, 6))

    def conv(k: jax.Array, x: jax.Array) -> jax.Array:
        axes = ("NHWC", "HWIO", "NHWC")
        return jnp.tanh(jax.lax.conv_general_dilated(x, k, (stride, stride), "SAME", dimension_numbers=axes)).sum()

    work = 2 * 2 * (16 // stride) ** 2 * 6 * (3 * 3 * 4)
    assert count_flops(conv, k, x) == work
    assert count_flops(jax.grad(conv, argnums=(0, 1)), k, x) == 3 * work


def test_xla_counts_the_same() -> None:
    counted = jax.jit(jax.grad(layers)).lower(W, X).cost_analysis()
    assert count_flops(jax.grad(layers), W, X) == pytest.approx(counted["flops"], rel=0.05)


def test_peaks_of_devices() -> None:
    peak = lambda kind: peak_flops(SimpleNamespace(device_kind=kind))  # type: ignore[arg-type]
    assert (peak("TPU v5 lite"), peak("TPU v5p"), peak("TPU v4")) == (197e12, 459e12, 275e12)
    assert (peak("NVIDIA H100 80GB HBM3"), peak("NVIDIA H100 PCIe")) == (989e12, 756e12)
    assert peak("cpu") is None
