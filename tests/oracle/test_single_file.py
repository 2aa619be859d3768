"""Single files against PyTorch diffusers: it opens what we write and finds the same tensors, at real sizes, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.oracle.agreement import require_same

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.loaders import single_file_utils  # noqa: E402

from diffuse_jax.convert import convert  # noqa: E402
from diffuse_jax.layouts import read_single_file  # noqa: E402
from diffuse_jax.layouts.original import unet_table, vae_table  # noqa: E402
from diffuse_jax.layouts.record import make_record  # noqa: E402
from diffuse_jax.layouts.rows import combined_shape, to_original  # noqa: E402
from diffuse_jax.layouts.single_file import EMA  # noqa: E402
from diffuse_jax.models import AutoencoderKL, UNet2DConditionModel, presets  # noqa: E402
from diffuse_jax.pipelines import DiffusionPipeline  # noqa: E402
from diffuse_jax.weights import names  # noqa: E402
from diffuse_jax.weights.safetensors import read_safetensors, write_safetensors  # noqa: E402
from tests.oracle.folders import stable_diffusion, stable_diffusion_xl  # noqa: E402
from tests.weights.tiny import same_bits  # noqa: E402

UNET = "model.diffusion_model."


def lightning(stored: dict[str, np.ndarray], path: Path) -> Path:
    """A ``.ckpt`` as trainers leave it: averages beside the weights, buffers, moments of the optimizer."""
    state = {key: torch.from_numpy(np.array(array)) for key, array in stored.items()}
    for key in stored:
        if key.startswith(UNET):
            state[EMA + key.removeprefix("model.").replace(".", "")] = state[key] + 1
    state |= {"model_ema.decay": torch.tensor(0.9999), "alphas_cumprod": torch.ones(1000)}
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save({"state_dict": state, "optimizer_states": [{"state": {0: torch.ones(2)}}], "global_step": 470000}, path)
    return path


@pytest.mark.parametrize(
    ("make", "kind", "dtype"),
    [
        (stable_diffusion, "StableDiffusionPipeline", None),
        (stable_diffusion, "StableDiffusionImg2ImgPipeline", "float16"),
        (stable_diffusion_xl, "StableDiffusionXLPipeline", None),
    ],
)
def test_diffusers_opens_what_is_saved(make: Any, kind: str, dtype: str | None, tmp_path: Path) -> None:
    folder = make(tmp_path / "folder")
    pipe = DiffusionPipeline.from_pretrained(folder)
    path = pipe.save_single_file(tmp_path / "a.safetensors", dtype=dtype)
    if make is stable_diffusion and dtype is None:
        path = lightning(read_safetensors(path), tmp_path / "a.ckpt")
    kept = {} if dtype is None else {"torch_dtype": getattr(torch, dtype)}
    theirs = getattr(diffusers, kind).from_single_file(str(path), config=str(folder), **kept)
    ours = read_single_file(path).networks
    # It tells the text encoders of SDXL apart by their widths, which are the same here; test_weights.py compares
    # what it makes of the second.
    for name in ours.keys() - {"text_encoder_2"}:
        state = getattr(theirs, name).state_dict()
        for key, array in ours[name].checkpoint.tensors.items():
            other = state[key] if key in state else state[key.removeprefix("text_model.")]
            assert same_bits(np.asarray(array), other.numpy()), (name, key)
    if path.suffix == ".safetensors":  # whose metadata say how many groups the tiny norms have
        again = DiffusionPipeline.from_single_file(path, tokenizer=folder / "tokenizer")
        assert again.scheduler.to_json() == pipe.scheduler.to_json()
        for name in ours:
            assert again.components[name].config == pipe.components[name].config


@pytest.mark.parametrize("kind", ["UNet2DConditionModel", "AutoencoderKL"])
def test_diffusers_opens_networks_that_are_saved(kind: str, tmp_path: Path) -> None:
    part = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae"}[kind]
    folder = stable_diffusion(tmp_path / "folder") / part
    path = convert(folder, tmp_path / "a.safetensors", to="single-file")
    theirs = getattr(diffusers, kind).from_single_file(str(path), config=str(folder))
    first = getattr(diffusers, kind).from_pretrained(folder).state_dict()
    assert all(torch.equal(first[key], tensor) for key, tensor in theirs.state_dict().items())


SIZED = {
    "SD15_UNET": presets.SD15_UNET,
    "SD15_INPAINT_UNET": presets.SD15_INPAINT_UNET,
    "SD15_PIX2PIX_UNET": presets.SD15_PIX2PIX_UNET,
    "SD21_UNET": presets.SD21_UNET,
    "SD20_DEPTH_UNET": presets.SD20_DEPTH_UNET,
    "SDXL_UNET": presets.SDXL_UNET,
    "SDXL_REFINER_UNET": presets.SDXL_REFINER_UNET,
    "SSD_1B_UNET": presets.SSD_1B_UNET,
    "X4_UPSCALER_UNET": presets.X4_UPSCALER_UNET,
    "SD_VAE": presets.SD_VAE,
}


# These differ from others in the channels of their first convolution.
OTHER_INPUTS = ("SD15_INPAINT_UNET", "SD15_PIX2PIX_UNET", "SD20_DEPTH_UNET")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in OTHER_INPUTS)) for n in SIZED])
def test_names_and_shapes_at_real_sizes(name: str) -> None:
    """Of the original's names that we write, diffusers makes the names and shapes of the folder that we began with."""
    config = SIZED[name]
    vae = name.endswith("VAE")
    model = AutoencoderKL(config) if vae else UNet2DConditionModel(config)
    flat = {path: np.broadcast_to(np.float32(0), leaf.shape) for path, leaf in names.flatten(model.shapes()).items()}
    tensors = names.torch_tensors(flat)
    groups = to_original(tensors, (vae_table if vae else unet_table)(tensors))
    shapes = {key: combined_shape([(tensors[k], op) for k, op in parts]) for key, parts in groups.items()}
    prefix = "first_stage_model." if vae else UNET
    stored = {prefix + key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    convert_ = single_file_utils.convert_ldm_vae_checkpoint if vae else single_file_utils.convert_ldm_unet_checkpoint
    found = convert_(stored, {"class_embed_type": None, **model.config_json()})
    assert {key: tuple(tensor.shape) for key, tensor in found.items()} == {k: a.shape for k, a in tensors.items()}


MEAN, STD = [-0.25, 0.125, 0.5, -0.5], [1.5, 2.0, 0.75, 1.25]
MARKED = {
    "playground": (
        {"edm_mean": MEAN, "edm_std": STD},
        # scheduler_config.json of playgroundai/playground-v2.5-1024px-aesthetic
        lambda: diffusers.EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5),
        {"latents_mean": MEAN, "latents_std": STD, "scaling_factor": 0.5},
    ),
    "cosxl": (
        {"edm_vpred.sigma_max": 120.0, "edm_vpred.sigma_min": 0.002},
        lambda: diffusers.EDMEulerScheduler(
            sigma_min=0.002,
            sigma_max=120.0,
            sigma_data=1.0,
            prediction_type="v_prediction",
            sigma_schedule="exponential",
        ),
        {},
    ),
}


@pytest.mark.parametrize("name", MARKED)
def test_marked_files_give_the_images_of_diffusers(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    marks, sampler, vae = MARKED[name]
    folder = stable_diffusion_xl(tmp_path / "folder")
    pipe = DiffusionPipeline.from_pretrained(folder)
    stored = read_safetensors(pipe.save_single_file(tmp_path / "plain.safetensors"))
    stored |= {key: np.asarray(values, np.float32) for key, values in marks.items()}
    configs = {part: {"norm_num_groups": pipe.components[part].config.norm_num_groups} for part in ("unet", "vae")}
    configs |= {part: pipe.components[part].config_json() for part in ("text_encoder", "text_encoder_2")}
    configs["unet"] |= pipe.components["unet"].config_json()
    path, specs = tmp_path / "a.safetensors", {key: (array.dtype, array.shape) for key, array in stored.items()}
    write_safetensors(path, specs, stored.values(), make_record(configs, None))
    ours = DiffusionPipeline.from_single_file(path, tokenizer=folder / "tokenizer")
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = sampler()
    theirs.vae.register_to_config(**vae)
    latents = rng.standard_normal((1, 16, 16, 4)).astype(np.float32)
    request = {"prompt": "a red apple", "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    image = ours(latents=latents, **request).images
    reference = theirs(latents=torch.tensor(latents.transpose(0, 3, 1, 2)), **request).images
    require_same(ours, image, reference)
