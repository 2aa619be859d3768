"""Depth estimators and their image processor against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from diffuse_jax.models import DPTConfig, DPTForDepthEstimation
from diffuse_jax.processors import DPTImageProcessor
from diffuse_jax.weights import WeightsError
from tests.oracle import twins
from tests.oracle.comparisons import TOLERANCE, channel_first, compare_depth, difference

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from diffuse_jax.torch_backend.twins import CALLS  # noqa: E402


@pytest.mark.parametrize("name", twins.DEPTHS)
def test_depth_equals_transformers(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    twin = twins.depth_twin(name, tmp_path)
    assert not twin[1].config.unknown()
    differences = compare_depth(twin, rng)
    assert max(differences.values()) <= TOLERANCE, differences


def test_images_of_other_sizes_move_the_positions(tmp_path: Path, rng: np.random.Generator) -> None:
    module, model, params = twins.depth_twin("large", tmp_path)
    images = rng.standard_normal((1, 48, 48, 3)).astype(np.float32)
    with torch.no_grad():
        expected = CALLS["DPTForDepthEstimation", "__call__"](module, torch.tensor(images))
        assert torch.equal(expected, module(channel_first(images)).predicted_depth)
    assert difference(jax.jit(lambda p, x: model.apply({"params": p}, x))(params, images), expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["large", "hybrid"])
def test_transformers_opens_what_is_saved_here(name: str, tmp_path: Path) -> None:
    module, model, params = twins.depth_twin(name, tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours", params)
    again, report = type(module).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in module.state_dict().items())
    read, own = DPTForDepthEstimation.from_pretrained(tmp_path / "ours")
    assert read.config == model.config
    jax.tree.map(np.testing.assert_array_equal, own, params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "depth_anything"}, "expected the config of a DPT, got model_type='depth_anything'"),
        ({"backbone_config": {"model_type": "dinov2"}}, "model_type='dinov2' is not supported, only 'bit'"),
        ({"is_hybrid": True, "readout_type": "add"}, "a hybrid needs readout_type 'project'"),
        ({"use_batch_norm_in_fusion_residual": True}, "use_batch_norm_in_fusion_residual=True is not supported"),
        ({"readout_type": "mean"}, "readout_type='mean' .expected one of"),
        ({"backbone_out_indices": [2, 5, 8, 12]}, r"backbone_out_indices=\[2, 5, 8, 12\] of 12 layers"),
        ({"reassemble_factors": [4, 2, 1]}, "4 backbone_out_indices and 3 reassemble_factors"),
        ({"reassemble_factors": [4, 2, 1, 0.3]}, "whole numbers or 1 over one, got 0.3"),
        ({"num_attention_heads": 7}, "hidden_size 768 over 7 heads"),
        ({"is_hybrid": True, "backbone_config": twins.BACKBONE | {"layer_type": "preactivation"}}, "layer_type is"),
    ],
)
def test_unsupported_settings_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPTConfig.from_json(changes)


def test_a_hybrid_without_a_backbone_has_the_published_one() -> None:
    sizes = {"neck_hidden_sizes": [256, 512, 768, 768], "reassemble_factors": [1, 1, 1, 0.5]}
    theirs = transformers.DPTConfig(is_hybrid=True, **sizes).to_dict()
    assert DPTConfig.from_json(theirs) == DPTConfig.from_json({"is_hybrid": True, **sizes})


@pytest.mark.parametrize("shape", [(1, 48, 48, 3), (1, 64, 48, 3), (64, 64, 3), (1, 64, 64, 1)])
def test_wrong_shapes_are_refused_while_tracing(shape: tuple[int, ...]) -> None:
    model = DPTForDepthEstimation(DPTConfig.from_json(twins.HYBRID))
    with pytest.raises(ValueError, match=r"must be \[B,H,W,3\] .* with H = W = 64, got"):
        jax.eval_shape(
            lambda p, x: model.apply({"params": p}, x), model.shapes(), jax.ShapeDtypeStruct(shape, "float32")
        )


PROCESSORS: dict[str, dict[str, Any]] = {
    "square": {"size": {"height": 48, "width": 48}},
    "multiples": {"size": 50, "ensure_multiple_of": 16, "keep_aspect_ratio": True},
    "linear": {"size": {"height": 30, "width": 41}, "resample": 2, "image_mean": [0.4, 0.5, 0.6]},
}


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("size", [(50, 71), (97, 40), (48, 48)])
def test_pixel_values_equal_transformers(
    processor: str, size: tuple[int, int], tmp_path: Path, rng: np.random.Generator
) -> None:
    theirs = transformers.DPTImageProcessor(**PROCESSORS[processor])
    theirs.save_pretrained(tmp_path)
    ours = DPTImageProcessor.from_pretrained(tmp_path)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    expected = theirs(image, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours(image), expected, atol=2e-6)
    ours.save_pretrained(tmp_path / "again")
    again = transformers.DPTImageProcessor.from_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(again(image, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1), expected)


def test_a_crop_or_padding_of_the_processor_is_refused(tmp_path: Path) -> None:
    for settings, message in (({"do_pad": True}, "do_pad=True is not supported"), ({"size": "x"}, "size must be")):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        with pytest.raises(WeightsError, match=message):
            DPTImageProcessor.from_pretrained(tmp_path)
