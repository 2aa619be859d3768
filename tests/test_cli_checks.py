"""What ``diffuse-jax generate`` refuses, it refuses before weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.pipelines import tiny
from tests.test_cli import run


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, the same as ``model.safetensors``, and an image."""
    folder = tmp_path_factory.mktemp("models")
    tiny.pipeline().save_pretrained(folder / "model")
    tiny.pipeline().save_single_file(folder / "model.safetensors")
    Image.new("RGB", (16, 16)).save(folder / "edges.png")
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", 1, 2], "seed"),
        (["--num-images-per-prompt", 3, "--seed", 1, 2], "seed"),
        (["--height", 15], "height"),
        (["--width", 15], "width"),
        (["--negative-prompt", "a", "--negative-prompt", "b"], "negative_prompt"),
        (["--num-inference-steps", 2000], "num_inference_steps"),
        (["--clip-skip", 9], "clip_skip"),
        (["--lora", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--strength", 0.5], "strength"),
        (["--control-image", "{}/edges.png"], "--control-image needs --controlnet"),
        (["--control-image", "{}/edges.png", "--controlnet", "{}/model/vae"], "ControlNet"),
        (["--scheduler", "runge"], "'runge'"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
@pytest.mark.parametrize("layout", ["folder", "file"])
def test_a_call_is_refused_before_weights_are_read(
    flags: list[Any], message: str, layout: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = models / "model", []
    if layout == "file":
        model, tokenizer = models / "model.safetensors", ["--tokenizer", models / "model" / "tokenizer"]
        if "--model" in flags:
            flags = ["--model", "nowhere.safetensors"]
            message = "nowhere.safetensors: no such file"
    flags = [str(word).format(models) for word in flags]
    words = ["generate", "--prompt", "a", "--model", model, *tokenizer, "--output", tmp_path / "out", *flags]
    assert run(*words) == 1
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1, "nothing is said about loading"
