"""T2I-Adapters beside everything else that a call can have, and what is refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffuse_jax.models import ControlNetModel, T2IAdapter, T2IAdapterConfig
from diffuse_jax.pipelines import StableDiffusionAdapterPipeline, modifiers
from diffuse_jax.pipelines.options import ControlOptions, split_options
from diffuse_jax.pipelines.parts.windows import Windows
from diffuse_jax.pipelines.tasks import controlled
from diffuse_jax.sharding import make_mesh
from tests.models.filling import random_params
from tests.pipelines.tiny import pipeline

EDGE = 16
CALL: dict[str, Any] = {"seed": 0, "num_inference_steps": 3, "output_type": "latent"}


def adapter(seed: int = 0, **changes: Any) -> tuple[T2IAdapter, Any]:
    net = T2IAdapter(T2IAdapterConfig(**{"channels": (16, 32), "num_res_blocks": 1, "downscale_factor": 2} | changes))
    return net, random_params(net.shapes(), np.random.default_rng(seed))


def image(seed: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).random((EDGE, EDGE, channels), np.float32)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionAdapterPipeline:
    return StableDiffusionAdapterPipeline.from_pipe(pipeline(), adapter=adapter())


@pytest.fixture(scope="module")
def both(pipe: StableDiffusionAdapterPipeline) -> StableDiffusionAdapterPipeline:
    return StableDiffusionAdapterPipeline.from_pipe(pipe, adapter=[adapter(1, in_channels=1), adapter(2)])


class WithControlNet(StableDiffusionAdapterPipeline):
    """Both kinds of control, which nothing but a few lines need."""

    required = (*StableDiffusionAdapterPipeline.required, "controlnet")

    def compose(self, prompt: Any = None, image: Any = None, control_image: Any = None, **options: Any) -> Any:
        control, others = split_options(options, ControlOptions)
        return controlled(super().compose(prompt, image, **others), self, control_image, control, scale=1.0)


@pytest.mark.slow
def test_a_weight_of_zero_is_no_adapter_whatever_else_there_is(pipe: StableDiffusionAdapterPipeline) -> None:
    unet, params = pipe.components["unet"], pipe.params["unet"]
    net = ControlNetModel.from_unet(unet, params, conditioning_embedding_out_channels=(4, 8))[0]
    control = net, random_params(net.shapes(), np.random.default_rng(3))
    whole = WithControlNet.from_pipe(pipe, controlnet=control)
    given = [modifiers.FreeU(), modifiers.DeepCache(2), modifiers.GuidanceInterval(0.2)]
    call = CALL | {"modifiers": given, "control_image": image(5)}
    off = whole("ab", image(0), adapter_conditioning_scale=0.0, **call).images
    compiled = whole.programs.compilations
    np.testing.assert_array_equal(off, whole("ab", image(1), adapter_conditioning_factor=0.0, **call).images)
    on = whole("ab", image(0), **call).images
    halfway = whole("ab", image(0), adapter_conditioning_factor=0.67, **call).images
    assert whole.programs.compilations == compiled, "scales and factors are data"
    assert np.abs(on - off).mean() > 1e-3
    assert np.abs(on - halfway).mean() > 1e-5
    again = whole("ab", image(0), control_image=image(5), controlnet_conditioning_scale=0.0, **CALL).images
    np.testing.assert_allclose(again, pipe("ab", image(0), **CALL).images, rtol=1e-4, atol=1e-4)


def test_several_are_added_by_weight_and_one_number_is_for_all(both: StableDiffusionAdapterPipeline) -> None:
    images = [image(0, 1), image(1)]
    equal = both("ab", images, adapter_conditioning_scale=0.5, **CALL).images
    np.testing.assert_array_equal(both("ab", images, adapter_conditioning_scale=[0.5, 0.5], **CALL).images, equal)
    first = both("ab", [images[0], image(9)], adapter_conditioning_scale=[0.5, 0.0], **CALL).images
    np.testing.assert_allclose(
        first, both("ab", [images[0], images[1]], adapter_conditioning_scale=[0.5, 0], **CALL).images, atol=1e-6
    )
    assert np.abs(first - equal).mean() > 1e-3


def test_each_prompt_has_its_image_on_every_mesh(pipe: StableDiffusionAdapterPipeline) -> None:
    call = CALL | {"seed": [4, 5, 6, 7], "num_images_per_prompt": 2}
    images = [image(0), image(1)]
    found = pipe(["ab", "cd"], images, **call).images
    alone = pipe("cd", images[1], **CALL | {"seed": [6]}).images
    np.testing.assert_allclose(found[2:3], alone, rtol=1e-4, atol=1e-4)
    spread = pipe.replace(mesh=make_mesh(data=2, devices=jax.devices()[:2]))
    np.testing.assert_allclose(spread(["ab", "cd"], images, **call).images, found, rtol=1e-4, atol=1e-4)


def test_pillow_images_get_the_channels_of_the_adapter(both: StableDiffusionAdapterPipeline) -> None:
    colours = Image.fromarray((image(0) * 255).astype(np.uint8))
    rows = both.request("ab", [colours, colours.convert("L")], **CALL).rows["adapter_images"]
    assert [x.shape[-1] for x in rows] == [1, 3]
    np.testing.assert_array_equal(rows[0][0, ..., 0], np.asarray(colours.convert("L"), np.float32) / 255)


def test_windows_cut_the_features_of_every_resolution() -> None:
    rng = np.random.default_rng(0)
    x, fine, coarse = (jnp.asarray(rng.random((1, n, n, 1), np.float32)) for n in (16, 16, 8))
    raised = lambda y: y.repeat(2, axis=1).repeat(2, axis=2)
    inner = lambda params, rows, x, step: x * rows["adapter_features"][0] + raised(rows["adapter_features"][1])
    for circular in (False, True):
        found = Windows(inner, 8, 4, 3, circular)({}, {"adapter_features": (fine, coarse)}, x, None)
        np.testing.assert_allclose(found, x * fine + raised(coarse), atol=1e-6)
    with pytest.raises(ValueError, match=r"must be multiples of 2 with this T2I-Adapter, which has features of 8x8"):
        Windows(inner, 8, 3)({}, {"adapter_features": (fine, coarse)}, x, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "give image: a PIL image"),
        ({"image": image(0)[..., :1]}, r"control image must be 16x16 with 3 channels .* got an array of shape"),
        ({"image": [image(0)] * 3}, "control image has 3 images for 2 prompts"),
        ({"image": [image(0), image(0)[:8]]}, "control image must be 16x16"),
        ({"adapter_conditioning_scale": [1.0, 2.0]}, "has 2 entries for 1 T2I-Adapters; give one number, or one per"),
        ({"adapter_conditioning_factor": 1.5}, "adapter_conditioning_factor must be one number from 0 to 1, got 1.5"),
        (
            {"adapter_conditioning_factor": [0.5, 1.0]},
            r"adapter_conditioning_factor must be a finite number, got \[0.5, 1.0\]",
        ),
        ({"adapter_conditioning_factor": "all"}, "adapter_conditioning_factor must be a finite number, got 'all'"),
        ({"adapter_conditioning_scale": np.nan}, "adapter_conditioning_scale must be finite, got nan"),
        ({"height": 17}, "height must be a multiple of 2, got 17"),
        ({"height": 0}, "height must be a multiple of 2, got 0"),
    ],
)
def test_what_is_refused_with_one(pipe: StableDiffusionAdapterPipeline, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        pipe.request(["ab", "cd"], **{"image": image(0)} | changes)


def test_what_is_refused_with_several(both: StableDiffusionAdapterPipeline) -> None:
    for images, given in ((image(0), "ndarray"), ([image(0)], "1")):
        with pytest.raises(ValueError, match=f"there are 2 T2I-Adapters; give a list .* got {given}"):
            both.request("ab", images)
    unlike = StableDiffusionAdapterPipeline.from_pipe(both, adapter=[adapter(), adapter(channels=(16, 16))])
    with pytest.raises(ValueError, match="must have features of the same sizes, got full_adapter"):
        unlike.request("ab", [image(0), image(1)])
    coarse = StableDiffusionAdapterPipeline.from_pipe(both, adapter=adapter(downscale_factor=8))
    with pytest.raises(ValueError, match="height and width must be multiples of 8 for this T2I-Adapter, got 18"):
        coarse.request("ab", image(0), height=18)


def test_an_adapter_for_another_unet_is_refused(pipe: StableDiffusionAdapterPipeline) -> None:
    wide = StableDiffusionAdapterPipeline.from_pipe(pipe, adapter=adapter(channels=(16, 64)))
    with pytest.raises(ValueError, match=r"for another UNet: its features have \(16, 64\) channels"):
        wide("a", image(0), **CALL)
