"""Few-step models are weights and a sampler: files as they are published, opened by the ordinary loaders, give the
images of PyTorch diffusers from the same files and settings, with one program for all of them.

The noise of every step is PyTorch's own (``noise="torch"``), because most of these samplers draw some.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file, save_file

from diffuse_jax import UNet2DConditionModel, pipelines, schedulers
from diffuse_jax.layouts.original import unet_table
from diffuse_jax.layouts.rows import to_original
from diffuse_jax.pipelines.programs import Programs
from tests.oracle.agreement import require_same

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
pytest.importorskip("peft")
torch, diffusers = folders.torch, folders.diffusers

TIGHT = 0.05  # of 255, mean over all pixels
SEED = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.stable_diffusion_xl(tmp_path_factory.mktemp("xl") / "model")


@pytest.fixture(scope="module")
def programs() -> Programs:
    """What all tests of this file compile."""
    return Programs()


# Files

LAYERS = (
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "down_blocks.1.resnets.0.conv_shortcut",
    "down_blocks.1.resnets.0.time_emb_proj",
    "down_blocks.1.attentions.0.proj_in",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.2",
    "up_blocks.0.upsamplers.0.conv",
)
"""What the LoRAs of these families change: attention, feed-forward layers and, in most, convolutions."""

KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")


def kohya(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


def write_lora(file: Path, unet: Any, spell: Callable[[str], str], ends: tuple[str, str]) -> None:
    """Random pairs of rank 4, in kohya's spelling with an alpha of half the rank."""
    generator = torch.Generator().manual_seed(1)
    modules, tensors = dict(unet.named_modules()), {}
    for name in LAYERS:
        out, inner, *window = modules[name].weight.shape
        ones = [1] * len(window)
        for end, shape in zip(ends, ((4, inner, *window), (out, 4, *ones)), strict=True):
            tensors[f"{spell(name)}.{end}"] = torch.randn(shape, generator=generator).mul(0.1).half()
        if ends == KOHYA:
            tensors[f"{spell(name)}.alpha"] = torch.tensor(2.0)
    save_file(tensors, file)


def original_names(unet: Any) -> Callable[[str], str]:
    """Kohya's spelling of the names of original checkpoints."""
    names = to_original((f"{name}.weight" for name in LAYERS), unet_table(unet.state_dict()))
    table = {parts[0][0]: old for old, parts in names.items()}
    return lambda name: kohya(table[f"{name}.weight"].removesuffix(".weight"))


Write = Callable[[Path, Any], None]
LORAS: dict[str, Write] = {
    "kohya": lambda file, unet: write_lora(file, unet, kohya, KOHYA),
    "original names": lambda file, unet: write_lora(file, unet, original_names(unet), KOHYA),
    "PEFT": lambda file, unet: write_lora(file, unet, lambda name: f"unet.{name}", PEFT),
}


def write_unet(file: Path, unet: Any) -> None:
    """A UNet's state dict and nothing else, in half precision as published; other weights than the folder's."""
    generator = torch.Generator().manual_seed(2)
    state = {k: (v + 0.02 * torch.randn(v.shape, generator=generator)).half() for k, v in unet.state_dict().items()}
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)


class Model(NamedTuple):
    """What is downloaded, and how it is run.

    Attributes:
      file: "unet.safetensors", "unet.bin", or a key of ``LORAS``.
      sampler: the scheduler's class.
      settings: what ``from_config`` changes about the folder's scheduler.
      call: the arguments of the call, as the model's card has them.
    """

    file: str
    sampler: str
    settings: dict[str, Any]
    call: dict[str, Any]


TRAILING = {"timestep_spacing": "trailing"}
FOUR = [999, 749, 499, 249]
MODELS = {
    "Lightning": Model(
        "unet.safetensors", "EulerDiscreteScheduler", TRAILING, {"num_inference_steps": 4, "guidance_scale": 0}
    ),
    "Lightning, one step": Model(
        "unet.safetensors",
        "EulerDiscreteScheduler",
        TRAILING | {"prediction_type": "sample"},
        {"num_inference_steps": 1, "guidance_scale": 0},
    ),
    "Lightning LoRA": Model(
        "kohya", "EulerDiscreteScheduler", TRAILING, {"num_inference_steps": 2, "guidance_scale": 0}
    ),
    "Hyper-SD LoRA": Model("kohya", "DDIMScheduler", TRAILING, {"num_inference_steps": 2, "guidance_scale": 0}),
    "Hyper-SD unified LoRA, one step": Model(
        "original names", "TCDScheduler", {}, {"num_inference_steps": 1, "guidance_scale": 0, "eta": 1.0}
    ),
    "Hyper-SD unified LoRA": Model(
        "original names", "TCDScheduler", {}, {"num_inference_steps": 4, "guidance_scale": 0, "eta": 0.5}
    ),
    "Hyper-SD, one step": Model(
        "unet.safetensors", "LCMScheduler", {}, {"num_inference_steps": 1, "guidance_scale": 0, "timesteps": [800]}
    ),
    "Hyper-SD LoRA with guidance": Model(
        "kohya", "DDIMScheduler", TRAILING, {"num_inference_steps": 8, "guidance_scale": 5.0}
    ),
    "TCD LoRA": Model("kohya", "TCDScheduler", {}, {"num_inference_steps": 4, "guidance_scale": 0, "eta": 0.3}),
    "DMD2": Model("unet.bin", "LCMScheduler", {}, {"num_inference_steps": 4, "guidance_scale": 0, "timesteps": FOUR}),
    "DMD2, one step": Model(
        "unet.bin", "LCMScheduler", {}, {"num_inference_steps": 1, "guidance_scale": 0, "timesteps": [399]}
    ),
    "DMD2 LoRA": Model("PEFT", "LCMScheduler", {}, {"num_inference_steps": 4, "guidance_scale": 0, "timesteps": FOUR}),
    "LCM-LoRA": Model("kohya", "LCMScheduler", {}, {"num_inference_steps": 4, "guidance_scale": 1.0}),
    "LCM-LoRA of another distillation": Model(
        "kohya", "LCMScheduler", {"original_inference_steps": 100}, {"num_inference_steps": 4, "guidance_scale": 0}
    ),
    "LCM-LoRA with guidance": Model("kohya", "LCMScheduler", {}, {"num_inference_steps": 4, "guidance_scale": 1.5}),
    "Turbo": Model(
        "unet.safetensors", "EulerAncestralDiscreteScheduler", TRAILING, {"num_inference_steps": 1, "guidance_scale": 0}
    ),
    "Turbo, more steps": Model(
        "unet.safetensors", "EulerAncestralDiscreteScheduler", TRAILING, {"num_inference_steps": 4, "guidance_scale": 0}
    ),
}


def opened(kind: str, folder: Path, file: Path, model: Model, **settings: Any) -> tuple[Any, Any]:
    """A pipeline's class here and in PyTorch, with the file and the sampler."""
    twin = getattr(diffusers, kind).from_pretrained(folder)
    twin.set_progress_bar_config(disable=True)
    twin.scheduler = getattr(diffusers, model.sampler).from_config(twin.scheduler.config, **model.settings)
    pipe = getattr(pipelines, kind).from_pretrained(folder).replace(**settings)
    pipe = pipe.replace(
        scheduler=getattr(schedulers, model.sampler).from_config(pipe.scheduler).replace(**model.settings)
    )
    if model.file in LORAS:
        LORAS[model.file](file.with_suffix(".safetensors"), twin.unet)
        twin.load_lora_weights(str(file.with_suffix(".safetensors")))
        return pipe.load_lora_weights(file.with_suffix(".safetensors")), twin
    file = file.with_name(model.file)
    write_unet(file, twin.unet)
    twin.unet.load_state_dict(torch.load(file) if file.suffix == ".bin" else load_file(file))
    return pipe.replace(unet=UNet2DConditionModel.from_single_file(file, config=folder / "unet")), twin


def check(pipe: Any, twin: Any, **call: Any) -> None:
    with torch.no_grad():
        wanted = twin(generator=torch.Generator().manual_seed(SEED), output_type="np", **call).images
    ours = pipe(seed=SEED, noise="torch", output_type="np", **call).images
    require_same(pipe, ours, wanted, TIGHT)


@pytest.mark.parametrize("name", MODELS)
def test_text_to_image(name: str, folder: Path, programs: Programs, tmp_path: Path) -> None:
    model = MODELS[name]
    pipe, twin = opened("StableDiffusionXLPipeline", folder, tmp_path / "file", model, programs=programs)
    check(pipe, twin, prompt="a cat", **model.call)
    assert programs.compilations <= 4, "with and without guidance, with and without noise in the steps"


@pytest.mark.parametrize("name", ["Turbo, more steps", "LCM-LoRA", "TCD LoRA"])
def test_image_to_image(name: str, folder: Path, programs: Programs, tmp_path: Path) -> None:
    """Strength leaves out the first steps, with samplers of a distillation too."""
    model = MODELS[name]
    pipe, twin = opened("StableDiffusionXLImg2ImgPipeline", folder, tmp_path / "file", model, programs=programs)
    steps = {"num_inference_steps": 2 * model.call["num_inference_steps"], "strength": 0.5}
    check(pipe, twin, prompt="a cat", image=folders.images(1, 32)[0], **model.call | steps)
