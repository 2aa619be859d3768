"""Custom Diffusion as PyTorch diffusers reads and writes it: the same pictures on both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from diffuse_jax import DiffusionPipeline
from diffuse_jax.adapters import custom_diffusion as custom_file
from diffuse_jax.models import UNet2DConditionModel, presets
from diffuse_jax.training import custom
from diffuse_jax.training.settings import CustomSettings
from diffuse_jax.weights.names import flatten
from tests.train.latent_models import SIZE, save_sd

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

WORDS = ("<c>", "<h>")
PROMPT = "a <h> <c>"
OPTIONS = {"num_inference_steps": 3, "output_type": "np", "guidance_scale": 4.0, "height": SIZE, "width": SIZE}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd(tmp_path_factory.mktemp("model"), fresh=False)


def opened(model: Path) -> Any:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def difference(ours: DiffusionPipeline, theirs: Any, prompt: str) -> float:
    """The largest difference of the pictures of both, of 255."""
    noise = np.random.default_rng(1).standard_normal((1, SIZE // 2, SIZE // 2, 4)).astype(np.float32)
    wanted = theirs(prompt, latents=torch.tensor(noise.transpose(0, 3, 1, 2)), **OPTIONS).images
    return float(np.abs(ours(prompt, latents=noise, **OPTIONS).images - wanted).max() * 255)


@pytest.mark.parametrize(("freeze_model", "pickled"), [("crossattn_kv", False), ("crossattn", True)])
def test_what_is_saved_here_draws_the_same_there(
    freeze_model: str, pickled: bool, model: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    settings = CustomSettings(
        instance_data_dir="cats", instance_prompt="a", modifier_token="+".join(WORDS), initializer_token="a+b",
        freeze_model=freeze_model, no_safe_serialization=pickled,
    )  # fmt: skip
    plain = DiffusionPipeline.from_pretrained(model)
    taught, trained = custom.with_concepts(settings, plain)
    trained = jax.tree.map(lambda x: x + rng.standard_normal(x.shape).astype(np.float32), trained)
    custom.save_custom(settings, taught, tmp_path, trained)

    ending = "bin" if pickled else "safetensors"
    ours = plain.load_attn_procs(tmp_path)
    theirs = opened(model)
    before = theirs.unet.attn_processors
    name = f"pytorch_custom_diffusion_weights.{ending}"
    theirs.unet.load_attn_procs(tmp_path, weight_name=name, _pipeline=theirs)
    assert theirs.unet.attn_processors.keys() == before.keys()
    for word in WORDS:
        ours = ours.load_textual_inversion(tmp_path / f"{word}.{ending}")
        theirs.load_textual_inversion(tmp_path, weight_name=f"{word}.{ending}")
    assert difference(ours, theirs, PROMPT) < 0.01
    assert difference(plain, theirs, PROMPT) > 1, "both changes matter"


@pytest.mark.parametrize("safe", [True, False])
def test_files_of_diffusers_draw_the_same_here(safe: bool, model: Path, tmp_path: Path) -> None:
    """Also its ``.safetensors``, which it does not open again."""
    torch.manual_seed(0)
    theirs = opened(model)
    processors: dict[str, Any] = {}
    for name, layer in theirs.unet.named_modules():
        if name.endswith((".attn1", ".attn2")):
            new = {"train_kv": name.endswith("2"), "train_q_out": name.endswith("2")}
            sizes = {"hidden_size": layer.inner_dim, "cross_attention_dim": layer.cross_attention_dim}
            processors[f"{name}.processor"] = diffusers.models.attention_processor.CustomDiffusionAttnProcessor(
                **new, **(sizes if new["train_kv"] else {})
            )
    theirs.unet.set_attn_processor(processors)
    theirs.unet.save_attn_procs(tmp_path, safe_serialization=safe)
    assert (tmp_path / (custom_file.FILE if safe else custom_file.OLD_FILE)).is_file()
    plain = DiffusionPipeline.from_pretrained(model)
    assert difference(plain.load_attn_procs(tmp_path), theirs, "a cat") < 0.01
    assert difference(plain, theirs, "a cat") > 1


@pytest.mark.parametrize(("name", "numbers"), [("SD15_UNET", 19_169_280), ("SD21_UNET", 25_559_040)])
def test_files_of_full_size_have_a_processor_for_each_attention(name: str, numbers: int) -> None:
    config = getattr(presets, name)
    shapes = UNet2DConditionModel(config).shapes()
    leaves = custom_file.leaves_of(shapes, "crossattn_kv")
    assert sum(leaf.size for leaf in jax.tree.leaves(leaves)) == numbers, "2 to 3 % of the network"
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(config.to_json()).attn_processors
    changed = {custom_file.key_of(path).partition(".to_")[0] for path in flatten(leaves)}
    assert changed | {*custom_file.unchanged(leaves, shapes)} == theirs.keys()
    assert len(changed) == len(theirs) / 2 == 16
