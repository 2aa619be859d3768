"""Pipelines with IP-Adapters against PyTorch diffusers: the same files, images, scales, masks and seeds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffuse_jax import pipelines
from diffuse_jax.models import UNet2DConditionModel
from diffuse_jax.pipelines.programs import Programs
from tests.oracle.agreement import TOLERANCE, require_same
from tests.oracle.test_ip_adapter import published, write

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
torch, diffusers, transformers = folders.torch, folders.diffusers, folders.transformers

from diffuse_jax.torch_backend import parity  # noqa: E402

EDGE, SEED = 32, 5
FORMS = {"plain": ".safetensors", "plus": ".bin"}
REQUEST = {"prompt": "a cat", "num_inference_steps": 3, "guidance_scale": 5.0}
MASKS = diffusers.image_processor.IPAdapterMaskProcessor(vae_scale_factor=2)


def image_encoder() -> Any:
    """An encoder whose embeddings and hidden states have the width that the adapters take."""
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=20,
        projection_dim=20,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return folders.lively(transformers.CLIPVisionModelWithProjection(config))


def written(folder: Path, unet: Any, forms: dict[str, str]) -> Path:
    """A repository of adapters for a UNet: ``models/plain.safetensors`` ..., ``models/image_encoder``."""
    (folder / "models").mkdir(parents=True)
    for seed, (form, ending) in enumerate(forms.items()):
        _, tensors = published(form, unet, seed)
        write(folder / "models" / f"{form}{ending}", tensors)
    image_encoder().save_pretrained(folder / "models" / "image_encoder")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.stable_diffusion(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture(scope="module")
def adapters(model: Path) -> Path:
    return written(model.with_name("adapters"), UNet2DConditionModel.from_pretrained(model / "unet")[0], FORMS)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return folders.images(3, 24)


def opened(name: str, model: Path, adapters: Path, files: Any, **options: Any) -> tuple[Any, Any]:
    """A pipeline with adapters here and in PyTorch."""
    twin = getattr(diffusers, name).from_pretrained(model)
    twin.set_progress_bar_config(disable=True)
    pipe = getattr(pipelines, name).from_pretrained(model).replace(programs=Programs())
    twin.load_ip_adapter(adapters, "models", files, **options)
    return pipe.load_ip_adapter(adapters, "models", files, **options), twin


def compare(pipe: Any, twin: Any, theirs: dict[str, Any] | None = None, **request: Any) -> np.ndarray:
    """Both sides agree on a request, with PyTorch's noise; ``theirs`` is what PyTorch calls otherwise."""
    ours_only = {name: request.pop(name) for name in [*request] if name.startswith("ip_adapter_") and theirs}
    with torch.no_grad():
        generator = torch.Generator().manual_seed(SEED)
        wanted = twin(generator=generator, output_type="np", **request, **theirs or {}).images
    ours = pipe(seed=SEED, noise="torch", output_type="np", **request, **ours_only).images
    require_same(pipe, ours, wanted)
    return ours


def differ(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(255 * np.abs(a - b).mean() > 10 * TOLERANCE)


def test_an_image_beside_the_prompt(model: Path, adapters: Path, images: list[Image.Image]) -> None:
    """Embeddings (plain): images, scales by number and by block, and what takes no images again."""
    pipe, twin = opened("StableDiffusionPipeline", model, adapters, "plain.safetensors")
    assert pipe.components["feature_extractor"].crop_size == (16, 16)
    first = compare(pipe, twin, ip_adapter_image=images[0], **REQUEST)
    compiled = pipe.programs.compilations
    for scale in (0.3, {"up": {"block_1": [0.0, 1.0]}}, {"down": 0.7, "mid": 0.2}, 0.0):
        twin.set_ip_adapter_scale(scale)
        pipe = pipe.set_ip_adapter_scale(scale)
        last = compare(pipe, twin, ip_adapter_image=images[1], **REQUEST)
        assert differ(first, last)
    assert pipe.programs.compilations == compiled
    again = pipe(seed=SEED, noise="torch", output_type="np", ip_adapter_image=images[0], ip_adapter_scale=1, **REQUEST)
    np.testing.assert_array_equal(again.images, first)
    plain = pipe.unload_ip_adapter()
    assert plain.components["image_encoder"] is plain.components["feature_extractor"] is None
    never = pipelines.StableDiffusionPipeline.from_pretrained(model)
    assert plain.request(**REQUEST).method == never.request(**REQUEST).method


def test_hidden_states_of_several_images_without_guidance(
    model: Path, adapters: Path, images: list[Image.Image]
) -> None:
    """Two images without masks share one attention."""
    pipe, twin = opened("StableDiffusionPipeline", model, adapters, "plus.bin")
    compare(pipe, twin, ip_adapter_image=[images[:2]], **REQUEST | {"guidance_scale": 1.0})


def test_sdxl_with_hidden_states(images: list[Image.Image], tmp_path: Path) -> None:
    """The negative branch sees the hidden states of a black image; two images of the prompt, and image to image."""
    model = folders.stable_diffusion_xl(tmp_path / "model")
    unet = UNet2DConditionModel.from_pretrained(model / "unet")[0]
    adapters = written(tmp_path / "adapters", unet, {"plus": ".safetensors"})
    pipe, twin = opened("StableDiffusionXLPipeline", model, adapters, "plus.safetensors")
    compare(pipe, twin, ip_adapter_image=images[0], num_images_per_prompt=2, **REQUEST)
    pipe, twin = opened("StableDiffusionXLImg2ImgPipeline", model, adapters, "plus.safetensors")
    compare(pipe, twin, ip_adapter_image=images[0], image=folders.images(3, EDGE)[2], strength=0.7, **REQUEST)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ControlNet", "InstructPix2Pix", "Img2Img", "Inpaint"])
def test_other_tasks_take_images_too(
    task: str, model: Path, adapters: Path, images: list[Image.Image], tmp_path: Path
) -> None:
    """ControlNets do not see the images; the guidance of InstructPix2Pix has three branches; with an image to start
    from, adapters act in the steps that are left."""
    inputs: dict[str, Any] = {"image": folders.images(3, EDGE)[2]}
    if task in ("Img2Img", "Inpaint"):
        inputs["strength"] = 0.7
    if task == "Inpaint":
        inputs["mask_image"] = folders.masks(EDGE)[0]
    if task == "ControlNet":
        model = folders.controlled(tmp_path / "model", 1)
    if task == "InstructPix2Pix":
        model = shutil.copytree(model, tmp_path / "model")
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(**folders.UNET | {"in_channels": 8})
        folders.lively(unet).save_pretrained(model / "unet")
    pipe, twin = opened(f"StableDiffusion{task}Pipeline", model, adapters, "plain.safetensors")
    compare(pipe, twin, ip_adapter_image=images[0], **inputs, **REQUEST)


@pytest.mark.slow
def test_variations_of_images(images: list[Image.Image], tmp_path: Path) -> None:
    """Two images with two variations each; the folder that is saved here opens there."""
    parts = diffusers.StableDiffusionPipeline.from_pretrained(folders.stable_diffusion(tmp_path / "sd")).components
    torch.manual_seed(0)
    encoder = image_encoder()
    unet = folders.lively(diffusers.UNet2DConditionModel(**folders.UNET | {"cross_attention_dim": 20}))
    prepare = transformers.CLIPImageProcessor(size=16, crop_size=16)
    twin = diffusers.StableDiffusionImageVariationPipeline(
        vae=parts["vae"],
        image_encoder=encoder,
        unet=unet,
        scheduler=parts["scheduler"],
        safety_checker=None,
        feature_extractor=prepare,
        requires_safety_checker=False,
    )
    twin.save_pretrained(tmp_path / "model")
    pipe = pipelines.DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert type(pipe) is pipelines.StableDiffusionImageVariationPipeline
    saved = pipe.save_pretrained(tmp_path / "saved")
    twin = diffusers.StableDiffusionImageVariationPipeline.from_pretrained(saved, safety_checker=None)
    twin.set_progress_bar_config(disable=True)
    compare(pipe, twin, image=images[:2], num_images_per_prompt=2, num_inference_steps=3, guidance_scale=4.0)
    request = parity.Request(["an image in its place"], {"num_inference_steps": 1, "seed": 0}, ("image_encoder",))
    compared = parity.check(parity.open_sides(str(saved), device="cpu"), request)
    assert compared.ok
    assert "image_encoder image embeds" in {row.name for row in compared.rows}
    with pytest.raises(ValueError, match="give image"):
        pipe()
    with pytest.raises(TypeError, match="no argument prompt"):
        pipe(images[0], prompt="a cat")


def test_several_adapters_with_masks_and_embeddings(model: Path, adapters: Path, images: list[Image.Image]) -> None:
    """Two images of the first adapter act in two halves, with a scale each; the second acts everywhere."""
    pipe, twin = opened("StableDiffusionPipeline", model, adapters, ["plain.safetensors", "plus.bin"])
    given = [images[:2], images[2]]
    scales = [[0.7, 0.4], 0.5]
    masks = folders.masks(EDGE)
    twin.set_ip_adapter_scale(scales)
    pipe = pipe.set_ip_adapter_scale(scales)
    prepared = MASKS.preprocess(masks, height=EDGE, width=EDGE)
    theirs = {
        "ip_adapter_image": given,
        "cross_attention_kwargs": {"ip_adapter_masks": [prepared.reshape(1, 2, EDGE, EDGE), None]},
    }
    ours = {"ip_adapter_image": given, "ip_adapter_masks": [masks, None]}
    first = compare(pipe, twin, theirs, **ours, **REQUEST)
    embeds = pipe.prepare_ip_adapter_image_embeds(given)
    wanted = twin.prepare_ip_adapter_image_embeds(given, None, "cpu", 1, True)
    for a, b in zip(embeds, wanted, strict=True):
        np.testing.assert_allclose(a, b.detach(), atol=1e-5)
    compiled = pipe.programs.compilations
    other = pipe(
        seed=SEED, noise="torch", output_type="np", **ours | {"ip_adapter_masks": [masks[::-1], None]}, **REQUEST
    )
    assert differ(other.images, first)
    assert pipe.programs.compilations == compiled


@pytest.mark.slow
def test_faces_with_their_lora(model: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """The LoRA of a face ID file, in self-attentions and cross-attentions, is a live adapter."""
    net = UNet2DConditionModel.from_pretrained(model / "unet")[0]
    (tmp_path / "models").mkdir()
    _, tensors = published("face ID", net, 0)
    _, projections = published("plain", net, 0)
    for number in range(2 * len([key for key in projections if "to_k_ip" in key])):
        width = tensors[f"ip_adapter.{number | 1}.to_k_ip.weight"].shape[0]
        for layer in ("to_q", "to_k", "to_v", "to_out"):
            source = net.config.cross_attention_dim if number % 2 and layer in ("to_k", "to_v") else width
            tensors |= {
                f"ip_adapter.{number}.{layer}_lora.down.weight": 0.3
                * rng.standard_normal((2, source)).astype(np.float32),
                f"ip_adapter.{number}.{layer}_lora.up.weight": 0.3 * rng.standard_normal((width, 2)).astype(np.float32),
            }
    write(tmp_path / "models" / "face.bin", tensors)
    pipe, twin = opened("StableDiffusionPipeline", model, tmp_path, "face.bin", image_encoder_folder=None)
    assert pipe.get_active_adapters() == ["faceid_0"]
    faces = rng.standard_normal((2, 1, 20)).astype(np.float32)
    request = {"ip_adapter_image_embeds": [faces], **REQUEST}
    first = compare(pipe, twin, {"ip_adapter_image_embeds": [torch.tensor(faces)]}, **request)
    without = pipe.set_adapters("faceid_0", 0.0)
    assert differ(first, without(seed=SEED, noise="torch", output_type="np", **request).images)
    assert pipe.unload_ip_adapter().get_list_adapters() == {}
