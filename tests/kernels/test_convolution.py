"""Every algorithm of conv2d is the same convolution, forwards and backwards, and the choice follows its rule."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.kernels import conv2d, target_platform
from diffuse_jax.kernels.convolution import choose_algorithm, possible_algorithms

ONE = ((1, 1), (1, 1))


def by_definition(x: np.ndarray, kernel: np.ndarray, stride: tuple[int, int], pads: tuple) -> np.ndarray:
    """The sum that defines a convolution, one output pixel at a time, in float64."""
    x, kernel = np.pad(x.astype(np.float64), ((0, 0), *pads, (0, 0))), kernel.astype(np.float64)
    kh, kw = kernel.shape[:2]
    rows = range(0, x.shape[1] - kh + 1, stride[0])
    columns = range(0, x.shape[2] - kw + 1, stride[1])
    pixel = lambda i, j: np.tensordot(x[:, i : i + kh, j : j + kw], kernel, 3)
    return np.stack([np.stack([pixel(i, j) for j in columns], 1) for i in rows], 1)


CASES = [
    ((2, 6, 4, 3), (3, 3, 3, 5), (1, 1), ONE),
    ((1, 5, 7, 2), (3, 3, 2, 4), (1, 1), ((0, 1), (1, 2))),
    ((1, 8, 6, 2), (3, 3, 2, 4), (2, 2), ((0, 1), (0, 1))),
    ((2, 7, 5, 3), (3, 3, 3, 2), (2, 1), ONE),
    ((2, 4, 4, 6), (1, 1, 6, 3), (1, 1), ((0, 0), (0, 0))),
    ((1, 6, 6, 2), (1, 3, 2, 2), (1, 1), ((0, 0), (1, 1))),
]


@pytest.mark.parametrize(("shape", "kernel", "stride", "pads"), CASES)
def test_every_algorithm_is_the_convolution(rng, shape, kernel, stride, pads):
    x, w = (rng.standard_normal(s).astype(np.float32) for s in (shape, kernel))
    expected = by_definition(x, w, stride, pads)
    for algorithm in (None, *possible_algorithms(shape, kernel, stride, pads)):
        out = jax.jit(lambda x, w, a=algorithm: conv2d(x, w, stride, pads, algorithm=a))(x, w)
        np.testing.assert_allclose(out, expected, atol=2e-5, err_msg=str(algorithm))


@pytest.mark.parametrize(("shape", "kernel", "stride", "pads"), CASES[:5])
def test_gradients_are_exact_differences(rng, shape, kernel, stride, pads):
    """A convolution is linear in each argument, so f(x + d) - f(x) is exactly the derivative along d."""
    x, dx = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    w, dw = (rng.standard_normal(kernel).astype(np.float32) for _ in range(2))
    up = rng.standard_normal(by_definition(x, w, stride, pads).shape)
    along_x = np.sum(up * by_definition(dx, w, stride, pads))
    along_w = np.sum(up * by_definition(x, dw, stride, pads))
    for algorithm in possible_algorithms(shape, kernel, stride, pads):
        f = lambda x, w, a=algorithm: conv2d(x, w, stride, pads, algorithm=a)
        both = jax.jit(lambda x, w, f=f: (jax.vjp(f, x, w)[1](jnp.float32(up)), jax.jvp(f, (x, w), (dx, dw))[1]))
        (gx, gw), tangent = both(x, w)
        np.testing.assert_allclose([np.sum(gx * dx), np.sum(gw * dw)], [along_x, along_w], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(np.sum(up * tangent), along_x + along_w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algorithm", ["direct", "matmul", "patches"])
def test_the_backward_pass_keeps_no_more_than_image_and_kernel(algorithm):
    size = 1 if algorithm == "matmul" else 3
    x, w = jnp.ones((2, 8, 8, 16)), jnp.ones((size, size, 16, 4))
    conv = lambda x, w: conv2d(x, w, padding=size // 2, algorithm=algorithm)
    kept = jax.tree.leaves(jax.eval_shape(lambda x, w: jax.vjp(conv, x, w)[1], x, w))
    assert sum(leaf.size for leaf in kept) <= x.size + w.size


@pytest.mark.parametrize(("shape", "kernel", "stride", "pads"), CASES)
def test_gradients_in_loops_have_the_axes_that_xla_is_fast_with(shape, kernel, stride, pads):
    """On CPUs XLA brings other axes into this order only outside of loops, and gradients there took 20 times as
    long."""
    xs, w = jnp.ones((2, *shape)), jnp.ones(kernel)
    loss = lambda w, x: (conv2d(jnp.tanh(x), jnp.tanh(w), stride, pads, algorithm="direct") ** 3).mean()
    run = jax.jit(lambda w, xs: jax.lax.scan(lambda w, x: (w, jax.grad(loss, (0, 1))(w, x)), w, xs)[1])
    text = run.lower(w, xs).compile().as_text()
    assert " while(" in text
    assert set(re.findall(r" convolution\(.*dim_labels=([\w>-]+)", text)) == {"b01f_01io->b01f"}


def test_what_has_no_tangent_is_not_differentiated():
    """One convolution more for each argument that has one."""
    x, w = jnp.ones((1, 6, 6, 2)), jnp.ones((3, 3, 2, 2))
    conv = lambda x, w: conv2d(x, w, padding=1, algorithm="direct")
    count = lambda f, *args: str(jax.make_jaxpr(f)(*args)).count("conv_general_dilated[")
    assert count(lambda x: jax.jvp(lambda x: conv(x, w), (x,), (x,)), x) == 2
    assert count(lambda w: jax.jvp(lambda w: conv(x, w), (w,), (w,)), w) == 2
    assert count(lambda x, w: jax.jvp(conv, (x, w), (x, w)), x, w) == 3


@pytest.mark.parametrize("padding", [1, "SAME", ONE])
def test_padding_may_be_given_in_three_ways(rng, padding):
    x, w = rng.standard_normal((1, 6, 6, 2)), rng.standard_normal((3, 3, 2, 2))
    x, w = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
    np.testing.assert_array_equal(conv2d(x, w, 1, padding), conv2d(x, w, 1, ONE))


CHOICES = [  # the convolutions of the Stable Diffusion 1.5 UNet at 64x64 latents, batch 2, and of its decoder at 512 px
    ((2, 8, 8, 1280), (3, 3, 1280, 1280), "patches"),
    ((2, 16, 16, 2560), (3, 3, 2560, 1280), "patches"),
    ((2, 32, 32, 640), (3, 3, 640, 640), "direct"),
    ((2, 64, 64, 320), (3, 3, 320, 320), "direct"),
    ((2, 64, 64, 4), (3, 3, 4, 320), "direct"),
    ((1, 512, 512, 128), (3, 3, 128, 128), "direct"),
    ((2, 64, 64, 960), (1, 1, 960, 320), "matmul"),
]


@pytest.mark.parametrize(("shape", "kernel", "expected"), CHOICES)
def test_choice(shape, kernel, expected):
    pads = ONE if kernel[0] == 3 else ((0, 0), (0, 0))
    assert choose_algorithm(shape, kernel, (1, 1), pads) == expected
    for platform in ("gpu", "tpu"):
        with target_platform(platform):
            assert choose_algorithm(shape, kernel, (1, 1), pads) == "direct"


def test_other_platforms_get_one_convolution():
    """Tracing under a target is not served from the cache of another target."""
    x, w = jax.ShapeDtypeStruct((1, 8, 8, 512), jnp.float32), jax.ShapeDtypeStruct((3, 3, 512, 512), jnp.float32)
    f = jax.jit(conv2d)
    assert "conv_general_dilated" not in str(f.trace(x, w).jaxpr)
    with target_platform("tpu"):
        assert "conv_general_dilated" in str(f.trace(x, w).jaxpr)


def test_errors_name_shapes_and_remedies():
    x, w = jnp.zeros((1, 5, 5, 3)), jnp.zeros((3, 3, 4, 2))
    with pytest.raises(ValueError, match=r"\(1, 5, 5, 3\) and \(3, 3, 4, 2\)"):
        conv2d(x, w)
    with pytest.raises(ValueError, match=r"'matmul' does not support .*possible: \['direct', 'patches'\]"):
        conv2d(x, w[:, :, :3], 2, algorithm="matmul")
    with pytest.raises(ValueError, match='must be "cpu", "gpu" or "tpu"'):
        target_platform("cuda")
