"""IP-Adapters against PyTorch diffusers: published files of random weights, loaded into a UNet by both libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffuse_jax.layouts import read_ip_adapter
from diffuse_jax.models import ImagePrompt, IPAdapter, IPAdapterConfig, image_prompts, presets
from diffuse_jax.models.image_attention import cross_attentions, resized_mask
from diffuse_jax.weights import names
from tests.models.filling import random_params
from tests.oracle import twins
from tests.oracle.comparisons import TOLERANCE, channel_first, channel_last, difference, to_torch, unet_inputs

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SIZES: dict[str, dict[str, Any]] = {
    "plain": {"projection": "linear", "image_width": 20},
    "plus": {
        "projection": "resampler",
        "image_width": 20,
        "tokens": 6,
        "hidden_width": 32,
        "heads": 2,
        "mlp_width": 128,
    },
    "full face": {"projection": "mlp", "image_width": 20, "hidden_width": 20},
    "face ID": {"projection": "face", "image_width": 20, "hidden_width": 40},
    "face ID plus": {
        "projection": "face_resampler",
        "image_width": 20,
        "hidden_width": 64,
        "heads": 1,
        "mlp_width": 256,
        "face_width": 12,
        "face_hidden_width": 24,
    },
}
"""Published forms; the ratios of widths are those that PyTorch assumes."""

SEQUENCE = 5
"""Hidden states of an image."""


def published(name: str, unet: Any, seed: int) -> tuple[IPAdapter, dict[str, np.ndarray]]:
    """A network of this form for a UNet, and the tensors of its file."""
    c = unet.config
    widths = tuple(cross_attentions(c).values())
    fields = {"cross_attention_dim": c.cross_attention_dim, "layer_widths": widths, "depth": 4}
    if name != "face ID plus":
        fields |= {key: getattr(IPAdapterConfig(), key) for key in ("face_width",)}
    model = IPAdapter(IPAdapterConfig(**fields | SIZES[name]))
    flat = names.flatten(random_params(model.shapes(), np.random.default_rng(seed)))
    return model, {key: names.to_torch(path, np.asarray(flat[path])) for key, path in names.torch_keys(flat).items()}


def nested(tensors: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """As a published ``.bin`` has them."""
    result: dict[str, dict[str, Any]] = {"image_proj": {}, "ip_adapter": {}}
    for key, array in tensors.items():
        part, _, rest = key.partition(".")
        result[part][rest] = torch.tensor(np.ascontiguousarray(array))
    return result


def write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    if path.suffix == ".bin":
        torch.save(nested(tensors), path)
    else:
        save_file({key: np.ascontiguousarray(array) for key, array in tensors.items()}, path)
    return path


def image_inputs(c: IPAdapterConfig, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Embeddings of ``count`` images for a batch of two."""
    normal = lambda *shape: rng.standard_normal((2, count, *shape)).astype(np.float32)
    if c.takes_faces:
        return {"images": normal(c.face_width), "states": normal(SEQUENCE, c.image_width)}
    return {"images": normal(SEQUENCE, c.image_width) if c.takes_states else normal(c.image_width)}


def run(
    model: Any, params: Any, inputs: dict[str, Any], adapters: list[Any], scales: list[Any], masks: list[Any]
) -> np.ndarray:
    def forward(params: Any, own: list[Any], images: list[Any], scales: list[Any], masks: list[Any]) -> jax.Array:
        prompts = [
            ImagePrompt(net.apply({"params": p}, **x), scale, mask)
            for (net, _), p, x, scale, mask in zip(adapters, own, images, scales, masks)
        ]
        with image_prompts(model.config, prompts):
            return model.apply({"params": params}, **inputs)

    own, images = [p for (_, p) in adapters], inputs.pop("images")
    return np.asarray(jax.jit(forward)(params, own, images, scales, masks))


def run_torch(module: Any, inputs: dict[str, Any], masks: Any = None) -> np.ndarray:
    given = to_torch({name: value for name, value in inputs.items() if name != "images"})
    sample, timesteps = channel_first(inputs["sample"]), given.pop("timesteps")
    given.pop("sample")
    added = given.pop("added_cond_kwargs", {})
    embeds = [torch.tensor(x["images"]) for x in inputs["images"]]
    for layer, x in zip(module.encoder_hid_proj.image_projection_layers, inputs["images"]):
        if "states" in x:
            layer.clip_embeds = torch.tensor(x["states"])
    with torch.no_grad():
        return channel_last(
            module(
                sample,
                timesteps,
                added_cond_kwargs=added | {"image_embeds": embeds},
                cross_attention_kwargs=None if masks is None else {"ip_adapter_masks": masks},
                **given,
            ).sample
        )


def set_scales(module: Any, scales: list[Any]) -> None:
    """What ``pipe.set_ip_adapter_scale`` does, in every layer."""
    for processor in module.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = list(scales)


CASES = [
    ("SD 1.x", ["plain"], ".safetensors"),
    ("SD 1.x", ["plus"], ".bin"),
    ("SDXL base", ["full face"], ".safetensors"),
    ("SD 1.x", ["face ID"], ".safetensors"),
    ("SD 1.x", ["face ID plus"], ".bin"),
    ("SDXL base", ["plus", "plain"], ".safetensors"),
]


@pytest.mark.parametrize(("unet", "forms", "ending"), CASES)
def test_a_unet_with_images_equals_pytorch(
    unet: str, forms: list[str], ending: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    module, model, params = twins.unet_twin(unet, tmp_path / "unet")
    inputs, adapters, dicts = unet_inputs(model, rng), [], []
    for i, form in enumerate(forms):
        net, tensors = published(form, model, seed=i)
        path = write(tmp_path / f"{i}{ending}", tensors)
        read, own = IPAdapter.from_single_file(path)
        assert shown(read.config) == shown(net.config)
        adapters.append((read, own))
        dicts.append(nested(tensors))
    module._load_ip_adapter_weights(dicts, low_cpu_mem_usage=False)
    inputs["images"] = [image_inputs(net.config, 1 + i, rng) for i, (net, _) in enumerate(adapters)]
    scales = [0.7, 0.4][: len(forms)]
    set_scales(module, scales)
    expected = run_torch(module, inputs)
    ours = run(model, params, dict(inputs), adapters, scales, [None] * len(forms))
    assert difference(ours, expected) <= TOLERANCE
    set_scales(module, [0.0] * len(forms))
    assert difference(run_torch(module, inputs), expected) > 100 * TOLERANCE


def shown(config: IPAdapterConfig) -> dict[str, Any]:
    """What matters of a configuration: sizes that its projection does not have keep their defaults."""
    unused = {
        "linear": ("hidden_width", "heads", "depth", "mlp_width"),
        "mlp": ("tokens", "heads", "depth", "mlp_width"),
        "face": ("heads", "depth", "mlp_width"),
    }.get(config.projection, ())
    return {k: v for k, v in config.to_json().items() if k not in unused}


@pytest.mark.parametrize("form", ["plain", "plus"])
def test_masks_and_a_scale_for_each_image_equal_pytorch(form: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """Masks of another resolution than any layer; the second adapter has none."""
    module, model, params = twins.unet_twin("SD 1.x", tmp_path / "unet")
    pairs = [published(form, model, seed=0), published("plain", model, seed=1)]
    adapters = [IPAdapter.from_single_file(write(tmp_path / f"{i}.bin", t)) for i, (_, t) in enumerate(pairs)]
    module._load_ip_adapter_weights([nested(tensors) for _, tensors in pairs], low_cpu_mem_usage=False)
    inputs = unet_inputs(model, rng)
    inputs["images"] = [image_inputs(adapters[0][0].config, 2, rng), image_inputs(adapters[1][0].config, 1, rng)]
    masks = rng.integers(0, 2, (1, 2, 24, 24)).astype(np.float32)
    set_scales(module, [[0.7, 0.4], 0.5])
    expected = run_torch(module, inputs, [torch.tensor(masks), None])
    scales = [np.tile(np.float32([0.7, 0.4]), (2, 1)), 0.5]
    ours = run(model, params, dict(inputs), adapters, scales, [masks, None])
    assert difference(ours, expected) <= TOLERANCE
    other = run(model, params, dict(inputs), adapters, scales, [np.ones_like(masks), None])
    assert difference(other, expected) > 100 * TOLERANCE


def test_masks_of_another_aspect_are_cut_and_filled_as_by_pytorch(
    rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    downsample = diffusers.image_processor.IPAdapterMaskProcessor.downsample
    for shape, count in [((8, 8), 64), ((16, 24), 24), ((9, 13), 12), ((8, 16), 60), ((5, 5), 23), ((3, 40), 40)]:
        mask = rng.uniform(0, 1, (2, *shape)).astype(np.float32)
        theirs = downsample(torch.tensor(mask[:1]), 1, count, 1)[0, :, 0]
        np.testing.assert_allclose(resized_mask(jnp.asarray(mask), count)[0], theirs, atol=1e-5)
    assert "has another aspect than the image" in caplog.text


def test_scales_by_layer_equal_pytorch(tmp_path: Path, rng: np.random.Generator) -> None:
    """As ``set_ip_adapter_scale({"up": ...})`` sets them; two images without masks share one softmax."""
    module, model, params = twins.unet_twin("SD 1.x", tmp_path / "unet")
    _, tensors = published("plain", model, seed=0)
    adapter = IPAdapter.from_single_file(write(tmp_path / "a.safetensors", tensors))
    module._load_ip_adapter_weights([nested(tensors)], low_cpu_mem_usage=False)
    inputs = unet_inputs(model, rng) | {"images": [image_inputs(adapter[0].config, 2, rng)]}
    scales = {path: 0.3 * i for i, path in enumerate(cross_attentions(model.config))}
    for path, scale in scales.items():
        name = names.torch_key((*path, "processor"))
        module.attn_processors[name].scale = [scale]
    by_layer = np.tile(np.float32([*scales.values()]), (2, 1))
    ours = run(model, params, dict(inputs), [adapter], [by_layer], [None])
    assert difference(ours, run_torch(module, inputs)) <= TOLERANCE


def test_the_shortcut_of_face_id_plus_equals_pytorch(tmp_path: Path, rng: np.random.Generator) -> None:
    module, model, params = twins.unet_twin("SD 1.x", tmp_path / "unet")
    c = model.config
    net, _ = published("face ID plus", model, seed=0)
    # What is added must be as wide as the text, as in the published files.
    net = IPAdapter(net.config.replace(hidden_width=c.cross_attention_dim, mlp_width=4 * c.cross_attention_dim))
    flat = names.flatten(random_params(net.shapes(), rng))
    tensors = {key: names.to_torch(path, np.asarray(flat[path])) for key, path in names.torch_keys(flat).items()}
    adapter = IPAdapter.from_single_file(write(tmp_path / "a.bin", tensors), config={"shortcut": True})
    module._load_ip_adapter_weights([nested(tensors)], low_cpu_mem_usage=False)
    (layer,) = module.encoder_hid_proj.image_projection_layers
    layer.shortcut, layer.shortcut_scale = True, 0.6
    inputs = unet_inputs(model, rng) | {"images": [image_inputs(adapter[0].config, 1, rng)]}
    expected = run_torch(module, inputs)
    inputs["images"][0]["shortcut_scale"] = np.float32(0.6)
    assert difference(run(model, params, inputs, [adapter], [1.0], [None]), expected) <= TOLERANCE


@pytest.mark.parametrize("form", SIZES)
def test_pytorch_opens_what_is_saved_here(form: str, tmp_path: Path) -> None:
    module, model, _ = twins.unet_twin("SD 1.x", tmp_path / "unet")
    _, tensors = published(form, model, seed=0)
    net, own = IPAdapter.from_single_file(write(tmp_path / "a.safetensors", tensors))
    net.save_pretrained(tmp_path / "folder", own)
    again, read = IPAdapter.from_pretrained(tmp_path / "folder")
    assert again == net
    jax.tree.map(np.testing.assert_array_equal, read, own)
    saved = load_file(tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == tensors.keys()
    module._load_ip_adapter_weights([nested(saved)], low_cpu_mem_usage=False)
    for key, array in tensors.items():
        np.testing.assert_array_equal(saved[key], array)


def test_files_with_the_names_of_diffusers_are_read_too(tmp_path: Path) -> None:
    """Some newer files have a resampler under the names that it has in memory there."""
    module, model, _ = twins.unet_twin("SD 1.x", tmp_path / "unet")
    net, tensors = published("plus", model, seed=0)
    module._load_ip_adapter_weights([nested(tensors)], low_cpu_mem_usage=False)
    (layer,) = module.encoder_hid_proj.image_projection_layers
    renamed = {f"image_proj.{key}": tensor.numpy() for key, tensor in layer.state_dict().items()}
    renamed |= {key: array for key, array in tensors.items() if key.startswith("ip_adapter.")}
    read, own = IPAdapter.from_single_file(write(tmp_path / "a.safetensors", renamed))
    assert read.config == net.config
    flat = names.flatten(own)
    for key, path in names.torch_keys(flat).items():
        np.testing.assert_array_equal(names.to_torch(path, np.asarray(flat[path])), tensors[key])


def test_the_lora_in_a_face_file_is_found_and_belongs_to_no_parameter(tmp_path: Path, rng: np.random.Generator) -> None:
    _, model, _ = twins.unet_twin("SD 1.x", tmp_path / "unet")
    net, tensors = published("face ID", model, seed=0)
    lora = rng.standard_normal((4, 16)).astype(np.float32)
    path = write(tmp_path / "a.safetensors", tensors | {"ip_adapter.0.to_q_lora.down.weight": lora})
    np.testing.assert_array_equal(read_ip_adapter(path).lora[0, "to_q", "down"], lora)
    assert shown(IPAdapter.from_single_file(path)[0].config) == shown(net.config)


@pytest.mark.parametrize("preset", ["SD15_UNET", "SD21_UNET", "SDXL_UNET", "SDXL_REFINER_UNET"])
def test_layers_are_counted_as_by_pytorch(preset: str) -> None:
    config = getattr(presets, preset)
    with torch.device("meta"):
        module = diffusers.UNet2DConditionModel.from_config(config.to_json())
    theirs = [name for name in module.attn_processors if "attn2" in name]
    ours = cross_attentions(config)
    assert [names.torch_key((*path, "processor")) for path in ours] == theirs
    widths = {name: value.shape[0] for name, value in module.named_parameters() if name.endswith("attn2.to_q.weight")}
    assert [widths[names.torch_key((*path, "to_q", "kernel"))] for path in ours] == [*ours.values()]
