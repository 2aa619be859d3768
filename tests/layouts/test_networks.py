"""Networks in files of their own: written in the original layout, read back, and published names and shapes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from diffuse_jax.convert import convert
from diffuse_jax.layouts import NETWORKS, network_in, open_file, write_single_file
from diffuse_jax.layouts.rows import combined_shape, to_original
from diffuse_jax.layouts.t2i_adapter import read_tensors, t2i_adapter_table
from diffuse_jax.models import (
    AutoencoderKL,
    ControlNetModel,
    DPTForDepthEstimation,
    IPAdapter,
    IPAdapterConfig,
    T2IAdapter,
    UNet2DConditionModel,
)
from diffuse_jax.models.controlnet import ControlNetConfig
from diffuse_jax.models.t2i_adapter import T2IAdapterConfig
from diffuse_jax.text import CLIPTextModel, CLIPTextModelWithProjection
from diffuse_jax.weights import WeightsError, names
from diffuse_jax.weights.load import READERS
from diffuse_jax.weights.safetensors import read_safetensors, write_safetensors
from tests.layouts.families import DEPTH, FAMILIES, family_tensors
from tests.weights.tiny import CLIP, OPENCLIP, SD1, SD2, VAE, XL, same_bits, torch_tensors, views

CHANNELS = (32, 64, 96, 96)
NETWORK: dict[str, Any] = {
    "UNet of 1.x": UNet2DConditionModel(SD1),
    "UNet that inpaints": UNet2DConditionModel(SD1.replace(in_channels=9)),
    "UNet of 2.x": UNet2DConditionModel(SD2),
    "UNet of XL": UNet2DConditionModel(XL),
    "autoencoder": AutoencoderKL(VAE),
    "autoencoder of 16 channels": AutoencoderKL(
        VAE.replace(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.5)
    ),
    "ControlNet": ControlNetModel(
        ControlNetConfig(
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            cross_attention_dim=64,
            conditioning_embedding_out_channels=(16, 24, 32),
        )
    ),
    "T2I-Adapter": T2IAdapter(T2IAdapterConfig(channels=CHANNELS)),
    "T2I-Adapter of XL": T2IAdapter(
        T2IAdapterConfig(channels=CHANNELS, adapter_type="full_adapter_xl", downscale_factor=16)
    ),
    "light T2I-Adapter": T2IAdapter(
        T2IAdapterConfig(channels=CHANNELS[:3], adapter_type="light_adapter", num_res_blocks=4)
    ),
    "CLIP": CLIPTextModel(CLIP),
    "CLIP with projection": CLIPTextModelWithProjection(CLIP.replace(projection_dim=24)),
    "OpenCLIP": CLIPTextModel(OPENCLIP),
    "OpenCLIP with projection": CLIPTextModelWithProjection(OPENCLIP.replace(projection_dim=64)),
    "depth": DPTForDepthEstimation(DEPTH),
    "IP-Adapter": IPAdapter(IPAdapterConfig(image_width=10, cross_attention_dim=24, layer_widths=(16, 32), tokens=2)),
}


@pytest.mark.parametrize("name", NETWORK)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_saved_is_read(name: str, dtype: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model = NETWORK[name]
    params = names.unflatten(views(model, rng, np.dtype(dtype)))
    path = model.save_single_file(tmp_path / "a.safetensors", params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the scale of an autoencoder is in the file's metadata
        read, own = type(model).from_single_file(path, dtype=dtype)
    assert read.config == model.config.replace(extra=read.config.extra)
    assert all(
        same_bits(np.asarray(a), np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (own, params)), strict=True)
    )
    read.save_single_file(tmp_path / "b.safetensors", own)
    stored, again = (read_safetensors(tmp_path / f"{letter}.safetensors") for letter in "ab")
    assert stored.keys() == again.keys()
    assert all(same_bits(again[key], array) for key, array in stored.items())


@pytest.mark.parametrize(
    "name", ["UNet of XL", "ControlNet", "light T2I-Adapter", "OpenCLIP with projection", "depth", "IP-Adapter"]
)
def test_files_become_folders_and_back(
    name: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = NETWORK[name]
    first = model.save_single_file(tmp_path / "a.safetensors", names.unflatten(views(model, rng)))
    assert network_in(open_file(first)[1]) == type(model).__name__
    opened: list[Path] = []
    read = READERS[".safetensors"]
    monkeypatch.setitem(READERS, ".safetensors", lambda path: opened.append(path) or read(path))
    folder = convert(first, tmp_path / "folder", dtype="float16")
    assert opened.count(first) == 1, "a .ckpt takes long to open"
    assert type(model).from_config(folder).config.replace(extra=model.config.extra) == model.config
    last = convert(folder, tmp_path / "b.safetensors", to="single-file")
    stored, again = read_safetensors(first), read_safetensors(last)
    assert stored.keys() == again.keys()
    assert all(same_bits(again[key], array.astype(np.float16)) for key, array in stored.items())


def test_a_network_without_a_layout_of_its_own_is_refused(tmp_path: Path) -> None:
    from diffuse_jax.models import UNet2DModel

    assert "UNet2DModel" not in NETWORKS
    assert not hasattr(UNet2DModel, "from_single_file")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_network_is_found_in_a_whole_checkpoint(family: str, tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = family_tensors(family, rng)
    write_single_file(path := tmp_path / "a.safetensors", tensors, family)
    assert network_in(open_file(path)[1]) is None
    for part, model in FAMILIES[family].items():
        read, params = type(model).from_single_file(path)
        # A UNet alone does not show whether its family's images have 512 or 768 pixels.
        assert (
            read.config == model.config.replace(extra=read.config.extra, sample_size=read.config.sample_size)
            if (hasattr(read.config, "sample_size"))
            else model.config.replace(extra=read.config.extra)
        )
        for at, leaf in names.flatten(params).items():
            assert same_bits(names.to_torch(at, np.asarray(leaf)), tensors[part][names.torch_key(at)]), (part, at)


PUBLISHED = {  # adapters of TencentARC, by their code (ldm/modules/encoders/adapter.py)
    "full": (
        T2IAdapterConfig(),
        {
            "conv_in.weight": (320, 192, 3, 3),
            "body.0.block1.weight": (320, 320, 3, 3),
            "body.1.block2.bias": (320,),
            "body.2.in_conv.weight": (640, 320, 1, 1),
            "body.4.in_conv.bias": (1280,),
            "body.7.block2.weight": (1280, 1280, 1, 1),
        },
    ),
    "gray": (T2IAdapterConfig(in_channels=1), {"conv_in.weight": (320, 64, 3, 3)}),
    "xl": (
        T2IAdapterConfig(adapter_type="full_adapter_xl", downscale_factor=16),
        {"conv_in.weight": (320, 768, 3, 3), "body.4.in_conv.weight": (1280, 640, 1, 1)},
    ),
    "light": (
        T2IAdapterConfig(channels=(320, 640, 1280), num_res_blocks=4, adapter_type="light_adapter"),
        {
            "body.0.in_conv.weight": (80, 192, 1, 1),
            "body.1.body.3.block1.weight": (160, 160, 3, 3),
            "body.3.out_conv.weight": (1280, 320, 1, 1),
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_sizes_of_published_t2i_adapters(name: str) -> None:
    config, shapes = PUBLISHED[name]
    flat = names.flatten(T2IAdapter(config).shapes())
    zeros = {path: np.broadcast_to(np.float32(0), leaf.shape) for path, leaf in flat.items()}
    tensors = names.torch_tensors(zeros)
    groups = to_original(tensors, t2i_adapter_table(tensors))
    stored = {
        old: np.broadcast_to(np.float32(0), combined_shape([(tensors[k], op) for k, op in parts]))
        for old, parts in groups.items()
    }
    assert {key: stored[key].shape for key in shapes} == shapes
    for spelling in (stored, {key.removeprefix("adapter."): array for key, array in tensors.items()}):
        found, read = read_tensors(spelling)
        assert found.keys() == tensors.keys()
        assert T2IAdapterConfig.from_json(read) == config


def save(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    path = folder / "model.safetensors"
    write_safetensors(path, {key: (a.dtype, a.shape) for key, a in tensors.items()}, tensors.values())
    return path


def test_an_autoencoder_alone_may_be_of_any_family(tmp_path: Path, rng: np.random.Generator) -> None:
    path = save(
        tmp_path,
        torch_tensors(
            AutoencoderKL(
                VAE.replace(
                    block_out_channels=(32, 64, 64, 64),
                    down_block_types=("DownEncoderBlock2D",) * 4,
                    up_block_types=("UpDecoderBlock2D",) * 4,
                )
            ),
            rng,
        ),
    )
    with pytest.warns(UserWarning, match=r"what its latents are scaled by; 0\.18215 .* SDXL pass config="):
        assert AutoencoderKL.from_single_file(path)[0].config.scaling_factor == 0.18215
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = AutoencoderKL.from_single_file(path, config={"scaling_factor": 0.13025})[0]
    assert given.config.scaling_factor == 0.13025
    many = AutoencoderKL(VAE.replace(latent_channels=16))
    with pytest.raises(WeightsError, match="has 16 latent channels; pass config="):
        AutoencoderKL.from_single_file(save(tmp_path, torch_tensors(many, rng)))


def test_a_depth_network_may_have_the_names_of_its_folder(tmp_path: Path, rng: np.random.Generator) -> None:
    net = DPTForDepthEstimation(DEPTH)
    params = names.unflatten(views(net, rng))
    net.save_pretrained(tmp_path, params)
    found = DPTForDepthEstimation.from_single_file(tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, found[1], params)


def test_text_encoders_are_found_in_files_of_a_whole_clip(tmp_path: Path, rng: np.random.Generator) -> None:
    encoder = CLIPTextModelWithProjection(OPENCLIP.replace(projection_dim=64))
    params = names.unflatten(views(encoder, rng))
    encoder.save_single_file(tmp_path / "text.safetensors", params)
    images = {"visual.conv1.weight": np.zeros(2, np.float32), "logit_scale": np.zeros((), np.float32)}
    path = save(tmp_path, read_safetensors(tmp_path / "text.safetensors") | images)
    left = "also holds CLIP's image encoder; it is left out, because a CLIPTextModel"
    with pytest.warns(UserWarning, match=left):
        own = CLIPTextModelWithProjection.from_single_file(path)[1]
    jax.tree.map(np.testing.assert_array_equal, own, params)
    with pytest.warns(UserWarning, match=left):
        plain, own = CLIPTextModel.from_single_file(path)
    assert (plain.config.hidden_act, own.keys()) == ("gelu", {"text_model"})
    with pytest.raises(WeightsError, match=r"contains no text encoder with a projection.*holds an autoencoder"):
        CLIPTextModelWithProjection.from_single_file(save(tmp_path, torch_tensors(AutoencoderKL(VAE), rng)))


def test_only_safetensors_are_written(tmp_path: Path, rng: np.random.Generator) -> None:
    vae = NETWORK["autoencoder"]
    with pytest.raises(ValueError, match=r"a\.ckpt does not end in \.safetensors"):
        vae.save_single_file(tmp_path / "a.ckpt", names.unflatten(views(vae, rng)))
