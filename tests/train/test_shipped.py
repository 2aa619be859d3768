"""The folder of the shipped model: its size, its card, and that PyTorch generates the same images from it."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from diffuse_jax import DiffusionPipeline
from diffuse_jax.weights import resolve

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["red heart, noto style", "grinning face, twemoji style"]


@pytest.fixture
def folder() -> Path:
    return resolve("diffuse-jax/emoji")


def test_the_folder_is_small(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 12_000_000


def test_the_card_names_every_source(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "train" / "emoji"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    for source in importlib.import_module("sources").SOURCES.values():
        assert f"({source.url})" in card
        assert f"| {source.author} | {source.licence} |" in card


def test_pytorch_generates_the_same_images(folder: Path, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    latents = rng.standard_normal((2, 16, 16, 4), np.float32)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    nchw = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
    settings = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "np"}
    wanted = theirs(PROMPTS, latents=nchw, **settings).images
    ours = DiffusionPipeline.from_pretrained("diffuse-jax/emoji")(PROMPTS, latents=latents, **settings).images
    assert np.abs(ours - wanted).mean() < 0.5 / 255
    assert ours.std() > 0.1
