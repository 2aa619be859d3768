"""The ADM UNet: names, sizes and shapes of published networks, saving and loading, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.models import ADMUNet, ADMUNetConfig, consistency_denoiser
from diffuse_jax.pipelines import ConsistencyModelPipeline
from diffuse_jax.pipelines.programs import Programs
from diffuse_jax.schedulers import CMStochasticIterativeScheduler
from diffuse_jax.weights.names import flatten, torch_keys
from tests.models.filling import random_params

TINY = ADMUNetConfig(
    in_channels=2,
    out_channels=4,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(2,),
    num_head_channels=32,
)
IMAGENET = ADMUNetConfig(
    out_channels=6,
    model_channels=256,
    num_classes=1000,
    num_head_channels=64,
    use_scale_shift_norm=True,
    resblock_updown=True,
    use_new_attention_order=True,
)
PUBLISHED = {  # millions of parameters: Dhariwal & Nichol 2021, appendix I, table 11
    296: IMAGENET.replace(model_channels=192, channel_mult=(1, 2, 3, 4), num_res_blocks=3),
    422: IMAGENET.replace(
        channel_mult=(1, 1, 2, 3, 4), num_heads=4, num_head_channels=-1, attention_resolutions=(4, 8, 16)
    ),
    554: IMAGENET.replace(channel_mult=(1, 1, 2, 2, 4, 4), attention_resolutions=(8, 16, 32)),
    559: IMAGENET.replace(channel_mult=(0.5, 1, 1, 2, 2, 4, 4), attention_resolutions=(16, 32, 64)),
}


@pytest.mark.parametrize("millions", PUBLISHED)
def test_published_networks_have_their_published_size(millions: int) -> None:
    shapes = ADMUNet(PUBLISHED[millions]).shapes()
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert round(count / 1e6) == millions


def test_names_are_those_of_the_original_release() -> None:
    shapes = ADMUNet(TINY.replace(num_classes=7)).shapes()
    parts = {key.rsplit(".", 1)[0] for key in torch_keys(flatten(shapes))}
    res = {"in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"}
    attention = {"norm", "qkv", "proj_out"}
    layers = {
        "input_blocks.1.0": res,
        "input_blocks.2.0": {"op"},
        "input_blocks.3.0": res | {"skip_connection"},
        "input_blocks.3.1": attention,
        "middle_block.0": res,
        "middle_block.1": attention,
        "middle_block.2": res,
        "output_blocks.0.0": res | {"skip_connection"},
        "output_blocks.0.1": attention,
        "output_blocks.1.0": res | {"skip_connection"},
        "output_blocks.1.1": attention,
        "output_blocks.1.2": {"conv"},
        "output_blocks.2.0": res | {"skip_connection"},
        "output_blocks.3.0": res | {"skip_connection"},
    }
    single = {"time_embed.0", "time_embed.2", "label_emb", "input_blocks.0.0", "out.0", "out.2"}
    assert parts == single | {f"{block}.{name}" for block, names in layers.items() for name in names}


def test_kernels_of_attention_have_the_rank_of_the_checkpoint() -> None:
    for dims in (1, 2):
        shapes = ADMUNet(TINY.replace(attention_dims=dims)).shapes()
        assert shapes["middle_block_1"]["qkv"]["kernel"].shape == (1,) * dims + (64, 192)


def test_saved_and_loaded_is_the_same_network(tmp_path: Path, rng: np.random.Generator) -> None:
    model = ADMUNet(TINY.replace(label_channels=3, num_res_blocks=(1, 2)))
    params = random_params(model.shapes(), rng)
    model.save_pretrained(tmp_path, params)
    again, loaded = ADMUNet.from_pretrained(tmp_path)
    assert again.config.to_json() == model.config.to_json()
    assert jax.tree.all(jax.tree.map(np.array_equal, params, loaded))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_classes": 3, "label_channels": 3}, "exclude each other"),
        ({"attention_dims": 3}, "expected 1 or 2"),
        ({"num_res_blocks": (1, 2, 3)}, "3 entries for 2 levels"),
    ],
)
def test_refused_configs(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TINY.replace(**changes)


def test_options_of_other_releases_are_refused_and_not_ignored() -> None:
    with pytest.raises(ValueError, match="use_spatial_transformer=True"):
        ADMUNetConfig.from_json({"use_spatial_transformer": True})


@pytest.mark.parametrize(
    ("config", "shape", "labels", "words"),
    [
        (TINY, (1, 5, 4, 2), None, "multiples of 2, got 5 and 4"),
        (TINY, (1, 4, 4, 3), None, "sample has 3 channels, this network takes 2"),
        (TINY, (1, 4, 4, 2), (1,), "class_labels must be None"),
        (TINY.replace(num_classes=7), (1, 4, 4, 2), None, r"of shape \(1,\), got None"),
        (TINY.replace(label_channels=3), (1, 4, 4, 2), (1, 2), r"of shape \(1, 3\), got \(1, 2\)"),
        (
            TINY.replace(num_head_channels=48),
            (1, 4, 4, 2),
            None,
            "64 channels cannot be split into heads .num_heads=1, num_head_channels=48",
        ),
    ],
)
def test_refused_inputs(config: ADMUNetConfig, shape: tuple, labels: tuple | None, words: str) -> None:
    inputs = [None if s is None else jnp.zeros(s) for s in (shape, (1,), labels)]
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(ADMUNet(config).init, jax.random.key(0), *inputs)


def test_a_consistency_model_is_run_by_its_pipeline(rng: np.random.Generator) -> None:
    """One step is the consistency function at the largest noise level; several steps, and other labels, are data."""
    model = ADMUNet(TINY.replace(image_size=4, out_channels=2, label_channels=3))
    params = random_params(model.shapes(), rng)
    parts = {"unet": model, "scheduler": CMStochasticIterativeScheduler()}
    pipe = ConsistencyModelPipeline(parts, {"unet": params}, programs=Programs())
    noise, labels = rng.standard_normal((2, 4, 4, 2)).astype(np.float32), rng.random((2, 3), np.float32)
    found = pipe(2, class_labels=labels, latents=noise, seed=0, output_type="latent").images
    clean = consistency_denoiser(lambda *inputs: model.apply({"params": params}, *inputs))(80 * noise, 80.0, labels)
    assert np.std(clean) > 0.1
    np.testing.assert_allclose(found, np.clip(clean, -1, 1), atol=1e-4)
    pipe(2, class_labels=labels[0], latents=noise, timesteps=[30, 17, 0], seed=1, output_type="latent")
    assert pipe.programs.compilations == 1
    with pytest.raises(ValueError, match=r"class_labels has shape \(2,\) for 2 images"):
        pipe.request(2, class_labels=[1, 2])
    with pytest.raises(ValueError, match="no sample_size; set it to a size"):
        pipe.replace(unet=(ADMUNet(model.config.replace(image_size=None)), params)).request(class_labels=labels[0])
