"""Messages about settings that have no effect, and corrections of old folders."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from diffuse_jax.models import UNet2DConfig, UNet2DModel
from diffuse_jax.pipelines import DiffusionPipeline, StableDiffusionXLPipeline
from diffuse_jax.pipelines.settings import corrected, log_ignored, split_settings
from diffuse_jax.schedulers import DDIMScheduler
from diffuse_jax.text import CLIPTextConfig, CLIPTextModel
from diffuse_jax.training.networks import warn_of_dropout
from diffuse_jax.weights import WeightsError
from tests.pipelines import tiny


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"_diffusers_version": "0.42.1", "force_zeros_for_empty_prompt": True, "add_watermarker": None}, ""),
        ({"add_watermarker": True}, "images are not watermarked, although add_watermarker is true"),
        ({"sharpen": 2}, "StableDiffusionXLPipeline ignores unknown settings: {'sharpen': 2}"),
    ],
)
def test_values_of_the_index(options: dict[str, object], message: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        log_ignored(StableDiffusionXLPipeline, options, "folder")
    assert message in caplog.text
    assert bool(message) == bool(caplog.text)


@pytest.mark.parametrize("value", ["false", 0, [True]])
def test_flags_are_true_or_false(value: object) -> None:
    with pytest.raises(ValueError, match="force_zeros_for_empty_prompt .* must be true or false, got"):
        split_settings(StableDiffusionXLPipeline, {"force_zeros_for_empty_prompt": value}, {})
    assert split_settings(StableDiffusionXLPipeline, {"add_watermarker": None}, {"unet": 1})[1] == {"unet": 1}


@pytest.mark.parametrize("entry", [None, [None, None], ["diffusers"], 5])
def test_a_folder_without_a_component_is_refused_before_anything_is_opened(entry: object, tmp_path: Path) -> None:
    names = {
        **{name: ["diffusers", "Anything"] for name in ("vae", "text_encoder", "tokenizer", "scheduler")},
        "unet": entry,
    }
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **names}))
    with pytest.raises(WeightsError, match=r"model_index\.json: has no unet, which StableDiffusionPipeline needs; add"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_a_swap_is_taken_as_it_is() -> None:
    """Folders are corrected; a sampler that is put in afterwards is not, as in diffusers."""
    pipe = tiny.pipeline()
    clipping = DDIMScheduler(clip_sample=True)
    assert pipe.replace(scheduler=clipping).scheduler.clip_sample
    parts = corrected(type(pipe), {**pipe.components, "scheduler": clipping})
    assert (parts["scheduler"].clip_sample, parts["scheduler"].steps_offset) == (False, 1)
    assert parts["unet"] is pipe.components["unet"], "its file does not say that it is old"
    assert type(pipe).from_pipe(pipe).scheduler.steps_offset == 1


def test_training_says_that_it_leaves_out_dropout(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_dropout(UNet2DModel(UNet2DConfig()))
        warn_of_dropout(CLIPTextModel(CLIPTextConfig.from_json({"attention_dropout": 0.0})))
        assert not caplog.text
        warn_of_dropout(UNet2DModel(UNet2DConfig(dropout=0.1)))
        warn_of_dropout(CLIPTextModel(CLIPTextConfig.from_json({"attention_dropout": 0.2})))
    assert "UNet2DModel has dropout=0.1; it is trained without dropout" in caplog.text
    assert "CLIPTextModel has attention_dropout=0.2" in caplog.text
