"""DeepFloyd IF's six pipelines against PyTorch diffusers, with its own noise."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import diffuse_jax
from diffuse_jax import pipelines
from diffuse_jax.pipelines import DiffusionPipeline, IFPipeline, IFSuperResolutionPipeline
from diffuse_jax.pipelines.if_timesteps import TABLES, fast27_timesteps
from diffuse_jax.pipelines.programs import Programs
from tests.oracle.agreement import require_same

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
from tests.oracle import if_folders  # noqa: E402

torch, diffusers, transformers = folders.torch, folders.diffusers, folders.transformers

SEEDS = [3, 4]
SHORT = {"prompt": ["A cat ", "two dogs!"], "negative_prompt": ["bad", ""], "num_inference_steps": 4}
IMAGES = folders.images(2, 40)
MASKS = folders.masks(40)
SMALL = folders.images(2, 8)

CALLS: dict[str, dict[str, Any]] = {
    "IFPipeline": {},
    "IFImg2ImgPipeline": {"image": IMAGES},
    "IFInpaintingPipeline": {"image": IMAGES, "mask_image": MASKS},
    "IFSuperResolutionPipeline": {"image": SMALL},
    "IFImg2ImgSuperResolutionPipeline": {"image": SMALL, "original_image": IMAGES},
    "IFInpaintingSuperResolutionPipeline": {"image": SMALL, "original_image": IMAGES, "mask_image": MASKS},
}
QUICK = ("IFPipeline", "IFInpaintingSuperResolutionPipeline")


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("if")
    return {stage: if_folders.save(root / f"stage{stage}", stage) for stage in (1, 2)}


@pytest.fixture(scope="module")
def opened(stages: dict[int, Path]) -> dict[int, tuple[Any, Any]]:
    """Stage -> its pipeline here and in PyTorch."""
    ours = {stage: DiffusionPipeline.from_pretrained(folder) for stage, folder in stages.items()}
    theirs = {1: diffusers.IFPipeline, 2: diffusers.IFSuperResolutionPipeline}
    found = {k: (ours[k], theirs[k].from_pretrained(folder, watermarker=None)) for k, folder in stages.items()}
    assert [type(pipe).__name__ for pipe, _ in found.values()] == ["IFPipeline", "IFSuperResolutionPipeline"]
    return found


def both(name: str, opened: dict[int, tuple[Any, Any]]) -> tuple[Any, Any]:
    """A class's pipelines with the stage's components, here and in PyTorch."""
    ours, theirs = opened[2 if "Super" in name else 1]
    twin = getattr(diffusers, name)(**theirs.components, requires_safety_checker=False)
    twin.set_progress_bar_config(disable=True)
    return getattr(pipelines, name).from_pipe(ours).replace(programs=Programs()), twin


def compare(pipe: Any, twin: Any, theirs: dict[str, Any] | None = None, **request: Any) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    with torch.no_grad():
        given = request | {"clean_caption": False} | (theirs or {})
        wanted = twin(generator=generators, output_type="np", **given).images
    require_same(pipe, pipe(seed=SEEDS, noise="torch", output_type="np", **request).images, wanted)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in CALLS])
def test_images_equal_those_of_pytorch(name: str, opened: dict[int, tuple[Any, Any]]) -> None:
    pipe, twin = both(name, opened)
    call = SHORT | CALLS[name]
    compare(pipe, twin, **call)
    changes: dict[str, Any] = {"guidance_scale": 2.0, "num_inference_steps": 3}
    changes |= {"noise_level": 100} if "Super" in name else {}
    if "strength" in inspect.signature(pipe.compose).parameters:
        evaluations = int(pipe.request(**call).plan.num_evaluations)
        changes |= {"strength": 0.5, "num_inference_steps": 2 * evaluations}
    compare(pipe, twin, **call | changes)
    assert pipe.programs.compilations == 1, "steps, guidance, seeds, strength and noise level are data"
    if name == "IFPipeline":
        timesteps = {"num_inference_steps": None, "timesteps": fast27_timesteps[::8]}
        compare(pipe, twin, {"num_inference_steps": 100}, **call | timesteps)
        assert pipe.programs.compilations == 1


@pytest.mark.slow
def test_without_guidance(opened: dict[int, tuple[Any, Any]]) -> None:
    pipe, twin = both("IFPipeline", opened)
    compare(pipe, twin, **SHORT | {"guidance_scale": 1.0})


@pytest.mark.slow
def test_wide_images_keep_their_shape(opened: dict[int, tuple[Any, Any]]) -> None:
    pipe, twin = both("IFImg2ImgPipeline", opened)
    compare(pipe, twin, **SHORT | {"image": [image.resize((70, 40)) for image in IMAGES]})
    assert pipe("a", image=IMAGES[0].resize((40, 70)), num_inference_steps=2).images[0].size == (16, 32)


@pytest.mark.slow
def test_what_is_not_masked_is_not_changed(opened: dict[int, tuple[Any, Any]]) -> None:
    pipe, _ = both("IFInpaintingPipeline", opened)
    image, mask = np.random.default_rng(0).uniform(0, 1, (16, 16, 3)).astype(np.float32), np.zeros((16, 16))
    mask[4:9] = 1
    out = pipe("a", image=image, mask_image=mask, num_inference_steps=3, seed=0, output_type="np").images[0]
    np.testing.assert_allclose(out[mask == 0], image[mask == 0], atol=1e-6)
    assert np.abs(out - image)[mask == 1].max() > 0.1


def test_one_encoding_serves_both_stages(opened: dict[int, tuple[Any, Any]]) -> None:
    """The first stage's embeddings equal PyTorch's, and a stage without T5 takes them."""
    first, twin = opened[1]
    embeds = first.encode_prompt("A cat", negative_prompt="bad")
    with torch.no_grad():
        theirs = twin.encode_prompt("A cat", negative_prompt="bad")
    for ours, wanted in zip(embeds, theirs, strict=True):
        np.testing.assert_allclose(ours, wanted.numpy(), atol=2e-5)
    assert first.encode_prompt(["a", "b"], False, 2)[1] is None
    assert first.encode_prompt(["a", "b"], num_images_per_prompt=2).prompt_embeds.shape == (4, 77, 24)

    second = opened[2][0].replace(text_encoder=None, tokenizer=None)
    assert "text_encoder" not in second.params
    rows = second.request(**embeds._asdict(), image=SMALL[0]).rows
    np.testing.assert_array_equal(rows["states"].values[0], np.concatenate(embeds[::-1]))
    with pytest.raises(ValueError, match="no text_encoder, so give negative_prompt_embeds and prompt_embeds"):
        second("a cat", image=SMALL[0])
    with pytest.raises(ValueError, match="no text_encoder, so give negative_prompt_embeds, as encode_prompt"):
        second(prompt_embeds=embeds.prompt_embeds, image=SMALL[0])
    with pytest.raises(ValueError, match="encode_prompt needs a text_encoder"):
        second.encode_prompt("a cat")


def test_stages_on_the_device_and_offloaded(opened: dict[int, tuple[Any, Any]]) -> None:
    """T5 in host memory after encoding; the first stage's images go to the second without leaving the device."""
    first, second = opened[1][0].offload("text_encoder"), opened[2][0].replace(text_encoder=None, tokenizer=None)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(first.params["text_encoder"]))
    embeds = first.encode_prompt("a cat")._asdict()
    small = first(**embeds, num_inference_steps=2, seed=0, output_type="jax").images
    request = second.request(**embeds, image=small, num_inference_steps=2, seed=0, output_type="np")
    assert isinstance(request.rows["low_res_image"], jax.Array)
    ours = second(**embeds, image=small, num_inference_steps=2, seed=0, output_type="np").images
    plain = second(**embeds, image=np.asarray(small), num_inference_steps=2, seed=0, output_type="np").images
    np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_a_saved_folder_opens_in_pytorch(opened: dict[int, tuple[Any, Any]], tmp_path: Path) -> None:
    for stage, (pipe, theirs) in opened.items():
        pipe.save_pretrained(tmp_path / str(stage))
        again = type(theirs).from_pretrained(tmp_path / str(stage), watermarker=None)
        for name in ("unet", "text_encoder"):
            ours, wanted = (getattr(p, name).state_dict() for p in (again, theirs))
            assert all(torch.equal(ours[key], wanted[key]) for key in wanted)


def test_safety_checker(opened: dict[int, tuple[Any, Any]], tmp_path: Path) -> None:
    config = transformers.CLIPConfig(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "projection_dim": 12,
        },
        projection_dim=12,
    )
    torch.manual_seed(0)
    checker = diffusers.pipelines.deepfloyd_if.safety_checker.IFSafetyChecker(config).eval()
    processor = transformers.CLIPImageProcessor(size=8, crop_size=8)
    images = np.stack([np.asarray(image) for image in folders.images(8, 8)])
    shown = processor(list(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        embeds = checker.vision_model(shown)[0]
        for head, rank in ((checker.w_head, 2), (checker.p_head, 4)):  # so many scores are below the threshold
            scores = head(embeds).flatten().sort().values
            head.bias.add_(0.5 - scores[rank : rank + 2].mean())
    folder = if_folders.save(tmp_path / "model", 1, safety_checker=checker, feature_extractor=processor)
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe.components["safety_checker"]) is diffuse_jax.IFSafetyChecker
    decode = pipe.request("a cat").method.decode
    ours = decode.checker.apply(pipe.params, decode.processor.on_device(images / np.float32(255)))
    _, unsafe, marked = checker(shown, [np.ones(1)] * 8)
    flagged = [a or b for a, b in zip(unsafe, marked, strict=True)]
    assert np.asarray(ours).tolist() == flagged
    assert 0 < sum(flagged) < 8 and unsafe != marked, "images of one kind prove nothing"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("IFPipeline", {"timesteps": "fast72"}, "one of fast27, .* got 'fast72'"),
        ("IFPipeline", {"height": 15}, "height must be a multiple of 2, got 15; try 14 or 16"),
        ("IFPipeline", {"prompt_embeds": np.zeros((2, 77, 5), np.float32), "prompt": None}, r"\[2, L, 24\]"),
        ("IFImg2ImgPipeline", {"image": None}, "give image: a PIL image"),
        ("IFImg2ImgPipeline", {"strength": 1.5}, "strength"),
        ("IFInpaintingPipeline", {"mask_image": None}, "give mask_image"),
        ("IFSuperResolutionPipeline", {"image": None}, "give image"),
        ("IFSuperResolutionPipeline", {"noise_level": 1000}, "noise_level must be an integer from 0 to 999, got 1000"),
        ("IFImg2ImgSuperResolutionPipeline", {"original_image": None}, "give original_image"),
    ],
)
def test_what_cannot_be_is_refused(
    name: str, changes: dict[str, Any], message: str, opened: dict[int, tuple[Any, Any]]
) -> None:
    pipe, _ = both(name, opened)
    with pytest.raises(ValueError, match=message):
        pipe.request(**SHORT | CALLS[name] | changes)


def test_a_stage_with_the_other_ones_network_is_refused(opened: dict[int, tuple[Any, Any]]) -> None:
    first, second = opened[1][0], opened[2][0]
    with pytest.raises(ValueError, match="needs a UNet with 3 input channels, got 6"):
        IFPipeline.from_pipe(second).request("a")
    mixed = IFSuperResolutionPipeline.from_pipe(
        first, image_noising_scheduler=second.components["image_noising_scheduler"]
    )
    with pytest.raises(ValueError, match="needs a UNet with 6 input channels, got 3"):
        mixed.request("a", image=SMALL[0])


def test_tables_descend() -> None:
    theirs = diffusers.pipelines.deepfloyd_if.timesteps
    for name, table in TABLES.items():
        assert table == getattr(theirs, f"{name}_timesteps")


def test_pipelines_share_their_components(opened: dict[int, tuple[Any, Any]]) -> None:
    pipe = opened[1][0]
    other = pipelines.IFInpaintingPipeline.from_pipe(pipelines.IFImg2ImgPipeline.from_pipe(pipe))
    assert other.params["unet"] is pipe.params["unet"]
