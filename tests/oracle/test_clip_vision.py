"""Vision encoders, the safety checker and image processors against transformers and diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from diffuse_jax.models import CLIPVisionModel, Model, StableDiffusionSafetyChecker
from diffuse_jax.processors import CLIPImageProcessor
from tests.oracle import twins
from tests.oracle.comparisons import TOLERANCE, channel_first, compare_vision, difference, vision_inputs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from diffuse_jax.torch_backend.twins import CALLS  # noqa: E402


@pytest.mark.parametrize("name", twins.VISIONS)
def test_every_output_equals_transformers(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    differences = compare_vision(twins.vision_twin(name, tmp_path), rng)
    assert max(differences.values()) <= TOLERANCE, differences


@pytest.mark.parametrize("name", ["CLIP-L", "no projection"])
def test_the_torch_backend_gives_every_output_too(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    module, model, params = twins.vision_twin(name, tmp_path)
    images = vision_inputs(model.config, rng)
    ours = jax.jit(lambda p, x: model.apply({"params": p}, x))(params, images)
    with torch.no_grad():
        theirs = CALLS[type(model).__name__, "__call__"](module, torch.tensor(images))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    differences = jax.tree.map(lambda a, b: difference(a, b.numpy()), ours, theirs)
    assert max(jax.tree.leaves(differences)) <= TOLERANCE


def checker(folder: Path) -> twins.Twin:
    return twins.safety_checker_twin(folder)


def no_projection(folder: Path) -> twins.Twin:
    return twins.vision_twin("no projection", folder)


def projection(folder: Path) -> twins.Twin:
    return twins.vision_twin("CLIP-L", folder)


@pytest.mark.parametrize("make", [no_projection, projection, checker])
def test_files_of_old_and_new_releases_are_read_and_what_is_saved_opens_there(make: Any, tmp_path: Path) -> None:
    """Releases of transformers before 5 have one ``vision_model.`` more, and that is what is saved here."""
    module, model, params = make(tmp_path / "new")
    model.save_pretrained(tmp_path / "old", params)
    new, old = (load_file(tmp_path / name / "model.safetensors") for name in ("new", "old"))
    deeper = {key if key in old else f"vision_model.{key}": value for key, value in new.items()}
    assert deeper.keys() == old.keys()
    for key, value in deeper.items():
        np.testing.assert_array_equal(value, old[key])
    again, own = type(model).from_pretrained(tmp_path / "old")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, own, params)
    back, report = type(module).from_pretrained(tmp_path / "old", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in module.state_dict().items())


def test_the_file_of_a_whole_clip_gives_its_vision_side() -> None:
    whole = transformers.CLIPConfig(vision_config=twins.VISION, projection_dim=7).to_dict()
    config = CLIPVisionModel.config_class.from_json(whole)
    assert (config.hidden_size, config.projection_dim) == (twins.VISION["hidden_size"], 7)


def flagged(model: Model, params: Any, images: np.ndarray) -> list[bool]:
    return np.asarray(jax.jit(lambda p, x: model.apply({"params": p}, x))(params, images)).tolist()


def test_the_same_images_are_flagged_as_by_diffusers(tmp_path: Path, rng: np.random.Generator) -> None:
    """Thresholds among the images' similarities; special care lowers that of the concepts by 0.01."""
    module, model, params = checker(tmp_path)
    images = rng.standard_normal((24, *vision_inputs(model.config, rng).shape[1:])).astype(np.float32)
    cosine = torch.nn.functional.cosine_similarity
    with torch.no_grad():
        embeds = module.visual_projection(module.vision_model(channel_first(images)).pooler_output)[:, None]
        nearest, special = (
            np.sort(cosine(embeds, concepts[None], dim=-1).max(1).values.numpy())
            for concepts in (module.concept_embeds, module.special_care_embeds)
        )
    concept = nearest[12] + 0.005
    verdicts = []
    for care, threshold in [(1, concept), (special[12], concept), (-1, concept), (1, -1), (1, 1)]:
        fill = lambda name, value: np.full_like(params[name], value)
        ours = params | {
            "special_care_embeds_weights": fill("special_care_embeds_weights", care),
            "concept_embeds_weights": fill("concept_embeds_weights", threshold),
        }
        module.special_care_embeds_weights.data.fill_(float(care))
        module.concept_embeds_weights.data.fill_(float(threshold))
        with torch.no_grad():
            _, theirs = module(channel_first(images), [np.zeros(1)] * len(images))
        assert flagged(model, ours, images) == theirs
        backend = CALLS["StableDiffusionSafetyChecker", "__call__"](module, torch.tensor(images))
        assert backend.tolist() == theirs
        assert flagged(model, ours, images[3:5]) == theirs[3:5], "an image's verdict depends on its batch"
        verdicts.append(sum(theirs))
    assert 0 < verdicts[0] <= verdicts[1] <= verdicts[2] < len(images), verdicts
    assert verdicts[0] < verdicts[2], "special care changed nothing"
    assert verdicts[3:] == [len(images), 0]


def test_diffusers_opens_a_checker_by_the_names_that_an_index_has() -> None:
    assert StableDiffusionSafetyChecker.library() == "stable_diffusion"


IMAGES = {"landscape": (50, 71), "portrait": (97, 40), "small": (20, 22), "square": (64, 64), "exact": (32, 32)}
PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIP": {"size": 32, "crop_size": 32},
    "no crop": {"size": {"height": 30, "width": 41}, "do_center_crop": False, "resample": 2},
    "a crop of larger images": {"do_resize": False, "crop_size": {"height": 45, "width": 31}},
    "odd sizes": {"size": {"shortest_edge": 25}, "crop_size": {"height": 30, "width": 27}},
    "not normalised": {"size": 32, "crop_size": 32, "do_normalize": False},
    "not rescaled": {"size": 32, "crop_size": 32, "do_rescale": False, "image_mean": [100, 90, 80]},
}


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("size", IMAGES)
def test_pixel_values_equal_transformers(processor: str, size: str, tmp_path: Path, rng: np.random.Generator) -> None:
    theirs = transformers.CLIPImageProcessor(**PROCESSORS[processor])
    theirs.save_pretrained(tmp_path)
    ours = CLIPImageProcessor.from_pretrained(tmp_path)
    image = rng.integers(0, 256, (*IMAGES[size], 3), dtype=np.uint8)
    expected = theirs(Image.fromarray(image), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours(Image.fromarray(image)), expected, atol=2e-6)
    np.testing.assert_array_equal(ours([image, image])[1:], ours(image))


@pytest.mark.parametrize(
    ("processor", "size"), [("CLIP", "portrait"), ("CLIP", "small"), ("no crop", "square"), ("odd sizes", "landscape")]
)
def test_on_the_device_pixel_values_differ_by_rounding(processor: str, size: str, rng: np.random.Generator) -> None:
    """On soft edges as in photographs; between black and white pixels Pillow clips what the filter overshoots."""
    ours = CLIPImageProcessor.from_json(PROCESSORS[processor])
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize(IMAGES[size][::-1], resample=Image.Resampling.BILINEAR))
    on_device = jax.jit(ours.on_device)(jnp.asarray(image[None] / 255, jnp.float32))
    level = (ours.rescale_factor if ours.do_rescale else 1) / (min(ours.image_std) if ours.do_normalize else 1)
    assert np.abs(on_device - ours(image)).max() <= 1.001 * level


def test_processor_files_are_exchanged_with_transformers(tmp_path: Path) -> None:
    ours = CLIPImageProcessor(size=(40, 30), do_center_crop=False)
    ours.save_pretrained(tmp_path)
    assert CLIPImageProcessor.from_pretrained(tmp_path) == ours
    theirs = transformers.CLIPImageProcessor.from_pretrained(tmp_path)
    assert (theirs.size["height"], theirs.size["width"]) == ours.size
    assert not theirs.do_center_crop


def test_the_defaults_and_the_oldest_files_are_those_of_transformers(tmp_path: Path) -> None:
    transformers.CLIPImageProcessor().save_pretrained(tmp_path)
    new = CLIPImageProcessor.from_pretrained(tmp_path)
    assert new == CLIPImageProcessor()
    assert not new.unknown()
    old = {"crop_size": 224, "size": 224, "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    assert CLIPImageProcessor.from_pretrained(tmp_path) == new


def test_the_safetensors_of_a_checker_with_a_missing_concept_are_refused(tmp_path: Path) -> None:
    checker(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["concept_embeds"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="1 missing.*concept_embeds"):
        StableDiffusionSafetyChecker.from_pretrained(tmp_path)
