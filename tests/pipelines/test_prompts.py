"""Weighted and long prompts in a whole run: what is compiled, and with what they combine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffuse_jax.pipelines import modifiers
from diffuse_jax.pipelines.families.clip import encode_ids
from diffuse_jax.pipelines.running import apply
from diffuse_jax.text.prompts import Style
from tests.pipelines import tiny

CALL: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "output_type": "latent"}

LONG = CALL | {"prompt_syntax": "a1111", "long_prompts": True, "negative_prompt": "x"}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.pipeline()


def test_other_weights_compile_nothing(pipe: Any) -> None:
    images = [
        pipe(f"a (bc){weight} (d)0.7", prompt_syntax="compel", negative_prompt="(x)1.2", **CALL).images
        for weight in (1.3, 0.4, 2)
    ]
    assert pipe.programs.compilations == 1
    assert np.abs(images[0] - images[1]).max() > 1e-3
    pipe("a b++", prompt_syntax="compel", negative_prompt="x y z- w", **CALL)
    assert pipe.programs.compilations == 1, "the number of versions is rounded up"


def test_weights_equal_the_embeddings_that_they_stand_for(pipe: Any) -> None:
    """Also beside a negative prompt as text, which is padded to the length of the embeddings."""
    style = Style("a1111", long=True)
    tokens = pipe.family.tokens(pipe, {"text_encoder": ["abcdef (ghi:1.5) jklmno pqr"]}, style)
    embeds = np.asarray(apply(pipe, encode_ids, pipe.family.text_part(pipe, None, style), tokens)["states"])
    assert embeds.shape[1] == 32
    wanted = pipe("abcdef (ghi:1.5) jklmno pqr", **LONG).images
    np.testing.assert_allclose(pipe(prompt_embeds=embeds, **LONG).images, wanted, atol=1e-4)


def test_prompts_of_modifiers_have_the_syntax_of_the_call(pipe: Any) -> None:
    """A region with the call's own prompt changes nothing, and one of another length is padded."""
    white = np.ones((16, 16), np.float32)
    region = lambda prompt: modifiers.Regions([prompt], [white])
    short, long = "a (b:1.4)", "abcdefghijklmn (opqr:1.4)"
    plain = pipe(long, **LONG).images
    np.testing.assert_allclose(pipe(long, modifiers=region(long), **LONG).images, plain, atol=1e-4)
    np.testing.assert_allclose(pipe(short, modifiers=region(long), **LONG).images, plain, atol=1e-4)
    request = pipe.request(short, modifiers=modifiers.Regions([long, short], [white] * 2), **LONG)
    assert request.rows["ids"]["text_encoder"].values.shape == (1, 4, 1, 2, 16)


def test_mistakes_are_found_before_anything_is_compiled(pipe: Any) -> None:
    before = pipe.programs.compilations
    for call, message in [
        ({"prompt_syntax": "comfy"}, "prompt_syntax must be None or one of a1111, compel, got 'comfy'"),
        ({"prompt_syntax": "compel", "negative_prompt": "(a"}, "has no partner"),
        ({"prompt_syntax": "a1111", "negative_prompt": "(a:1e5)"}, "a weight must be from -1000 to 1000, got 1e5"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe("a", **call)
    with pytest.raises(ValueError, match="long_prompts must be True or False"):
        pipe("a", long_prompts=3)
    assert pipe.programs.compilations == before
