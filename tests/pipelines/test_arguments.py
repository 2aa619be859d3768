"""Numbers among the arguments of a call: those of NumPy and JAX count as Python's, anything else is refused by name."""

from __future__ import annotations

from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.pipelines import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffuse_jax.pipelines.arguments import plain_arguments
from diffuse_jax.pipelines.options import GuidedTextOptions, TextOptions
from diffuse_jax.pipelines.running import Request
from tests.pipelines.tiny import pipeline


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return pipeline()


@pytest.mark.parametrize("two", [2, np.int64(2), np.array(2), jnp.int32(2)])
def test_integers_of_any_library(pipe: StableDiffusionPipeline, two: Any) -> None:
    request = pipe.request("a", num_images_per_prompt=two, num_inference_steps=two, seed=0)
    assert (request.images, int(request.plan.num_evaluations)) == (2, 2)


@pytest.mark.parametrize("half", [0.5, np.float32(0.5), np.array(0.5), jnp.float32(0.5)])
def test_numbers_of_any_library(pipe: StableDiffusionPipeline, half: Any) -> None:
    image = np.zeros((16, 16, 3), np.float32)
    request = StableDiffusionImg2ImgPipeline.from_pipe(pipe).request("a", image, strength=half, num_inference_steps=4)
    assert int(request.plan.num_evaluations) == 2


@pytest.mark.parametrize("name", ["num_images_per_prompt", "num_inference_steps", "height", "clip_skip", "batch_size"])
@pytest.mark.parametrize("wrong", [1.5, 2.0, "x", "2", True, [2], 10**400])
def test_what_is_no_integer_is_named(pipe: StableDiffusionPipeline, name: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be an integer .*, got "):
        pipe("a", **{"num_inference_steps": 1, name: wrong})


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("eta", "x", "eta must be a finite number, got 'x'"),
        ("eta", float("nan"), "eta must be a finite number, got nan"),
        ("guidance_scale", "x", "guidance_scale must be a number, or a list of numbers, got 'x'"),
        ("guidance_scale", [None], "guidance_scale must be a number, or a list of numbers"),
        ("guidance_scale", None, "guidance_scale must be a number, or a list of numbers, got None"),
        ("guidance_scale", "7", "guidance_scale must be a number, or a list of numbers, got '7'"),
        ("num_images_per_prompt", None, "num_images_per_prompt must be an integer"),
        ("generator", object(), "has no argument generator; give seed="),
        ("long_prompts", "false", "long_prompts must be True or False, got 'false'"),
        ("timesteps", ["x"], "timesteps must be a list of numbers"),
        ("latents", "x", "latents must be an array of numbers"),
        ("output_type", np.zeros(2), "output_type must be one of pil, np, jax, latent, got array"),
        ("prompt_syntax", np.zeros(2), "prompt_syntax must be None or one of"),
        ("prompt_syntax", ["a1111"], "prompt_syntax must be None or one of"),
        ("seed", True, "a seed must be an integer"),
        ("seed", b"7", "a seed must be an integer"),
        ("seed", 2**32, 'noise="torch" takes seeds up to'),
        ("height", 10**6, "height must be at most 65536, got 1000000"),
    ],
)
def test_what_is_no_number_is_named(pipe: StableDiffusionPipeline, name: str, wrong: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        pipe.request("a", **{name: wrong})


@pytest.mark.parametrize("wrong", ["x", [np.zeros((3, 16)), np.zeros((2, 16))], np.zeros((1, 3, 16), complex)])
def test_embeddings_must_be_one_array(pipe: StableDiffusionPipeline, wrong: Any) -> None:
    with pytest.raises(TypeError, match="prompt_embeds must be an array of numbers, got "):
        pipe.request(prompt_embeds=wrong)


def test_images_have_a_largest_size(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="an image may have 268435456 pixels, got 32768x32768"):
        pipe.request("a", height=1 << 15, width=1 << 15)


def test_arguments_of_a_pipeline_of_the_users_own() -> None:
    """Its annotations say what is checked, and the names of positional arguments are known."""

    class OwnPipeline(StableDiffusionPipeline):
        def compose(  # type: ignore[override]
            self, prompt: str, copies: int = 1, *, share: float | None = None, **options: Unpack[GuidedTextOptions]
        ) -> Request:
            return super().compose(prompt, **options)

    assert plain_arguments(OwnPipeline, None, ("a", np.int8(3)), {"share": jnp.float32(0.5), "mine": "x"}) == (
        ["a", 3],
        {"share": 0.5, "mine": "x"},
    )
    with pytest.raises(ValueError, match="copies must be an integer"):
        plain_arguments(OwnPipeline, None, ("a", 1.5), {})
    assert TextOptions.__annotations__.keys() <= GuidedTextOptions.__annotations__.keys()


def test_each_prompt_keeps_its_own_image(pipe: StableDiffusionPipeline) -> None:
    """Images of a prompt are consecutive, and so are the rows of the image and mask that were given for it."""
    black, white = (np.full((16, 16, 3), value, np.float32) for value in (0.0, 1.0))
    call = {"num_images_per_prompt": 2, "num_inference_steps": 2, "seed": 0}
    request = StableDiffusionImg2ImgPipeline.from_pipe(pipe).request(["a", "b"], [black, white], **call)
    assert [float(row.mean()) for row in request.rows["image"]] == [-1, -1, 1, 1]
    inpaint = StableDiffusionInpaintPipeline.from_pipe(pipe)
    size = {"height": 16, "width": 16}
    request = inpaint.request(["a", "b"], [black, white], [white[..., 0], black[..., 0]], **call, **size)
    assert [float(row.mean()) for row in request.rows["image"]] == [-1, -1, 1, 1]
    assert [float(row.mean()) for row in request.rows["mask"]] == [1, 1, 0, 0]
