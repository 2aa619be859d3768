"""unCLIP in PyTorch, small and with random weights; diffusers 0.42 has its classes in ``deprecated``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
from diffusers.pipelines.deprecated import unclip as theirs  # noqa: E402
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel  # noqa: E402

torch, diffusers, transformers = folders.torch, folders.diffusers, folders.transformers

DECODER = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "resnet_time_scale_shift": "scale_shift",
    "class_embed_type": "identity",
}
TEXT_PROJ = {"clip_embeddings_dim": 32, "time_embed_dim": 64, "cross_attention_dim": 16}
SUPER_RESOLUTION = {
    "sample_size": 16,
    "in_channels": 6,
    "out_channels": 3,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
    "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    "norm_num_groups": 8,
    "add_attention": False,
}


def text_proj() -> Any:
    """The projection, whose learned embedding is not zero."""
    return folders.lively(UnCLIPTextProjModel(**TEXT_PROJ))


def parts() -> dict[str, Any]:
    """What both forms have."""
    torch.manual_seed(0)
    tok = folders.tokenizer()
    return {
        "decoder": folders.lively(diffusers.UNet2DConditionModel(**DECODER)),
        "text_encoder": folders.lively(transformers.CLIPTextModelWithProjection(folders.text_config(tok))),
        "tokenizer": tok,
        "text_proj": text_proj(),
        "super_res_first": folders.lively(diffusers.UNet2DModel(**SUPER_RESOLUTION)),
        "super_res_last": folders.lively(diffusers.UNet2DModel(**SUPER_RESOLUTION)),
        "decoder_scheduler": diffusers.UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": diffusers.UnCLIPScheduler(),
    }


def text_pipeline(folder: Path) -> Any:
    """Text to image, saved to a folder too."""
    shared = parts()
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=32, num_embeddings=16
    )
    prior.clip_std.data.fill_(1.0)
    scheduler = diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)
    return saved(theirs.UnCLIPPipeline(prior=folders.lively(prior), prior_scheduler=scheduler, **shared), folder)


def variation_pipeline(folder: Path) -> Any:
    """Image variation, saved to a folder too."""
    shared = parts()
    encoder = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**folders.VISION))
    return saved(
        theirs.UnCLIPImageVariationPipeline(
            feature_extractor=transformers.CLIPImageProcessor(size=16, crop_size=16),
            image_encoder=folders.lively(encoder),
            **shared,
        ),
        folder,
    )


def saved(pipe: Any, folder: Path) -> Any:
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe
