"""Loading and saving whole folders: choice of files, dtypes, shards, meshes, and nothing half-loaded."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import diffuse_jax.convert as conversion
from diffuse_jax import DiffusionPipeline, weights
from diffuse_jax.models import AutoencoderKL, UNet2DConditionModel
from diffuse_jax.text import CLIPTextModel, CLIPTextModelWithProjection
from diffuse_jax.weights import WeightsError, load_params, names, save_params
from diffuse_jax.weights.copy import BLOCK, LARGE, compact, forget
from diffuse_jax.weights.msgpack import write_msgpack
from diffuse_jax.weights.safetensors import read_metadata, read_safetensors, write_safetensors
from diffuse_jax.weights.save import parse_size
from diffuse_jax.writing import atomic_file
from tests.weights.tiny import NETWORKS, same_bits, views
from tests.weights.torch_files import mapping, storage, tensor, write_zip

MODEL = NETWORKS["vae"]


@pytest.fixture
def params(rng: np.random.Generator) -> dict[str, Any]:
    return names.unflatten(views(MODEL, rng))


def same_tree(a: Any, b: Any) -> bool:
    a, b = names.flatten(a), names.flatten(b)
    return a.keys() == b.keys() and all(same_bits(a[path], b[path]) for path in a)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_saved_network_opens_unchanged(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model, params = NETWORKS[name], names.unflatten(views(NETWORKS[name], rng))
    model.save_pretrained(tmp_path / "part", params)
    again, read = type(model).from_pretrained(tmp_path, subfolder="part")
    assert again.config == model.config.replace(extra=again.config.extra)
    assert same_tree(read, params)
    assert sorted(os.listdir(tmp_path / "part")) == ["config.json", f"{model.weights_name}.safetensors"]


def test_files_carry_what_pytorch_wants_to_see(tmp_path: Path, params: dict[str, Any]) -> None:
    MODEL.save_pretrained(tmp_path, params)
    assert read_metadata(tmp_path / "diffusion_pytorch_model.safetensors") == {"format": "pt"}
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "AutoencoderKL"
    assert (tmp_path / "config.json").stat().st_mode & 0o044 == 0o044 & ~os.umask(os.umask(0o022))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes_are_cast_while_reading_and_while_writing(dtype: str, tmp_path: Path, params: dict[str, Any]) -> None:
    kind = jnp.dtype(dtype)
    expected = {path: array.astype(kind) for path, array in names.flatten(params).items()}
    save_params(tmp_path / "wide", params)
    if dtype != "float64":  # JAX has no 64-bit floats by default
        read = load_params(tmp_path / "wide", MODEL.shapes(), dtype=dtype)
        assert same_tree(read, names.unflatten(expected))
    save_params(tmp_path / "narrow", params, dtype=dtype)
    stored = read_safetensors(tmp_path / "narrow" / "diffusion_pytorch_model.safetensors")
    assert {array.dtype for array in stored.values()} == {kind}


def test_integers_keep_their_dtype(tmp_path: Path) -> None:
    tree = {"table": {"embedding": np.arange(6).reshape(3, 2).astype(np.int32), "bias": np.ones(2, np.float32)}}
    save_params(tmp_path, tree)
    read = load_params(tmp_path, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree), dtype="bfloat16")
    assert read["table"]["embedding"].dtype == jnp.int32
    assert read["table"]["bias"].dtype == jnp.bfloat16


def test_the_models_two_dtypes_are_separate(tmp_path: Path, params: dict[str, Any]) -> None:
    MODEL.save_pretrained(tmp_path, params)
    model, read = AutoencoderKL.from_pretrained(tmp_path, dtype="bfloat16", param_dtype="float32")
    assert model.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {jnp.dtype("float32")}
    _, read = AutoencoderKL.from_pretrained(tmp_path, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {jnp.dtype("bfloat16")}


def test_shards_and_their_index(tmp_path: Path, params: dict[str, Any]) -> None:
    files = save_params(tmp_path, params, max_shard_size="200KB")
    assert files[-1].name == "diffusion_pytorch_model.safetensors.index.json"
    assert len(files) > 3
    assert all(path.stat().st_size < 210_000 or len(read_safetensors(path)) == 1 for path in files[:-1])
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert set(index["weight_map"].values()) == {path.name for path in files[:-1]}
    assert same_tree(load_params(tmp_path, MODEL.shapes()), params)


def test_a_save_replaces_the_files_of_an_older_one(tmp_path: Path, params: dict[str, Any]) -> None:
    save_params(tmp_path, params, variant="fp16")
    save_params(tmp_path, params)
    save_params(tmp_path, params, max_shard_size="200KB")
    assert not (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    save_params(tmp_path, params)
    assert sorted(os.listdir(tmp_path)) == [
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
    ]


def test_a_variant_is_read_alone_or_not_at_all(tmp_path: Path, params: dict[str, Any]) -> None:
    save_params(tmp_path, params, variant="fp16", dtype="float16", max_shard_size="200KB")
    read = load_params(tmp_path, MODEL.shapes(), variant="fp16")
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {jnp.dtype("float16")}
    with pytest.raises(WeightsError, match=r"no weights: looked for diffusion_pytorch_model.safetensors.*fp16-00001"):
        load_params(tmp_path, MODEL.shapes())
    with pytest.raises(WeightsError, match="no weights of variant 'ema'"):
        load_params(tmp_path, MODEL.shapes(), variant="ema")


def test_safetensors_before_bin_before_msgpack() -> None:
    have = [
        "diffusion_flax_model.msgpack",
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors",
    ]
    while have:
        assert weights.files.choose_weights(have, "diffusion_pytorch_model") == have.pop()
    assert weights.files.choose_weights(["pytorch_model.bin", "flax_model.msgpack"], "model") == "pytorch_model.bin"
    assert weights.files.choose_weights(["model.safetensors.index.fp16.json"], "model") is None
    assert weights.files.choose_weights(["model.safetensors.index.fp16.json"], "model", "fp16")


@pytest.mark.parametrize("name", ["sd1", "vae", "clip"])
def test_old_flax_folders(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model, arrays = NETWORKS[name], views(NETWORKS[name], rng)
    old = {tuple(names.rename("/".join(path), names.FLAX_OLD).split("/")): array for path, array in arrays.items()}
    stem = "flax_model" if name == "clip" else "diffusion_flax_model"
    specs = {path: (array.dtype, array.shape) for path, array in old.items()}
    write_msgpack(tmp_path / f"{stem}.msgpack", specs, old.__getitem__)
    config = model.config_json()
    if "_class_name" in config:
        config["_class_name"] = "Flax" + config["_class_name"]
    weights.write_json(tmp_path / "config.json", config)
    assert (name == "sd1") == (old.keys() == arrays.keys())
    _, read = type(model).from_pretrained(tmp_path)
    assert same_tree(read, names.unflatten(arrays))


def mesh() -> Mesh:
    if len(jax.devices()) < 8:
        pytest.skip(f"needs 8 devices, has {len(jax.devices())}")
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"))


def test_each_device_reads_only_its_part(tmp_path: Path, params: dict[str, Any], monkeypatch: Any) -> None:
    save_params(tmp_path, params)
    split = NamedSharding(mesh(), PartitionSpec(None, "tensor"))
    whole = NamedSharding(mesh(), PartitionSpec())
    wants = lambda leaf: split if leaf.ndim == 2 and leaf.shape[1] % 4 == 0 else whole
    shardings = jax.tree.map(wants, MODEL.shapes())
    copied: list[tuple[int, ...]] = []

    def spy(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
        copied.append(view.shape)
        return compact(view, dtype)

    monkeypatch.setattr(weights.load, "compact", spy)
    read = load_params(tmp_path, MODEL.shapes(), dtype="bfloat16", shardings=shardings)
    assert same_tree(read, jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), params))
    kernel = read["encoder"]["mid_block"]["attentions_0"]["to_q"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(64, 16)}
    assert kernel.sharding == split
    assert (64, 16) in copied
    assert (64, 64) not in copied


def test_a_tree_of_shardings_must_have_the_trees_names(tmp_path: Path, params: dict[str, Any]) -> None:
    save_params(tmp_path, params)
    with pytest.raises(ValueError, match="differs from the tree of parameters, e.g. at decoder"):
        load_params(tmp_path, MODEL.shapes(), shardings={"encoder": NamedSharding(mesh(), PartitionSpec())})


def test_loaded_arrays_do_not_depend_on_the_file(tmp_path: Path, params: dict[str, Any]) -> None:
    save_params(tmp_path, params)
    read = load_params(tmp_path, MODEL.shapes())
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    with open(file, "r+b") as stream:
        stream.write(b"\xff" * file.stat().st_size)
    assert same_tree(read, params)


def test_loaded_arrays_can_be_donated(tmp_path: Path, params: dict[str, Any]) -> None:
    save_params(tmp_path, params)
    read = load_params(tmp_path, MODEL.shapes())
    double = jax.jit(lambda tree: jax.tree.map(lambda a: 2 * a, tree), donate_argnums=0)
    assert same_tree(double(read), jax.tree.map(lambda a: 2 * a, params))


@pytest.mark.parametrize("shape", [(3, 3, 40, 3 * BLOCK + 7), (700, 900), (LARGE // 4,), (5, 1), ()])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copies_equal_numpys(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> None:
    array = rng.standard_normal(shape[::-1]).astype(np.float32)
    copy = compact(array.T, np.dtype(dtype))
    assert same_bits(copy, array.T.astype(dtype))
    assert copy.flags.c_contiguous
    assert copy.ctypes.data % 64 == 0


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".msgpack"])
def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_not_a_crash(suffix: str, tmp_path: Path) -> None:
    array = np.zeros(10_000, np.float32)
    path = tmp_path / f"w{suffix}"
    if suffix == ".bin":
        write_zip(path, mapping(w=tensor(storage("0", array.size), 0, array.shape, (1,))), {"0": array.tobytes()})
    else:
        write = write_msgpack if suffix == ".msgpack" else write_safetensors
        name = ("w",) if suffix == ".msgpack" else "w"
        write(path, {name: (array.dtype, array.shape)}, (lambda _: array) if suffix == ".msgpack" else iter([array]))
    shapes = {"w": jax.ShapeDtypeStruct(array.shape, array.dtype)}
    views = weights.match(weights.read_checkpoint([path]), shapes, label="")
    os.truncate(path, 5000)
    with pytest.raises(WeightsError, match=rf"w\{suffix}: became shorter while it was being read \(5000 of"):
        weights.place(views)


def test_forgotten_pages_can_be_read_again(tmp_path: Path, rng: np.random.Generator) -> None:
    array = rng.standard_normal((300, 500)).astype(np.float32)
    save_params(tmp_path, {"dense": {"kernel": array}})
    view = read_safetensors(tmp_path / "diffusion_pytorch_model.safetensors")["dense.weight"].T
    for _ in range(2):
        assert same_bits(compact(view, view.dtype), array)
        forget(view)
        forget(view[3:5, 7:9])
    forget(array)


BROKEN = {
    "cut short": "truncated",
    "another model's config": "Does the config belong to another model?",
    "a config of another class": "is the config of UNet2DConditionModel, not of AutoencoderKL",
    "no config": "config.json: no such file",
    "config that is no JSON": "config.json: it is not JSON",
    "values the network refuses": "config.json: not a config of AutoencoderKL: .*nonsense",
    "a tensor too few": "1 missing, 0 unexpected, e.g. 'decoder.conv_in.bias' for decoder/conv_in/bias",
    "a tensor too many": "0 missing, 1 unexpected, e.g. 'extra.weight' matches nothing",
    "no weights": "no weights: looked for",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_folders_are_named_and_nothing_is_placed(
    kind: str, tmp_path: Path, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    MODEL.save_pretrained(tmp_path, params)
    file, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    data = json.loads(config.read_text())
    match kind:
        case "cut short":
            os.truncate(file, file.stat().st_size - 1)
        case "another model's config":
            config.write_text(json.dumps(data | {"block_out_channels": [32, 96]}))
        case "a config of another class":
            config.write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
        case "no config":
            config.unlink()
        case "config that is no JSON":
            config.write_text("{")
        case "values the network refuses":
            config.write_text(json.dumps(data | {"down_block_types": ["nonsense"] * 2}))
        case "a tensor too few":
            del params["decoder"]["conv_in"]["bias"]
            save_params(tmp_path, params)
        case "a tensor too many":
            save_params(tmp_path, params | {"extra": {"kernel": np.zeros((2, 2), np.float32)}})
        case "no weights":
            file.unlink()
    monkeypatch.setattr(weights.load, "place", lambda *_, **__: pytest.fail("parameters were placed"))
    with pytest.raises(WeightsError, match=f"(?s){tmp_path}.*{BROKEN[kind]}"):
        AutoencoderKL.from_pretrained(tmp_path)


BAD_INDEXES = {
    "escape": ({"a": "../a.safetensors"}, "'a' is listed in '../a.safetensors', which is not a plain file name"),
    "absolute": ({"a": "/etc/passwd"}, "not a plain file name"),
    "missing": ({"a": "b.safetensors"}, "'b.safetensors', which does not exist"),
    "number": ({"a": 3}, "not a plain file name"),
    "empty": ({}, "has no 'weight_map'"),
}


@pytest.mark.parametrize("kind", BAD_INDEXES)
def test_bad_indexes_are_refused(kind: str, tmp_path: Path) -> None:
    table, message = BAD_INDEXES[kind]
    weights.write_json(tmp_path / "model.safetensors.index.json", {"weight_map": table})
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json") as error:
        weights.weight_files(tmp_path, "model")
    assert message in str(error.value)


def test_one_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for i in (1, 2):
        save_params(tmp_path / str(i), {"a": {"bias": np.zeros(2, np.float32)}})
        (tmp_path / str(i) / "diffusion_pytorch_model.safetensors").rename(tmp_path / f"{i}.safetensors")
    with pytest.raises(WeightsError, match=r"2\.safetensors: 'a\.bias' is also in 1\.safetensors"):
        weights.read_checkpoint([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    with pytest.raises(WeightsError, match=r"unknown file type '\.onnx'"):
        weights.read_checkpoint([tmp_path / "a.onnx"])


def test_saving_another_networks_parameters_is_refused(tmp_path: Path, params: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match="AutoencoderKL: 1 missing, 0 unexpected"):
        MODEL.save_pretrained(tmp_path, params | {"quant_conv": {"kernel": params["quant_conv"]["kernel"]}})
    params["quant_conv"]["bias"] = np.zeros(3, np.float32)
    with pytest.raises(WeightsError, match=r"quant_conv/bias has shape \[3\], expected \[8\]"):
        MODEL.save_pretrained(tmp_path, params)
    assert list(tmp_path.iterdir()) == []


def test_text_encoders_name_their_class(tmp_path: Path, rng: np.random.Generator) -> None:
    model = NETWORKS["clip"]
    model.save_pretrained(tmp_path, names.unflatten(views(model, rng)))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["CLIPTextModel"], "clip_text_model")
    with pytest.raises(WeightsError, match="is the config of CLIPTextModel, not of CLIPTextModelWithProjection"):
        CLIPTextModelWithProjection.from_pretrained(tmp_path)
    assert CLIPTextModel.from_config(config).config == model.config.replace(
        extra=CLIPTextModel.from_config(config).config.extra
    )


def test_models_are_made_from_config_objects_too() -> None:
    assert UNet2DConditionModel.from_config({"_class_name": "FlaxUNet2DConditionModel"}, dtype="bfloat16").dtype
    with pytest.raises(WeightsError, match="config: is the config of AutoencoderKL"):
        UNet2DConditionModel.from_config({"_class_name": "AutoencoderKL"})


@pytest.mark.parametrize("dtype", ["bf16", "int8", 16])
def test_networks_compute_with_floating_types(dtype: Any) -> None:
    message = f"dtype must be a floating-point type such as 'float32', 'bfloat16' or 'float16', got {dtype!r}"
    with pytest.raises(ValueError, match=message):
        UNet2DConditionModel.from_config({}, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        UNet2DConditionModel.from_pretrained("diffuse-jax/emoji", subfolder="unet", param_dtype=dtype)
    with pytest.raises(ValueError, match=message):
        DiffusionPipeline.from_pretrained("diffuse-jax/emoji", dtype=dtype)


@pytest.mark.parametrize(("text", "size"), [("2GB", 2 * 10**9), ("1.5 MiB", 3 << 19), ("512kb", 512_000), (7, 7)])
def test_sizes(text: Any, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "2", "2XB", "-2GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="max_shard_size must be"):
        parse_size(text)


def test_a_folder_that_another_process_writes_is_never_read_as_a_mixture(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Two networks, saved in turn into one folder in several shards, and read all the while."""
    networks = [names.unflatten(views(MODEL, rng)) for _ in range(2)]
    stop, right, refused = threading.Event(), 0, set()

    def write() -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            MODEL.save_pretrained(tmp_path, networks[number % 2], max_shard_size="300KB")

    MODEL.save_pretrained(tmp_path, networks[0], max_shard_size="300KB")
    writer = threading.Thread(target=write)
    writer.start()
    try:
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            try:
                _, found = AutoencoderKL.from_pretrained(tmp_path)
            except WeightsError as error:
                refused.add(str(error).partition(": ")[2])
            else:
                assert any(same_tree(found, params) for params in networks)
                right += 1
    finally:
        stop.set()
        writer.join()
    print(right, refused)
    assert refused <= {
        "changed while it was being read; another process is writing it. Try again",
        "is being written by another process. Try again",
    }


def test_a_folder_that_somebody_is_writing_is_not_read(tmp_path: Path, rng: np.random.Generator) -> None:
    """Between two shards nothing changes, and what is there is a mixture."""
    MODEL.save_pretrained(tmp_path, names.unflatten(views(MODEL, rng)))
    with atomic_file(tmp_path / "config.json") as file:
        file.write((tmp_path / "config.json").read_bytes())
        with pytest.raises(WeightsError, match="is being written by another process"):
            AutoencoderKL.from_pretrained(tmp_path)
    (tmp_path / ".config.json.0.partial").touch()
    assert AutoencoderKL.from_pretrained(tmp_path), "what a killed writer left is nobody's"


def test_a_source_that_changes_is_not_converted(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    MODEL.save_pretrained(tmp_path / "vae", names.unflatten(views(MODEL, rng)))
    write = conversion._write_diffusers

    def meanwhile(*arguments: Any) -> None:
        write(*arguments)
        os.utime(tmp_path / "vae" / "config.json", (0, 0))

    monkeypatch.setitem(conversion.WRITERS, "diffusers", meanwhile)
    with pytest.raises(WeightsError, match=r"config\.json: changed while it was being read"):
        conversion.convert(tmp_path / "vae", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
