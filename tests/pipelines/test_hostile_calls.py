"""What is wrong about a call is said in one line that names the argument, before anything is compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffuse_jax.pipelines import (
    IFImg2ImgPipeline,
    IFInpaintingSuperResolutionPipeline,
    StableDiffusionDiffEditPipeline,
)
from diffuse_jax.pipelines.programs import Programs
from tests.pipelines import tiny, tiny_if

PLAIN = tiny.pipeline()
STAGES = [stage.replace(programs=Programs()) for stage in tiny_if.cascade(PLAIN)]
SHORT: dict[str, Any] = {"prompt": "a", "num_inference_steps": 4}
SMALL, LARGE = Image.new("RGB", (16, 16)), Image.new("RGB", (32, 32))
EMBEDS = dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), np.zeros((1, 77, 24), np.float32))
NAN = np.full((1, 77, 24), np.nan, np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (SHORT | {"modifiers": 3}, "modifiers must be one or several of pipelines.modifiers, got 3"),
        (SHORT | {"modifiers": [len, 3]}, r"modifiers must be one or several .*, got \[<built-in function len>, 3\]"),
        (SHORT | {"method": 3}, "method must be a function from the pipeline's method to another, got 3"),
        (SHORT | {"rows": [1]}, r"rows must be a dict, name -> array .*, got \[1\]"),
        (EMBEDS | {"prompt_embeds": 5.0}, "prompt_embeds must be an array with an entry for each prompt, got 5.0"),
        (EMBEDS | {"prompt_embeds": NAN[:0]}, "prompt_embeds must be an array with an entry for each prompt"),
        (EMBEDS | {"negative_prompt_embeds": NAN}, "negative_prompt_embeds must be finite; 1848 of 1848 numbers"),
        (SHORT | {"latents": np.full((1, 16, 16, 3), np.inf)}, "latents must be finite; 768 of 768"),
        (SHORT | {"callback_on_step_end": 3}, "callback_on_step_end must be a function, got 3"),
    ],
)
def test_a_call(call: dict[str, Any], message: str) -> None:
    first = STAGES[0]
    with pytest.raises((ValueError, TypeError), match=message):
        first(**call)
    assert first.programs.compilations == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, got 0"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt must be an integer"),
        ({"do_classifier_free_guidance": "no"}, "do_classifier_free_guidance must be True or False, got 'no'"),
        ({"clean_caption": "no"}, "clean_caption must be True or False, got 'no'"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 entries for 1 prompts"),
    ],
)
def test_encoding_prompts(call: dict[str, Any], message: str) -> None:
    first = STAGES[0]
    with pytest.raises((ValueError, TypeError), match=message):
        first.encode_prompt("a", **call)
    assert first.programs.compilations == 0


def test_an_array_whose_size_the_network_does_not_take_is_named() -> None:
    """Its height and width are no arguments of the call. Nothing is known about where its channels are."""
    unet = STAGES[0].components["unet"]
    deep = unet.clone(config=unet.config.replace(**tiny_if.SHARED | {
        "block_out_channels": (16, 16), "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    }))  # fmt: skip
    assert deep.config.divisor == 2
    pipe = IFImg2ImgPipeline.from_pipe(STAGES[0], unet=(deep, {}))
    for shape in ((15, 16, 3), (3, 16, 16), (0, 0, 3)):
        message = f"image is {shape[0]}x{shape[1]} pixels .*takes multiples of 2; resize it, or pass a PIL image"
        with pytest.raises(ValueError, match=message):
            pipe.request(**SHORT, image=np.zeros(shape, np.float32))
    repaint = IFInpaintingSuperResolutionPipeline.from_pipe(STAGES[1], unet=(deep, {}))
    with pytest.raises(ValueError, match="original_image is 31x32 pixels"):
        repaint.request(**SHORT, image=SMALL, mask_image=LARGE, original_image=np.zeros((31, 32, 3), np.float32))


@pytest.mark.parametrize("strength", [0, 1.5, -1])
def test_a_strength_has_the_name_of_its_argument(strength: float) -> None:
    edit = StableDiffusionDiffEditPipeline.from_pipe(PLAIN)
    latents, mask = np.zeros((1, 3, 8, 8, 4), np.float32), np.ones((8, 8), np.float32)
    with pytest.raises(ValueError, match=r"^inpaint_strength must lie in \(0, 1\], got"):
        edit.request(**SHORT, mask_image=mask, image_latents=latents, inpaint_strength=strength)
    with pytest.raises(ValueError, match=r"^inpaint_strength must lie in \(0, 1\], got"):
        edit.invert("a", SMALL, inpaint_strength=strength)
    with pytest.raises(ValueError, match=r"^mask_encode_strength must lie in \(0, 1\], got"):
        edit.generate_mask(SMALL, "a", "b", mask_encode_strength=strength)
    assert edit.programs.compilations == 0
