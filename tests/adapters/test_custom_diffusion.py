"""Weights of Custom Diffusion: keys, files of both kinds, a pipeline that has them, and files that do not fit."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffuse_jax.adapters import custom_diffusion as custom
from diffuse_jax.weights import WeightsError
from diffuse_jax.weights.names import flatten
from tests.pipelines import tiny

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
KEY = f"{ATTENTION}.attn2.processor.to_k_custom_diffusion.weight"


def random_leaves(rng: np.random.Generator, which: str) -> dict:
    leaves = custom.leaves_of(tiny.pipeline().params["unet"], which)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), leaves)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize(("which", "per_layer"), [("crossattn_kv", 2), ("crossattn", 5)])
def test_a_file_is_read_as_it_was_written(
    ending: str, which: str, per_layer: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    leaves, shapes = random_leaves(rng, which), tiny.pipeline().components["unet"].shapes()
    layers = {path[:-2] for path in flatten(leaves)}
    assert len(flatten(leaves)) == per_layer * len(layers)
    assert {path[-1] for path in layers} == {"attn2"}
    file = custom.save_leaves(tmp_path / f"pytorch_custom_diffusion_weights.{ending}", leaves, shapes)
    read = flatten(custom.read_leaves(tmp_path, shapes))
    assert read.keys() == flatten(leaves).keys()
    assert all(np.array_equal(read[path], leaf) for path, leaf in flatten(leaves).items())
    if ending == "safetensors":
        tensors = load_file(file)
        assert tensors[f"{ATTENTION}.attn1.processor"].size == 0, "the attentions that are as they were"
        assert KEY in tensors


def test_a_pipeline_with_other_attention(tmp_path: Path, rng: np.random.Generator) -> None:
    pipe = tiny.pipeline()
    custom.save_leaves(tmp_path / "other.bin", random_leaves(rng, "crossattn"), pipe.components["unet"].shapes())
    options = {"num_inference_steps": 2, "seed": 0, "output_type": "np"}
    plain = pipe("a", **options).images
    before = pipe.programs.compilations
    changed = pipe.load_attn_procs(tmp_path, weight_name="other.bin")
    assert np.abs(changed("a", **options).images - plain).max() > 1e-3
    assert pipe.programs.compilations == before, "nothing is compiled for other weights"
    own = custom.leaves_of(pipe.params["unet"], "crossattn")
    custom.save_leaves(tmp_path / custom.FILE, own, pipe.components["unet"].shapes())
    np.testing.assert_array_equal(changed.load_attn_procs(tmp_path)("a", **options).images, plain)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    width = pipe.components["unet"].config.block_out_channels[0]
    good = np.zeros((width, 16), np.float32)
    for tensors, message in [
        ({KEY: np.zeros((width, 5), np.float32)}, rf"is \[{width}, 5\], but this UNet has \[{width}, 16\] there"),
        ({KEY.replace("down_blocks.0", "down_blocks.7"): good}, "is for a layer that this UNet does not have"),
        ({KEY: good * np.nan}, "NaN"),
        ({f"unet.{ATTENTION}.attn2.to_k.lora.down.weight": good}, "no weights of Custom.*a LoRA, which load_lora_weig"),
    ]:
        save_file(tensors, tmp_path / custom.FILE)
        with pytest.raises(WeightsError, match=message):
            pipe.load_attn_procs(tmp_path)
    with pytest.raises(WeightsError, match=r"other.bin: .*expected pytorch_custom_diffusion_weights.safetensors or"):
        pipe.load_attn_procs(tmp_path, weight_name="other.bin")
    save_file({KEY: good}, tmp_path / "custom.safetensors")
    with pytest.raises(WeightsError, match="weights of Custom Diffusion, which load_attn_procs of a pipeline reads"):
        pipe.load_lora_weights(tmp_path / "custom.safetensors")
