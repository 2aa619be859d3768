"""The decoders of Kandinsky 2.2 against PyTorch diffusers, with its own noise."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from diffuse_jax.pipelines import KandinskyV22InpaintPipeline
from tests.oracle import kandinsky
from tests.oracle.kandinsky import compare, embeddings

folders, torch, diffusers = kandinsky.folders, kandinsky.torch, kandinsky.diffusers
EDGE, SHORT = kandinsky.EDGE, kandinsky.SHORT
HINTED = {"in_channels": 8, "addition_embed_type": "image_hint"}


opened = functools.partial(kandinsky.opened_from, folders.kandinsky_decoder)


def test_decoder(tmp_path: Path) -> None:
    pipe, twin = opened("KandinskyV22Pipeline", tmp_path / "model")
    compare(pipe, twin, **embeddings(2), **SHORT)
    assert pipe.programs.compilations == 1
    compare(pipe, twin, **embeddings(2), **SHORT | {"num_inference_steps": 4}, guidance_scale=2.0, seed=6)
    assert pipe.programs.compilations == 1, "steps, scales and seeds are data"
    for changes, message in [
        ({"image_embeds": None}, r"give image_embeds \[N,32\]"),
        ({"negative_image_embeds": None}, r"give negative_image_embeds \[N,32\]"),
        ({"image_embeds": np.zeros((1, 7), np.float32)}, r"image_embeds must be floating-point \[N,32\], got float32"),
        ({"negative_image_embeds": np.zeros((3, 32), np.float32)}, "1 image_embeds, but 3 negative_image_embeds"),
        ({"height": 0}, "height must be from 1 to 65536, got 0"),
        ({"prompt": "a cat"}, "has no argument prompt"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            pipe.request(**embeddings() | changes)
    image, other = folders.images(1, EDGE)[0], KandinskyV22InpaintPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match=r"4 input channels .* not a UNet for KandinskyV22InpaintPipeline"):
        other.request(**embeddings(), image=image, mask_image=image)


@pytest.mark.slow
def test_decoder_of_other_sizes_and_without_guidance(tmp_path: Path) -> None:
    pipe, twin = opened("KandinskyV22Pipeline", tmp_path / "model")
    compare(pipe, twin, **embeddings(1), **SHORT | {"height": 60, "width": 65}, num_images_per_prompt=2)
    compare(pipe, twin, **embeddings(1), **SHORT, guidance_scale=1.0)
    pipe.save_pretrained(tmp_path / "again")
    compare(pipe, type(twin).from_pretrained(tmp_path / "again"), **embeddings(1), **SHORT)


def test_image_to_image(tmp_path: Path) -> None:
    pipe, twin = opened("KandinskyV22Img2ImgPipeline", tmp_path / "model")
    request = embeddings() | SHORT | {"image": folders.images(1, 80)[0]}
    compare(pipe, twin, **request, strength=0.7)
    assert pipe.programs.compilations == 1
    compare(pipe, twin, **request | {"num_inference_steps": 5}, strength=0.5, guidance_scale=2.0)
    assert pipe.programs.compilations == 1, "the strength is data"


def test_inpainting(tmp_path: Path) -> None:
    pipe, twin = opened("KandinskyV22InpaintPipeline", tmp_path / "model", in_channels=9)
    image, mask = folders.images(1, EDGE)[0], np.zeros((EDGE, EDGE), np.float32)
    mask[16:40, 24:48] = 1
    request = embeddings() | SHORT | {"image": image}
    compare(pipe, twin, {"mask_image": mask.copy()}, **request, mask_image=mask)
    assert pipe.programs.compilations == 1
    corner = np.zeros_like(mask)
    corner[:8, 56:] = 1
    theirs = {"mask_image": corner.copy()}
    compare(pipe, twin, theirs, **request | {"num_inference_steps": 4, "guidance_scale": 2.0}, mask_image=corner)
    assert pipe.programs.compilations == 1, "the mask is data"


@pytest.mark.slow
def test_a_hint_to_follow(tmp_path: Path) -> None:
    hint = np.asarray(folders.images(2, EDGE)[1], np.float32)[None] / 255
    theirs = {"hint": torch.tensor(np.moveaxis(hint, -1, 1))}
    pipe, twin = opened("KandinskyV22ControlnetPipeline", tmp_path / "model", **HINTED)
    compare(pipe, twin, theirs, **embeddings(), **SHORT, hint=hint)
    plain = pipe(**embeddings(), **SHORT, hint=np.zeros_like(hint), seed=0, output_type="np").images
    follows = pipe(**embeddings(), **SHORT, hint=hint, seed=0, output_type="np").images
    assert np.abs(plain - follows).mean() > 1e-3, "the hint matters"
    pipe, twin = opened("KandinskyV22ControlnetImg2ImgPipeline", tmp_path / "images", **HINTED)
    request = embeddings() | SHORT | {"image": folders.images(1, EDGE)[0], "strength": 0.7}
    compare(pipe, twin, theirs, **request, hint=hint)
