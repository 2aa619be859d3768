"""Configurations: JSON in and out loses nothing, published files mean the presets, bad values are refused by name."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffuse_jax.config import Config, FrozenDict, freeze, thaw
from diffuse_jax.models import (
    AutoencoderKLConfig,
    ControlNetConfig,
    UNet2DConditionConfig,
    UNet2DConditionModel,
    UNet2DConfig,
    presets,
)
from diffuse_jax.text import CLIPTextConfig
from diffuse_jax.text import presets as text_presets
from tests.models import published

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def unet_configs(draw: st.DrawFn) -> dict[str, Any]:
    """JSON objects of valid UNets with one to four levels and some keys that the class does not know."""
    n = draw(st.integers(1, 4))
    per_level = lambda values: st.lists(values, min_size=n, max_size=n)
    one_or_each = lambda values: values | per_level(values)
    nested = st.integers(0, 4) | st.lists(st.integers(0, 4), min_size=4, max_size=4)
    return {
        "block_out_channels": draw(per_level(st.sampled_from([32, 64, 320]))),
        "down_block_types": draw(per_level(st.sampled_from(["DownBlock2D", "CrossAttnDownBlock2D"]))),
        "up_block_types": draw(per_level(st.sampled_from(["UpBlock2D", "CrossAttnUpBlock2D"]))),
        "attention_head_dim": draw(one_or_each(st.sampled_from([1, 2, 4, 8]))),
        "layers_per_block": draw(one_or_each(st.integers(1, 3))),
        "transformer_layers_per_block": draw(one_or_each(st.integers(1, 10)) | per_level(nested)),
        "reverse_transformer_layers_per_block": draw(per_level(nested)),
        "only_cross_attention": draw(one_or_each(st.booleans())),
        "upcast_attention": draw(st.none() | st.booleans()),
        "sample_size": draw(st.none() | st.integers(8, 128)),
        "_diffusers_version": "0.30.0",
        "future": draw(st.dictionaries(st.text(max_size=5), JSON, max_size=3)),
    }


@settings(max_examples=50)
@given(data=unet_configs())
def test_reading_and_writing_loses_nothing(data: dict[str, Any]) -> None:
    config = UNet2DConditionConfig.from_json(data)
    written = config.to_json()
    assert {k: written[k] for k in data} == data
    again = UNet2DConditionConfig.from_json(json.loads(json.dumps(written)))
    assert again == config.replace(extra=again.extra)  # the class's name is in a file that was written
    assert again.to_json() == written
    assert hash(again) == hash(again.replace())


@settings(max_examples=50)
@given(value=JSON)
def test_thaw_undoes_freeze(value: Any) -> None:
    frozen = freeze(value)
    hash(frozen)
    assert thaw(frozen) == value
    assert freeze(frozen) == frozen
    assert thaw(freeze(frozen)) == value


@pytest.mark.parametrize(
    ("cls", "group", "module"),
    [
        (UNet2DConditionConfig, published.UNETS, presets),
        (ControlNetConfig, published.CONTROLNETS, presets),
        (AutoencoderKLConfig, published.VAES, presets),
        (CLIPTextConfig, published.TEXTS, text_presets),
    ],
)
def test_published_files_are_the_presets(cls: type[Config], group: dict[str, Any], module: Any) -> None:
    for name, data in group.items():
        config = cls.from_json(data)
        written = config.to_json()
        assert {k: written[k] for k in data if k != "_class_name"} == {
            k: v for k, v in data.items() if k != "_class_name"
        }
        plain = config.replace(extra=FrozenDict())
        if getattr(plain, "upcast_attention", False) is None:  # null in files means false
            plain = plain.replace(upcast_attention=False)
        assert plain == getattr(module, name), name


def test_attention_head_dim_means_the_number_of_heads() -> None:
    config = UNet2DConditionConfig.from_json({"attention_head_dim": [5, 10, 20, 20]})
    assert config.num_attention_heads == (5, 10, 20, 20)
    assert [level.heads for level in config.up_levels()] == [20, 20, 10, 5]
    written = config.to_json()
    assert written["attention_head_dim"] == [5, 10, 20, 20]
    assert written["num_attention_heads"] is None


def test_a_whole_clip_file_gives_its_text_side() -> None:
    config = CLIPTextConfig.from_json({"projection_dim": 640, "text_config": {"hidden_size": 64, "projection_dim": 1}})
    assert (config.hidden_size, config.projection_dim) == (64, 640)


@pytest.mark.parametrize(
    ("cls", "data", "message"),
    [
        (UNet2DConditionConfig, {"down_block_types": ["AttnDownBlock2D"] * 4}, "unknown block type 'AttnDownBlock2D'"),
        (UNet2DConditionConfig, {"down_block_types": ["UpBlock2D"] * 4}, "'UpBlock2D' in down_block_types"),
        (UNet2DConditionConfig, {"up_block_types": ["UNetMidBlock2D"] * 4}, "'UNetMidBlock2D' in up_block_types"),
        (UNet2DConditionConfig, {"mid_block_type": "DownBlock2D"}, "mid_block_type='DownBlock2D'; expected one of"),
        (
            UNet2DConditionConfig,
            {"transformer_layers_per_block": [1, [2, 2], [4, 4], 1]},
            "differs within a level, so reverse_transformer_layers_per_block must say",
        ),
        (
            UNet2DConditionConfig,
            {"transformer_layers_per_block": [1, [2], 1, 1], "reverse_transformer_layers_per_block": [1, 1, 1, 1]},
            r"transformer_layers_per_block has \[2\] for a level of 2 residual blocks; expected one number, or 2",
        ),
        (
            UNet2DConditionConfig,
            {"reverse_transformer_layers_per_block": [1, [2, 2], 1, 1]},
            r"reverse_transformer_layers_per_block has \[2, 2\] for a level of 3 residual blocks",
        ),
        (
            UNet2DConditionConfig,
            {"reverse_transformer_layers_per_block": [64, 64, 64, 64]},
            "the upward path has more than 192 transformer blocks",
        ),
        (UNet2DConditionConfig, {"block_out_channels": [320, 640]}, "4 entries for 2 levels"),
        (UNet2DConditionConfig, {"attention_head_dim": [8, 8]}, "num_attention_heads has 2 entries for 4 levels"),
        (ControlNetConfig, {"encoder_hid_dim": 4096}, "encoder_hid_dim=4096 is not supported"),
        (UNet2DConditionConfig, {"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type='ip_image_proj'; exp"),
        (UNet2DConditionConfig, {"encoder_hid_dim_type": "text_proj"}, "'text_proj' needs encoder_hid_dim"),
        (
            UNet2DConditionConfig,
            {"encoder_hid_dim": 8, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "text"},
            "'image_proj' has no text for addition_embed_type='text'",
        ),
        (
            UNet2DConditionConfig,
            {"addition_embed_type": "text", "addition_embed_type_num_heads": 7},
            "prompt embeddings of 1280 cannot be split into addition_embed_type_num_heads=7",
        ),
        (
            UNet2DConditionConfig,
            {"addition_embed_type": "image_hint", "encoder_hid_dim": 8, "encoder_hid_dim_type": "image_proj"},
            "needs in_channels of 5 or more, got 4",
        ),
        (UNet2DConditionConfig, {"encoder_hid_dim": 8, "cross_attention_dim": [8] * 4}, "must be one number, got"),
        (
            UNet2DConditionConfig,
            {"cross_attention_norm": "group_norm", "cross_attention_dim": 100},
            "needs cross_attention_dim to be a multiple of 32, got 100",
        ),
        (
            UNet2DConditionConfig,
            {"cross_attention_norm": "layer_norm", "down_block_types": ["SimpleCrossAttnDownBlock2D"] * 4},
            r"needs cross_attention_dim 1280 to be the width of the levels with attention, \[320, 640, 1280\]",
        ),
        (
            UNet2DConditionConfig,
            {"attention_head_dim": 7, "down_block_types": ["SimpleCrossAttnDownBlock2D"] * 4},
            "320 channels cannot be split into heads of 7",
        ),
        (UNet2DConditionConfig, {"quantization_config": {"load_in_4bit": True}}, "quantization_config=.* only None"),
        (CLIPTextConfig, {"pruned_heads": {"1": [0]}}, "pruned_heads=.* is not supported"),
        (UNet2DConditionConfig, {"time_embedding_type": "other"}, "time_embedding_type='other'"),
        (UNet2DConditionConfig, {"timestep_post_act": "tanh"}, "timestep_post_act='tanh'"),
        (UNet2DConditionConfig, {"norm_num_groups": None}, "norm_num_groups must be a whole number, got null"),
        (
            UNet2DConditionConfig,
            {"time_embedding_type": "fourier", "class_embed_type": "timestep"},
            "needs an even width and other class_embed_type",
        ),
        (ControlNetConfig, {"down_block_types": ["KDownBlock2D"] * 4}, "unknown block type 'KDownBlock2D'"),
        (ControlNetConfig, {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type="),
        (ControlNetConfig, {"addition_embed_type": "image"}, "addition_embed_type='image'"),
        (UNet2DConditionConfig, {"addition_embed_type": "image"}, "addition_embed_type='image' needs encoder_hid_dim"),
        (UNet2DConditionConfig, {"addition_embed_type": "text_time"}, "needs projection_class_embeddings_input_dim"),
        (UNet2DConditionConfig, {"class_embed_type": "other"}, "class_embed_type='other'"),
        (UNet2DConditionConfig, {"act_fn": "tanh"}, "act_fn='tanh'"),
        (ControlNetConfig, {"mid_block_type": None}, "ControlNetModel: mid_block_type=None; expected one of"),
        (ControlNetConfig, {"act_fn": "gelu"}, "ControlNetModel: act_fn='gelu'"),
        (ControlNetConfig, {"class_embed_type": "simple_projection"}, "class_embed_type='simple_projection'"),
        (ControlNetConfig, {"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type='text_proj' is not supported"),
        (ControlNetConfig, {"controlnet_conditioning_channel_order": "rbg"}, "channel_order='rbg'; expected one of"),
        (
            ControlNetConfig,
            {"layers_per_block": [1, 2, 2, 2]},
            r"must be a single number, got \(1, 2, 2, 2\)",
        ),
        (ControlNetConfig, {"conditioning_embedding_out_channels": []}, "at least one width"),
        (AutoencoderKLConfig, {"down_block_types": ["AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D"),
        (AutoencoderKLConfig, {"block_out_channels": [64, 128]}, "up_block_types 1 entries for the 2 of"),
        (AutoencoderKLConfig, {"act_fn": "tanh"}, "act_fn='tanh'"),
        (AutoencoderKLConfig, {"latents_mean": [0.1]}, r"latents_mean .* latent_channels=4, got \(0.1,\)"),
        (AutoencoderKLConfig, {"latents_std": []}, "latents_std must have one number for each"),
        (AutoencoderKLConfig, {"latents_std": [1, 1, 1, 0]}, "latents_std must be .* each a number from 1e-09"),
        (UNet2DConfig, {"down_block_types": ["AttnUpBlock2D"] * 4}, "'AttnUpBlock2D' in down_block_types"),
        (UNet2DConfig, {"block_out_channels": [224, 448, 672, 900]}, "900 channels .* attention_head_dim=8"),
        (CLIPTextConfig, {"hidden_act": "tanh"}, "hidden_act='tanh'"),
        (CLIPTextConfig, {"hidden_size": 100}, "hidden_size 100 is not divisible by num_attention_heads 8"),
        (CLIPTextConfig, {"model_type": "t5"}, "model_type='t5'"),
    ],
)
def test_unsupported_settings_are_refused_by_name(cls: type[Config], data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls.from_json(data)


def test_settings_of_a_later_release_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    known = {"_diffusers_version": "0.42.1", "mid_block_only_cross_attention": True, "dropout": 0.1}
    for data, message in (({}, ""), ({"better_attention": True}, "ignores unknown settings: {'better_att")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            UNet2DConditionModel.from_config(known | data)
        assert message in caplog.text
        assert bool(message) == bool(caplog.text)
