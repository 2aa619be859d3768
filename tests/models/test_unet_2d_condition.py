"""What the UNet promises beyond its outputs: early errors, and a parameter tree that its inputs cover."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.models import UNet2DConditionModel
from diffuse_jax.models.embeddings import TimestepEmbedding, sinusoidal_embedding
from diffuse_jax.models.resnet import nearest
from tests.models.filling import random_params
from tests.models.test_precision import UNET

XL = UNET.replace(
    addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=20 + 6 * 8
)


def trace(config: Any, **changes: Any) -> jax.ShapeDtypeStruct:
    """The shape of the output, from shapes alone."""
    model = UNet2DConditionModel(config)
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    inputs = {"sample": array(2, 8, 8, 4), "timesteps": array(2), "encoder_hidden_states": array(2, 5, 24)} | changes
    return jax.eval_shape(lambda p, i: model.apply({"params": p}, **i), model.shapes(), inputs)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 3)])
def test_output_has_the_size_of_the_input(size: tuple[int, int]) -> None:
    assert trace(UNET, sample=jax.ShapeDtypeStruct((2, *size, 4), jnp.float32)).shape == (2, *size, 4)


def conditions(ids: int, **more: Any) -> dict[str, Any]:
    shapes = {"text_embeds": jax.ShapeDtypeStruct((2, 20), jnp.float32)}
    return shapes | {"time_ids": jax.ShapeDtypeStruct((2, ids), jnp.float32)} | more


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (UNET, {"sample": jax.ShapeDtypeStruct((2, 4, 8, 8), jnp.float32)}, r"\[B,h,w,4\] \(channel-last\)"),
        (UNET, {"sample": jax.ShapeDtypeStruct((8, 8, 4), jnp.float32)}, r"got \(8, 8, 4\)"),
        # Twice as many texts would be read as one text of twice the length, and one text would be shared out.
        (UNET, {"encoder_hidden_states": jax.ShapeDtypeStruct((4, 5, 24), jnp.float32)}, r"B=2, got \(4, 5, 24\)"),
        (UNET, {"encoder_hidden_states": jax.ShapeDtypeStruct((1, 6, 24), jnp.float32)}, r"B=2, got \(1, 6, 24\)"),
        (UNET, {"encoder_hidden_states": jax.ShapeDtypeStruct((6, 24), jnp.float32)}, r"\[B,L,24\]"),
        (UNET, {"encoder_hidden_states": jax.ShapeDtypeStruct((2, 5, 32), jnp.float32)}, r"\[B,L,24\]"),
        (UNET.replace(num_class_embeds=10), {}, "needs class_labels"),
        (XL, {}, "needs added_cond_kwargs"),
        (XL, {"added_cond_kwargs": {"text_embeds": jax.ShapeDtypeStruct((2, 20), jnp.float32)}}, "needs added_cond"),
        (XL, {"added_cond_kwargs": conditions(5)}, "make a vector of 60, but this network takes 68"),
        (UNET.replace(norm_num_groups=5), {}, "16 channels cannot be split into 5 groups"),
        (UNET.replace(num_attention_heads=3), {}, "width 16 cannot be split into 3"),
    ],
)
def test_wrong_inputs_are_refused_while_tracing(config: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(config, **changes)


SKIPS = [(2, 8, 8, 16), (2, 8, 8, 16), (2, 4, 4, 16), (2, 4, 4, 32)]
"""The tensors that the downward path of ``UNET`` hands over, for a sample of 8 by 8."""


def residuals(*shapes: tuple[int, ...]) -> dict[str, Any]:
    return {"down_block_additional_residuals": [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (residuals(*SKIPS[:3]), "down_block_additional_residuals must be 4 arrays for this network, got 3"),
        (
            residuals(*SKIPS[:3], (2, 8, 8, 32)),
            r"residuals\[3\] must be \(2, 4, 4, 32\) \(or pooled, \(2, 1, 1, 32\)\)",
        ),
        (residuals((1, 8, 8, 16), *SKIPS[1:]), r"residuals\[0\] must be \(2, 8, 8, 16\) .*, got \(1, 8, 8, 16\)"),
        (
            {"mid_block_additional_residual": jax.ShapeDtypeStruct((2, 4, 4, 16), jnp.float32)},
            r"mid_block_additional_residual must be \(2, 4, 4, 32\)",
        ),
    ],
)
def test_residuals_that_do_not_fit_are_refused_while_tracing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(UNET, **changes)


def test_residuals_are_added_where_they_belong(rng: np.random.Generator) -> None:
    """Zeros change nothing, each residual changes something, and a pooled one counts at every position."""
    model = UNet2DConditionModel(UNET)
    params = random_params(model.shapes(), rng)
    inputs = {
        "sample": jnp.asarray(rng.standard_normal((2, 8, 8, 4)), jnp.float32),
        "timesteps": jnp.array([10, 900]),
        "encoder_hidden_states": jnp.asarray(rng.standard_normal((2, 5, 24)), jnp.float32),
    }
    run = jax.jit(
        lambda down, middle: model.apply(
            {"params": params},
            **inputs,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        )
    )
    plain = jax.jit(model.apply)({"params": params}, **inputs)
    zeros = [jnp.zeros(shape) for shape in [*SKIPS, SKIPS[-1]]]
    np.testing.assert_allclose(run(zeros[:-1], zeros[-1]), plain, atol=1e-5)
    pooled = [jnp.asarray(rng.standard_normal((2, 1, 1, zero.shape[-1])), jnp.float32) for zero in zeros]
    full = [jnp.broadcast_to(one, zero.shape) for one, zero in zip(pooled, zeros, strict=True)]
    for i in range(len(zeros)):
        given = [*zeros[:i], full[i], *zeros[i + 1 :]]
        assert np.abs(run(given[:-1], given[-1]) - plain).max() > 0.01
    np.testing.assert_allclose(run(pooled[:-1], pooled[-1]), run(full[:-1], full[-1]), atol=1e-5)


def test_tree_does_not_depend_on_the_size_of_example_inputs() -> None:
    model = UNet2DConditionModel(XL)
    inputs = {
        "sample": jnp.zeros((3, 8, 10, 4)),
        "timesteps": jnp.zeros(3),
        "encoder_hidden_states": jnp.zeros((3, 7, 24)),
        "added_cond_kwargs": {"text_embeds": jnp.zeros((3, 20)), "time_ids": jnp.zeros((3, 6))},
    }
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs)["params"])
    assert tree == model.shapes()


def test_no_guidance_embedding_means_zero(rng: np.random.Generator) -> None:
    embed = TimestepEmbedding(12, cond_dim=4)
    x = jnp.asarray(rng.standard_normal((2, 6)), jnp.float32)
    shapes = jax.eval_shape(embed.init, jax.random.key(0), x)
    params = random_params(shapes, rng)
    np.testing.assert_array_equal(embed.apply(params, x), embed.apply(params, x, jnp.zeros((2, 4))))
    assert not np.allclose(embed.apply(params, x), embed.apply(params, x, jnp.ones((2, 4))))


@pytest.mark.parametrize(("flip", "shift", "dim"), [(True, 0, 8), (False, 1, 8), (True, 0, 7)])
def test_sinusoids_are_unit_circles(flip: bool, shift: int, dim: int) -> None:
    """A frequency is a point on the unit circle: the first turns by a radian a step, the last by 1/10000 (shift 1)."""
    half = dim // 2
    waves = np.asarray(sinusoidal_embedding(jnp.arange(5), dim, flip_sin_to_cos=flip, freq_shift=shift))
    cos, sin = (waves[:, :half], waves[:, half : 2 * half]) if flip else (waves[:, half : 2 * half], waves[:, :half])
    np.testing.assert_allclose(cos**2 + sin**2, 1, rtol=1e-6)
    np.testing.assert_allclose(np.angle(cos[1] + 1j * sin[1])[0], 1, rtol=1e-6)
    if shift:
        np.testing.assert_allclose(np.angle(cos[1] + 1j * sin[1])[-1], 1e-4, rtol=1e-3)
    assert waves.shape == (5, dim)
    assert not waves[:, 2 * half :].any()


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (5, 3)])
def test_nearest_takes_the_pixel_below(size: tuple[int, int]) -> None:
    x = jnp.arange(4 * 3.0).reshape(1, 4, 3, 1)
    rows, columns = (np.floor(np.arange(n) * m / n).astype(int) for n, m in zip(size, (4, 3)))
    np.testing.assert_array_equal(nearest(x, size)[0, :, :, 0], np.asarray(x)[0][rows][:, columns, 0])
