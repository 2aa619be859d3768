"""IP-Adapters in pipelines: what is data and what is shared, batches, meshes, modifiers, and every misuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffuse_jax.models import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    IPAdapter,
    IPAdapterConfig,
    UNet2DConditionModel,
)
from diffuse_jax.models.image_attention import cross_attentions
from diffuse_jax.pipelines import (
    StableDiffusionDiffEditPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffuse_jax.pipelines.image_adapters import at_layers
from diffuse_jax.pipelines.modifiers import FreeU, PerturbedAttention, Regions, Windows
from diffuse_jax.sharding import make_mesh
from diffuse_jax.weights import WeightsError
from tests.models.filling import random_params
from tests.pipelines.tiny import UNET, pipeline

VISION = CLIPVisionConfig(
    hidden_size=12,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
    projection_dim=12,
)
FITS: dict[str, Any] = {
    "image_width": 12,
    "cross_attention_dim": 16,
    "layer_widths": tuple(cross_attentions(UNET).values()),
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plus": {"projection": "resampler", "hidden_width": 16, "heads": 1, "depth": 1, "mlp_width": 64},
    "face": {
        "projection": "face_resampler",
        "hidden_width": 16,
        "heads": 1,
        "depth": 1,
        "mlp_width": 64,
        "face_width": 6,
        "face_hidden_width": 8,
        "shortcut": True,
    },
}
SHORT: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each form as ``IPAdapter.save_pretrained`` writes it, and the image encoder."""
    folder, rng = tmp_path_factory.mktemp("adapters"), np.random.default_rng(0)
    for name, fields in FORMS.items():
        net = IPAdapter(IPAdapterConfig(**FITS | fields))
        net.save_pretrained(folder / name, random_params(net.shapes(), rng))
    encoder = CLIPVisionModelWithProjection(VISION)
    encoder.save_pretrained(folder / "encoders" / "vision", random_params(encoder.shapes(), rng))
    return folder


@pytest.fixture(scope="module")
def pipe(adapters: Path) -> StableDiffusionPipeline:
    return loaded(pipeline(), adapters, "plain")


def loaded(pipe: Any, adapters: Path, form: Any, **options: Any) -> Any:
    return pipe.load_ip_adapter(adapters, form, **{"image_encoder_folder": "encoders/vision"} | options)


def photo(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (10, 14, 3), np.uint8))


def test_images_scales_and_their_blocks_are_data(pipe: StableDiffusionPipeline) -> None:
    first = pipe("a", seed=0, ip_adapter_image=photo(0), **SHORT).images
    compiled = pipe.programs.compilations
    changes: list[dict[str, Any]] = [
        {"ip_adapter_image": photo(1)},
        {"ip_adapter_image": np.asarray(photo(0))[::-1]},
        {"ip_adapter_scale": 0.5},
        {"ip_adapter_scale": {"down": {"block_0": [0.4]}}},
        {"ip_adapter_scale": [{"up": 1.0}]},
    ]
    for change in changes:
        given = {"ip_adapter_image": photo(0), **change}
        assert np.abs(pipe("a", seed=0, **given, **SHORT).images - first).max() > 1e-4, change
    as_array = np.asarray(photo(0), np.float32) / 255
    np.testing.assert_array_equal(pipe("a", seed=0, ip_adapter_image=[as_array], **SHORT).images, first)
    set_before = pipe.set_ip_adapter_scale(0.5)("a", seed=0, ip_adapter_image=photo(0), **SHORT).images
    in_the_call = pipe("a", seed=0, ip_adapter_image=photo(0), ip_adapter_scale=0.5, **SHORT).images
    np.testing.assert_array_equal(set_before, in_the_call)
    assert pipe.programs.compilations == compiled


def test_embeddings_stand_for_images_and_may_differ_between_prompts(pipe: StableDiffusionPipeline) -> None:
    """Negative embeddings of all prompts, then those of their images; an image does not depend on its batch."""
    a, b = (pipe.prepare_ip_adapter_image_embeds(photo(k))[0] for k in (0, 1))
    assert a.shape == (2, 1, 12)
    assert not a[0].any(), "the negative branch of an adapter of embeddings sees zeros"
    both = np.stack([a[0], b[0], a[1], b[1]])
    together = pipe(["a", "b"], seed=[0, 1], ip_adapter_image_embeds=[both], **SHORT).images
    for k in (0, 1):
        alone = pipe("ab"[k], seed=[k], ip_adapter_image=photo(k), **SHORT).images
        np.testing.assert_allclose(together[k : k + 1], alone, atol=1e-5)


def test_a_face_needs_both_embeddings_and_keeps_its_shortcut(adapters: Path, rng: np.random.Generator) -> None:
    pipe = loaded(pipeline(), adapters, "face")
    assert pipe.image_adapters.nets[0].config.shortcut
    (states,) = pipe.prepare_ip_adapter_image_embeds(photo(0), do_classifier_free_guidance=False)
    faces = rng.standard_normal((1, 1, 6)).astype(np.float32)
    off = {"guidance_scale": 1.0, "seed": 0, **SHORT}
    request = pipe.request("a", ip_adapter_image_embeds=[{"images": faces, "states": states}], **off)
    assert jax.tree.map(np.shape, request.rows["image_prompts"]) == ({"images": (1, 1, 6), "states": (1, 1, 5, 12)},)
    with pytest.raises(ValueError, match="a dict with 'images' and 'states'"):
        pipe("a", ip_adapter_image_embeds=[faces], **off)
    with pytest.raises(ValueError, match="face ID takes embeddings of faces"):
        pipe("a", ip_adapter_image=photo(0), **off)


def test_modifiers_act_with_images(pipe: StableDiffusionPipeline) -> None:
    """At a scale of 0 the images are not there, whatever else acts; at 1 they are."""
    modifiers = [Regions(["b"], [np.eye(16, dtype=bool)]), PerturbedAttention(2.0), FreeU()]
    given = {"seed": 0, "modifiers": modifiers, **SHORT}
    plain = pipe.unload_ip_adapter()("a", **given).images
    without = pipe("a", ip_adapter_image=photo(0), ip_adapter_scale=0.0, **given).images
    np.testing.assert_allclose(without, plain, atol=2e-5)
    assert np.abs(pipe("a", ip_adapter_image=photo(0), **given).images - plain).max() > 1e-4


def test_a_mesh_gives_the_images_of_one_device(pipe: StableDiffusionPipeline) -> None:
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    placed = pipe.replace(mesh=mesh)
    leaves = jax.tree.leaves(placed.params["ip_adapter"])
    assert all(x.sharding.device_set == {*mesh.devices.flat} for x in leaves)
    together = placed(["a", "b"], seed=[0, 1], ip_adapter_image=photo(0), **SHORT).images
    for k in (0, 1):
        alone = pipe("ab"[k], seed=[k], ip_adapter_image=photo(0), **SHORT).images
        assert np.abs(together[k : k + 1] - alone).max() < 1e-4


def test_adapters_go_along_to_other_tasks_and_are_not_saved(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.params["ip_adapter"] is pipe.params["ip_adapter"]
    request = other.request("a", photo(0).resize((16, 16)), ip_adapter_image=photo(1))
    assert "prompt_pixels" in request.rows
    wide = UNet2DConditionModel(UNET.replace(cross_attention_dim=24))
    with pytest.raises(ValueError, match="this IP-Adapter is for a UNet with"):
        pipe.replace(unet=(wide, {}))
    with pytest.warns(UserWarning, match="IP-Adapters are not part of the saved model"):
        pipe.save_pretrained(tmp_path / "saved")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert again.components["image_encoder"] == pipe.components["image_encoder"]
    assert not again.image_adapters.nets


def test_loading_again_replaces_and_unloading_restores(pipe: StableDiffusionPipeline, adapters: Path) -> None:
    two = loaded(pipe, adapters, ["plain", "plus"], weight_name=["diffusion_pytorch_model.safetensors"] * 2)
    assert [net.config.projection for net in two.image_adapters.nets] == ["linear", "resampler"]
    assert pipe.image_adapters.nets[0].config.projection == "linear", "pipelines are immutable"
    bare = two.unload_ip_adapter()
    assert "ip_adapter" not in bare.params
    assert "image_encoder" not in bare.params
    own = pipeline().replace(image_encoder=(two.components["image_encoder"], two.params["image_encoder"]))
    kept = loaded(own, adapters, "plus").unload_ip_adapter()
    assert kept.components["image_encoder"] is own.components["image_encoder"], "it was there before"
    assert bare.unload_ip_adapter() is bare


def test_scales_may_be_numbers_of_numpy_and_jax(pipe: StableDiffusionPipeline) -> None:
    for half in (np.float32(0.5), np.array(0.5), jnp.float32(0.5), np.array([0.5]), [jnp.array(0.5)]):
        assert pipe.set_ip_adapter_scale(half).image_adapters.scales == (0.5,)
    by_block = {"up": np.array([0.5, 0.25])}
    kept = pipe.set_ip_adapter_scale(by_block).image_adapters.scales
    by_block["up"][0] = 9
    assert kept == ({"up": [0.5, 0.25]},), "pipelines are immutable"


EMBEDS = np.zeros((2, 1, 12), np.float32)
MISUSES: list[tuple[dict[str, Any], str]] = [
    ({}, "give either ip_adapter_image or ip_adapter_image_embeds: the pipeline has 1 IP-Adapter "),
    ({"ip_adapter_image": photo(0), "ip_adapter_image_embeds": [EMBEDS]}, "give either ip_adapter_image or"),
    ({"ip_adapter_image": [photo(0), photo(1)]}, r"has 2 entries for 1 IP-Adapters.*\[\[a, b\]\]"),
    ({"ip_adapter_image_embeds": EMBEDS}, "must be a list with an entry for each IP-Adapter, got ndarray"),
    ({"ip_adapter_image_embeds": [EMBEDS, EMBEDS]}, "has 2 entries for 1 IP-Adapters"),
    ({"ip_adapter_image_embeds": [EMBEDS[0]]}, r"must be floating-point \[R,N,12\], got float32 \[1, 12\]"),
    ({"ip_adapter_image_embeds": [EMBEDS[..., :5]]}, r"must be floating-point \[R,N,12\]"),
    ({"ip_adapter_image_embeds": [EMBEDS[:1]]}, r"with guidance.*\[2,N,...\] and not \[1, 1, 12\]"),
    ({"ip_adapter_image_embeds": [np.zeros((6, 1, 12), np.float32)]}, "has 3 images for 1 prompts"),
    ({"ip_adapter_image": photo(0), "ip_adapter_scale": [1.0, 1.0]}, "1 IP-Adapters have 2 scales"),
    ({"ip_adapter_image": photo(0), "ip_adapter_scale": "strong"}, "must be a finite number, got 'strong'"),
    ({"ip_adapter_image": photo(0), "ip_adapter_scale": float("nan")}, "must be a finite number, got nan"),
    ({"ip_adapter_image": photo(0), "ip_adapter_scale": {"side": 1}}, "names 'side'; expected down, mid or up"),
    ({"ip_adapter_image": photo(0), "ip_adapter_scale": {"up": {"block_0": 1}}}, "attention in block_1"),
    ({"ip_adapter_image": photo(0), "ip_adapter_scale": {"up": {"block_1": [1.0] * 3}}}, "up block_1 has 2 layers"),
    ({"ip_adapter_image": photo(0), "ip_adapter_scale": [[0.5, 0.5]]}, "needs ip_adapter_masks"),
    ({"ip_adapter_image": photo(0), "ip_adapter_masks": [photo(1), photo(2)]}, "has 2 entries for 1 IP-Adapters"),
    ({"ip_adapter_image": photo(0), "ip_adapter_masks": [[photo(1)] * 2]}, "2 masks for 1 images"),
    ({"ip_adapter_image": "photo.png"}, "ip_adapter_image must be a PIL image"),
]


@pytest.mark.parametrize(("given", "message"), MISUSES)
def test_misuse_is_answered_before_anything_is_compiled(
    given: dict[str, Any], message: str, pipe: StableDiffusionPipeline
) -> None:
    compiled = pipe.programs.compilations
    with pytest.raises((ValueError, TypeError), match=message):
        pipe("a", **given, **SHORT)
    assert pipe.programs.compilations == compiled


def test_what_cannot_be_loaded_or_used_says_why(pipe: StableDiffusionPipeline, adapters: Path) -> None:
    bare = pipeline()
    for name in ("ip_adapter_image", "ip_adapter_image_embeds", "ip_adapter_masks", "ip_adapter_scale"):
        with pytest.raises(ValueError, match=f"{name} needs an IP-Adapter; call load_ip_adapter first"):
            bare("a", **{name: [1.0]})
    with pytest.raises(ValueError, match="no IP-Adapter is loaded"):
        bare.set_ip_adapter_scale(0.5)
    with pytest.raises(ValueError, match="no IP-Adapter is loaded"):
        bare.prepare_ip_adapter_image_embeds(photo(0))
    with pytest.raises(WeightsError, match="has no file 'plain/other.safetensors'"):
        bare.load_ip_adapter(adapters, "plain", "other.safetensors")
    with pytest.raises(WeightsError, match="image_encoder_folder= says where the image encoder is"):
        bare.load_ip_adapter(adapters, "plain")
    with pytest.raises(ValueError, match="2 for weight_name, 1 for source, 3 for subfolder"):
        bare.load_ip_adapter(adapters, ["a", "b", "c"], ["x", "y"])
    blind = loaded(bare, adapters, "plain", image_encoder_folder=None)
    with pytest.raises(ValueError, match="needs an image_encoder and a feature_extractor"):
        blind("a", ip_adapter_image=photo(0))
    narrow = CLIPVisionModelWithProjection(VISION.replace(projection_dim=8))
    other = pipe.replace(image_encoder=(narrow, {}))
    with pytest.raises(ValueError, match="takes embeddings of width 12, and the image encoder's are 8"):
        other("a", ip_adapter_image=photo(0))
    edit = StableDiffusionDiffEditPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match="takes no images of IP-Adapters; call it on pipe.unload_ip_adapter"):
        edit.generate_mask(photo(0), "a", "b")
    masked = {"ip_adapter_image": photo(0), "ip_adapter_masks": [photo(1)]}
    with pytest.raises(ValueError, match="Windows and ImagePrompted cannot be used together"):
        pipe.request("a", modifiers=Windows(size=4, stride=4), **masked)


def test_scales_by_block_are_those_of_diffusers() -> None:
    """What is not named has 0, and one number holds for a block or a side."""
    names = [f"{block[:2]}{block[-1]}" for block, *_ in cross_attentions(UNET)]
    assert names == ["do0", "up1", "up1", "mik"]
    assert at_layers({"up": {"block_1": [0.1, 0.2]}}, UNET) == [0.0, 0.1, 0.2, 0.0]
    assert at_layers({"down": 0.3, "mid": [0.4]}, UNET) == [0.3, 0.0, 0.0, 0.4]
    assert at_layers({"up": [0.1, 0.2]}, UNET) == [0.0, 0.1, 0.2, 0.0]
    assert at_layers({"up": {"block_1": [[0.1, 0.9], 0.2]}}, UNET) == [0.0, [0.1, 0.9], 0.2, 0.0]
