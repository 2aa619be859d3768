"""Text to image, a larger size, image to image: a chain that never leaves the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.pipelines import StableDiffusionImg2ImgPipeline
from diffuse_jax.sharding import make_mesh
from tests.pipelines import tiny

CALL: dict[str, Any] = {"prompt": ["a", "b", "c"], "num_inference_steps": 2, "guidance_scale": 1.0}


@jax.jit
def twice(images: jax.Array) -> jax.Array:
    """Latents or pixels of twice the size."""
    n, height, width, channels = images.shape
    return jax.image.resize(images, (n, 2 * height, 2 * width, channels), "bilinear")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.pipeline()


@pytest.fixture(scope="module")
def refine(pipe: Any) -> Any:
    return StableDiffusionImg2ImgPipeline.from_pipe(pipe)


def chain(pipe: Any, refine: Any, kind: str, between: Callable[[Any], Any] = lambda x: x) -> Any:
    """The recipe; ``between`` sees what goes from one run to the next."""
    first = pipe(seed=[1, 2, 3], output_type=kind, **CALL).images
    larger = between(twice(first))
    return refine(image=larger, strength=0.5, seed=[4, 5, 6], output_type=kind, **CALL).images


@pytest.mark.parametrize("kind", ["latent", pytest.param("jax", marks=pytest.mark.slow)])
def test_it_is_the_same_on_the_device_and_through_host_memory(pipe: Any, refine: Any, kind: str) -> None:
    with jax.transfer_guard("disallow"):
        found = chain(pipe, refine, kind)
    assert isinstance(found, jax.Array)
    assert found.shape == {"latent": (3, 16, 16, 4), "jax": (3, 32, 32, 3)}[kind]
    compiled = pipe.programs.compilations
    np.testing.assert_array_equal(found, chain(pipe, refine, kind, np.asarray))
    assert pipe.programs.compilations == compiled


def test_latents_and_pixels_are_handed_over_and_not_copied(refine: Any) -> None:
    latents = jnp.ones((3, 16, 16, 4))
    rows = refine.request(image=latents, **CALL).rows
    assert rows["image_latents"].unsafe_buffer_pointer() == latents.unsafe_buffer_pointer()
    assert isinstance(refine.request(image=jnp.ones((3, 32, 32, 3)), **CALL).rows["image"], jax.Array)
    one = refine.request(image=jnp.ones((1, 32, 32, 3), jnp.uint8), **CALL).rows["image"]
    assert isinstance(one, jax.Array) and one.shape == (3, 32, 32, 3)


def test_pixels_on_the_device_are_checked(refine: Any) -> None:
    for wrong in (jnp.full((3, 32, 32, 3), 1.5), jnp.full((3, 32, 32, 3), -1.0), jnp.full((3, 32, 32, 3), jnp.nan)):
        with pytest.raises(ValueError, match=r"image as an array must be uint8, or floating-point in \[0, 1\]"):
            refine.request(image=wrong, **CALL)
    with pytest.raises(ValueError, match="must be uint8, or floating-point"):
        refine.request(image=jnp.ones((3, 32, 32, 3), jnp.int32), **CALL)


def test_from_one_set_of_devices_to_another(pipe: Any, refine: Any) -> None:
    """Arrays that are elsewhere are brought along."""
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    explicit = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(explicit, jax.sharding.PartitionSpec("x"))
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16, 16, 4)), jnp.float32)
    call = CALL | {"prompt": ["a"] * 4, "seed": 1, "output_type": "latent"}
    expected = np.asarray(refine(image=latents, **call).images)
    on_mesh = refine.replace(mesh=mesh)
    close = lambda found: np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    close(on_mesh(image=latents, **call).images)
    close(on_mesh(image=jax.device_put(latents, jax.devices()[3]), **call).images)
    close(refine(image=on_mesh(image=latents, **call).images * 0 + latents, **call).images)
    close(refine(image=jax.device_put(latents, sharding), **call).images)
