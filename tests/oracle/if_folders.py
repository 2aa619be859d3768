"""Small folders like DeepFloyd IF's two stages, saved by PyTorch diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
from tests.oracle import twins  # noqa: E402

torch, diffusers, transformers = folders.torch, folders.diffusers, folders.transformers

NOISE = {"beta_schedule": "squaredcos_cap_v2"}
SCHEDULER = NOISE | {
    "variance_type": "learned_range",
    "prediction_type": "epsilon",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
}
STAGES = {
    1: twins.UNETS["IF, first stage"] | {"sample_size": 16},
    2: twins.UNETS["IF, second stage"] | {"sample_size": 32, "layers_per_block": 1},
}


def tokenizer() -> Any:
    """A T5 tokenizer of single letters and a few words."""
    words = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{w}" for w in ("a", "cat", "two", "dogs", "bad"))]
    letters = [chr(c) for c in range(33, 127) if chr(c) != "<"]
    vocabulary = [(word, -1.0 if len(word) > 1 else -5.0) for word in (*words, *letters)]
    return transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=77)


def components(stage: int, *, text: bool = True) -> dict[str, Any]:
    """What the pipelines of a stage are made of."""
    torch.manual_seed(stage)
    words = tokenizer()
    config = transformers.T5Config(
        vocab_size=len(words), d_model=24, d_kv=6, d_ff=32, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    parts = {
        "tokenizer": words if text else None,
        "text_encoder": folders.lively(transformers.T5EncoderModel(config)) if text else None,
        "unet": folders.lively(diffusers.UNet2DConditionModel(**STAGES[stage])),
        "scheduler": diffusers.DDPMScheduler(**SCHEDULER, sample_max_value=1.5 if stage == 1 else 1.0),
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
    }
    return parts | ({"image_noising_scheduler": diffusers.DDPMScheduler(**NOISE)} if stage == 2 else {})


def save(folder: Path, stage: int, **changes: Any) -> Path:
    kind = diffusers.IFPipeline if stage == 1 else diffusers.IFSuperResolutionPipeline
    kind(**components(stage) | changes, requires_safety_checker=False).save_pretrained(folder)
    return folder
