"""Laws of tiling: pointwise functions and constants survive exactly, seams are small, memory is that of a tile."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffuse_jax.models import AutoencoderKL, AutoencoderKLConfig
from diffuse_jax.models.resnet import nearest
from diffuse_jax.models.tiling import blend_weights, tile_starts, tiled_decode, tiled_encode
from tests.models.filling import random_params

SMALL = AutoencoderKLConfig(
    block_out_channels=(8, 8, 16),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    norm_num_groups=4,
    mid_block_add_attention=False,
)


def enlarge(x: jax.Array) -> jax.Array:
    """A decoder whose every pixel depends on its own latent alone."""
    return nearest(jnp.tanh(2 * x), (4 * x.shape[1], 4 * x.shape[2]))


@settings(max_examples=60)
@given(length=st.integers(1, 200), tile=st.integers(1, 40), data=st.data())
def test_tiles_cover_and_weights_add_up_to_one(length: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tile - 1))
    tile = min(tile, length)
    overlap = min(overlap, tile - 1)
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0
    assert starts[-1] + tile == length
    assert np.all(starts[:-1] + tile - starts[1:] >= overlap)
    total = np.zeros(length)
    for start, weights in zip(starts, blend_weights(starts, length, tile, overlap)):
        assert np.all(weights > 0)
        total[start : start + tile] += weights
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_outside_of_jit_nothing_is_compiled_twice(rng: np.random.Generator, caplog: pytest.LogCaptureFixture) -> None:
    latents, traces = jnp.asarray(rng.standard_normal((1, 20, 9, 3)), jnp.float32), []

    @jax.jit
    def decode(z: jax.Array) -> jax.Array:
        traces.append(z.shape)
        return enlarge(z)

    with jax.log_compiles():
        outputs, compiled = [], []
        for z in (latents, 2 * latents):
            caplog.clear()
            outputs.append(tiled_decode(lambda z: decode(z), z, tile=12, overlap=3, scale=4))
            compiled.append(sum("Compiling" in record.getMessage() for record in caplog.records))
    assert traces == [(1, 12, 9, 3)]
    assert compiled[0] > 0 == compiled[1]
    for z, output in zip((latents, 2 * latents), outputs):
        np.testing.assert_allclose(output, enlarge(z), atol=1e-6)


def test_parameters_may_be_traced_where_latents_are_not(rng: np.random.Generator) -> None:
    latents = jnp.asarray(rng.standard_normal((1, 20, 9, 3)), jnp.float32)
    scaled = jax.jit(lambda factor: tiled_decode(lambda z: factor * enlarge(z), latents, 12, 3, 4))
    np.testing.assert_allclose(scaled(2.0), 2 * enlarge(latents), atol=1e-6)
    assert str(jax.make_jaxpr(scaled)(2.0)).count("scan") == 1, "one loop, not each tile by itself"


def test_blend_is_linear_where_two_tiles_overlap() -> None:
    weights = blend_weights(np.array([0, 6]), 16, 10, 4)
    np.testing.assert_allclose(weights[1, :4], np.arange(1, 5) / 5, atol=1e-6)
    np.testing.assert_allclose(weights[0, :6], 1, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(20, 33), (31, 8)])
def test_pointwise_decoder_is_reproduced(rng: np.random.Generator, height: int, width: int) -> None:
    latents = jnp.asarray(rng.standard_normal((2, height, width, 3)), jnp.float32)
    tiled = jax.jit(lambda z: tiled_decode(enlarge, z, tile=12, overlap=3, scale=4))(latents)
    np.testing.assert_allclose(tiled, enlarge(latents), atol=1e-6)


def test_constant_image_stays_constant() -> None:
    tiled = tiled_decode(enlarge, jnp.full((1, 30, 17, 2), 0.3), tile=8, overlap=5, scale=4)
    np.testing.assert_allclose(tiled, np.tanh(0.6), atol=1e-6)


def test_images_of_one_tile_take_the_plain_way(rng: np.random.Generator) -> None:
    calls = []
    decode = lambda z: calls.append(z.shape) or enlarge(z)
    latents = jnp.asarray(rng.standard_normal((1, 8, 5, 2)), jnp.float32)
    np.testing.assert_array_equal(tiled_decode(decode, latents, tile=8, overlap=2, scale=4), enlarge(latents))
    assert calls == [latents.shape]


def test_encoding_blends_every_part_of_the_posterior(rng: np.random.Generator) -> None:
    images = jnp.asarray(rng.standard_normal((2, 4 * 21, 4 * 10, 3)), jnp.float32)
    encode = lambda x: (x[:, ::4, ::4], (2 * x[:, ::4, ::4, :1]).astype(jnp.bfloat16))
    mean, other = jax.jit(lambda x: tiled_encode(encode, x, tile=8, overlap=2, scale=4))(images)
    np.testing.assert_allclose(mean, encode(images)[0], atol=1e-6)
    assert other.dtype == jnp.bfloat16
    np.testing.assert_allclose(other.astype(jnp.float32), encode(images)[1].astype(jnp.float32), rtol=1e-2)


@pytest.fixture(scope="module")
def vae() -> tuple[AutoencoderKL, dict]:
    model = AutoencoderKL(SMALL)
    return model, random_params(model.shapes(), np.random.default_rng(1))


def test_overlap_hides_the_seams_of_an_autoencoder(vae: tuple[AutoencoderKL, dict], rng: np.random.Generator) -> None:
    """Tiles differ from the whole by zeros at their edges, which blending hides, and by their norms' statistics."""
    model, params = vae
    decode = jax.jit(lambda z: model.apply({"params": params}, z, method="decode"))
    latents = jnp.asarray(rng.standard_normal((1, 48, 48, 4)), jnp.float32)
    full = np.asarray(decode(latents))
    error = lambda overlap: np.asarray(tiled_decode(decode, latents, tile=32, overlap=overlap, scale=4)) - full
    hard, blended = error(0), error(16)
    assert np.abs(blended).mean() < 0.05 * full.std()
    step = lambda difference: np.abs(np.diff(difference, axis=1)).max()  # a jump that the whole image does not have
    assert step(blended) < step(hard) / 4


def test_memory_is_that_of_a_tile(vae: tuple[AutoencoderKL, dict]) -> None:
    model, params = vae
    decode = lambda z: model.apply({"params": params}, z, method="decode")
    latents = jax.ShapeDtypeStruct((1, 128, 128, 4), jnp.float32)
    temporary = lambda f: jax.jit(f).lower(latents).compile().memory_analysis().temp_size_in_bytes
    tiled = temporary(lambda z: tiled_decode(decode, z, tile=32, overlap=8, scale=4))
    assert tiled < temporary(decode) / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 8, "overlap": 8}, "overlap must be 0 to 7"),
        ({"tile": 8, "overlap": 2, "scale": 2}, "is scale right"),
    ],
)
def test_bad_tilings_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiled_decode(enlarge, jnp.zeros((1, 20, 20, 2)), **options)


def test_images_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        tiled_encode(lambda x: x, jnp.zeros((1, 500, 512, 3)))
