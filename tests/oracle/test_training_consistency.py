"""One step of latent consistency distillation against a computation with PyTorch diffusers' networks."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax import DiffusionPipeline, LCMScheduler, pipelines
from diffuse_jax.adapters import lora
from diffuse_jax.adapters.lora_file import save_lora, torch_shape
from diffuse_jax.adapters.targets import UNET_TARGETS
from diffuse_jax.layouts.lora_names import layer_name
from diffuse_jax.models import UNet2DConditionModel, presets
from diffuse_jax.pipelines.parts.network import strength_embedding
from diffuse_jax.sharding import make_mesh
from diffuse_jax.torch_backend.training_report import Tolerance, compare_updates, verdict
from diffuse_jax.training.consistency import (
    UNCONDITIONAL,
    consistency_from,
    with_guidance,
)
from diffuse_jax.training.initial import initial_params
from diffuse_jax.training.latent import open_pipeline, save_networks
from diffuse_jax.training.latent_model import save_rest
from diffuse_jax.training.settings import ConsistencySettings, ModelSettings
from tests.oracle.agreement import require_same
from tests.train.latent_models import LEVELS, SIZE, UNET, XL_UNET, save_sd, save_sdxl

twins = pytest.importorskip("tests.oracle.twins", reason="needs PyTorch diffusers and transformers")
from tests.oracle.consistency_cases import WIDTH, Case, low_rank_student, whole_student  # noqa: E402
from tests.oracle.training_steps import LOSS, Steps  # noqa: E402

torch, diffusers = twins.torch, twins.diffusers

TIGHT = Tolerance(values=1e-5, gradients=1e-4, quiet=1e-3, changes=1e-3)
"""A change is at most the learning rate, 1e-3, so this is 1e-6 in parameters of about 0.1."""

WEAK = {"w_min": 0.5, "w_max": 1.5}
"""Guidance multiplies the rounding of predictions: at the default scales, to more than 1e-6 of the loss."""

SAME = 0.01
"""Mean difference of images that is accepted, of 255."""


def check(steps: Steps) -> None:
    """The loss, all gradients and all changes agree."""
    ours, theirs = steps.updates()
    np.testing.assert_allclose(ours.values["loss"], theirs.values["loss"], rtol=LOSS)
    compared = compare_updates(ours, theirs, TIGHT)
    assert compared.ok, verdict(compared)
    assert len(compared.changes) > 10


def test_the_embedding_is_that_of_pipelines(rng: np.random.Generator) -> None:
    w = rng.uniform(0, 15, 5).astype(np.float32)
    theirs = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor(w), WIDTH)
    np.testing.assert_allclose(strength_embedding(jnp.asarray(w), WIDTH), theirs, atol=2e-3)


@pytest.mark.parametrize(("save", "loss"), [(save_sd, "huber"), pytest.param(save_sdxl, "l2", marks=pytest.mark.slow)])
def test_a_whole_student_and_its_average(save: Any, loss: str, tmp_path: Path, rng: np.random.Generator) -> None:
    case = Case(save(tmp_path / "teacher", fresh=False), rng, ConsistencySettings(loss_type=loss, **WEAK))
    check(whole_student(case, tmp_path))


SD_LEVELS, XL_LEVELS = (
    functools.partial(save, unet=unet.replace(**LEVELS)) for save, unet in ((save_sd, UNET), (save_sdxl, XL_UNET))
)
"""Their UNets also have the convolutions that halve and double the size."""


@pytest.mark.parametrize(
    ("save", "loss"), [pytest.param(SD_LEVELS, "l2", marks=pytest.mark.slow), (save_sdxl, "huber")]
)
def test_low_rank_pairs_whose_target_is_themselves(
    save: Any, loss: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Steps are long, as those of a student that is its own target differ by little more than rounding otherwise."""
    pytest.importorskip("peft", reason="PyTorch diffusers loads LoRA through peft")
    case = Case(save(tmp_path, fresh=False), rng, ConsistencySettings(loss_type=loss, num_ddim_timesteps=5, **WEAK))
    check(low_rank_student(case))
    states = case.frozen[UNCONDITIONAL]["states"]
    assert np.any(states) == (save is SD_LEVELS), "SDXL's guidance takes zeros"


PROMPT = "two dogs, one hat"


def images_of(pipe: Any, theirs: Any, **call: Any) -> tuple[np.ndarray, np.ndarray]:
    """Four steps on both sides, from the same noise."""
    theirs.set_progress_bar_config(disable=True)
    call |= {"prompt": PROMPT, "num_inference_steps": 4, "output_type": "np", "height": SIZE, "width": SIZE}
    with torch.no_grad():
        wanted = theirs(generator=torch.Generator().manual_seed(3), **call).images
    return pipe(seed=3, noise="torch", **call).images, wanted


@pytest.mark.parametrize("save", [save_sd, pytest.param(save_sdxl, marks=pytest.mark.slow)])
def test_pytorch_samples_the_folder_of_a_student(save: Any, tmp_path: Path) -> None:
    """As the pipeline that its index names and, for SD, as diffusers' own of latent consistency models."""
    model = ModelSettings(pretrained_model_name_or_path=save(tmp_path / "teacher", fresh=False))
    teacher = open_pipeline(tmp_path / "teacher", trainable=("unet",), mesh=make_mesh(devices=jax.devices()[:1]))
    sampler = consistency_from(ConsistencySettings(num_ddim_timesteps=20), teacher).sampler
    student = with_guidance(teacher, WIDTH)
    params = initial_params(student.components["unet"].shapes(), 7, ())
    save_networks(student, tmp_path / "student", {"unet": params})
    save_rest(model, student, tmp_path / "student", ("unet",), sampler=sampler)
    pipe, theirs = (
        kind.from_pretrained(tmp_path / "student") for kind in (DiffusionPipeline, diffusers.DiffusionPipeline)
    )
    assert type(theirs).__name__ == type(pipe).__name__ == type(teacher).__name__
    assert type(theirs.scheduler).__name__ == "LCMScheduler"
    assert theirs.scheduler.config.original_inference_steps == 20
    ours, wanted = images_of(pipe, theirs, guidance_scale=7.5)
    require_same(pipe, ours, wanted, SAME)
    assert np.abs(ours - images_of(pipe, theirs, guidance_scale=12.0)[0]).max() > 1e-4
    if save is save_sd:
        lcm = diffusers.LatentConsistencyModelPipeline.from_pretrained(tmp_path / "student")
        kept = pipelines.LatentConsistencyModelPipeline.from_pretrained(tmp_path / "student")
        require_same(kept, *images_of(kept, lcm, guidance_scale=7.5), SAME)


TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
)
"""The ends of the names of the layers that diffusers' scripts adapt."""


@pytest.mark.parametrize(("config", "layers"), [(presets.SD15_UNET, 278), (presets.SDXL_UNET, 788)])
def test_the_layers_with_pairs_are_those_of_published_files(config: Any, layers: int) -> None:
    """``lcm-lora-sdv1-5`` and ``lcm-lora-sdxl``."""
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(config.to_json())
    wanted = {name: tuple(layer.weight.shape) for name, layer in theirs.named_modules()
              if name.endswith(tuple(f".{end}" for end in TARGETS))}  # fmt: skip
    shapes = UNet2DConditionModel(config).shapes()
    found = {
        path: shape for path, shape in lora.adaptable(shapes).items() if re.search(UNET_TARGETS, "/" + "/".join(path))
    }
    assert {layer_name(path): torch_shape(shape) for path, shape in found.items()} == wanted
    assert len(found) == layers


def test_pytorch_samples_with_the_pairs(tmp_path: Path) -> None:
    """Those of every layer that has them by default."""
    pytest.importorskip("peft", reason="PyTorch diffusers loads LoRA through peft")
    pipe = DiffusionPipeline.from_pretrained(XL_LEVELS(tmp_path / "teacher", fresh=False))
    fresh = lora.init(pipe.components["unet"].shapes(), 4, jax.random.key(1), UNET_TARGETS)
    pairs = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) / 8, fresh)
    adapted = {layer_name(path) for path in lora.pairs_of(pairs)}
    assert all(any(name.endswith(f".{end}") for name in adapted) for end in TARGETS)
    save_lora(tmp_path / "lora", {"unet": pairs})
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "teacher")
    plain = pipe = pipe.replace(scheduler=LCMScheduler.from_config(pipe.scheduler))
    theirs.scheduler = diffusers.LCMScheduler.from_config(theirs.scheduler.config)
    theirs.load_lora_weights(tmp_path / "lora")
    assert {name for name, layer in theirs.unet.named_modules() if hasattr(layer, "lora_A")} == adapted
    pipe = pipe.load_lora_weights(tmp_path / "lora")
    ours, wanted = images_of(pipe, theirs, guidance_scale=1.0)
    require_same(pipe, ours, wanted, SAME)
    again = plain(PROMPT, num_inference_steps=4, guidance_scale=1.0, seed=3, noise="torch", output_type="np",
                  height=SIZE, width=SIZE).images  # fmt: skip
    assert np.abs(ours - again).max() > 1e-3
