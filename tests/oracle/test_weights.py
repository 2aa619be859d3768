"""Files against PyTorch: what torch.save wrote is read, what is written PyTorch opens, and single files agree."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from diffuse_jax.convert import convert  # noqa: E402
from diffuse_jax.layouts import read_single_file, write_single_file  # noqa: E402
from diffuse_jax.weights import names  # noqa: E402
from diffuse_jax.weights.safetensors import read_safetensors  # noqa: E402
from diffuse_jax.weights.torch_file import read_torch, read_torch_object  # noqa: E402
from tests.layouts.families import FAMILIES, family_tensors  # noqa: E402
from tests.oracle.folders import stable_diffusion, stable_diffusion_xl  # noqa: E402
from tests.weights.tiny import NETWORKS, same_bits, views  # noqa: E402

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
NEWER = ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")


def numpy(tensor: Any) -> np.ndarray:
    """A tensor's bits, in the dtype that ml_dtypes or NumPy gives it."""
    import ml_dtypes

    name = str(tensor.dtype).removeprefix("torch.")
    kind = np.dtype(getattr(ml_dtypes, name, None) or getattr(np, name.replace("bool", "bool_")))
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw.view(kind).reshape(tuple(tensor.shape))


def examples() -> dict[str, Any]:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    found = {name: (base * 10).to(getattr(torch, name)) for name in DTYPES}
    return found | {
        "transposed": base.T,
        "a column": base[:, 3],
        "every second": base[::2, 1::3],
        "expanded": base[:, :1].expand(6, 5),
        "a picture": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "a parameter": torch.nn.Parameter(base.clone()),
        "a scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "learned": (base.clone().requires_grad_() * 2).detach(),
    }


@pytest.mark.parametrize("newer_format", [True, False])
def test_what_torch_saved(newer_format: bool, tmp_path: Path) -> None:
    tensors = examples()
    if newer_format:
        tensors |= {name: torch.arange(24).reshape(4, 6).to(getattr(torch, name)) for name in NEWER}
    torch.save(tensors, tmp_path / "a.bin", _use_new_zipfile_serialization=newer_format)
    read = read_torch(tmp_path / "a.bin")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(read[name], numpy(tensor)), name


@pytest.mark.parametrize("newer_format", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_state_dicts_of_modules(newer_format: bool, protocol: int, tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    whole = {"state_dict": module.state_dict(), "epoch": 3, "size": torch.Size([1, 2]), "names": ["a", ("b", 1.5)]}
    options = {"_use_new_zipfile_serialization": newer_format, "pickle_protocol": protocol}
    torch.save(whole, tmp_path / "a.ckpt", **options)
    read = read_torch(tmp_path / "a.ckpt")
    assert all(same_bits(read[name], numpy(tensor)) for name, tensor in module.state_dict().items())
    rest = read_torch_object(tmp_path / "a.ckpt")
    assert (rest["epoch"], rest["size"], rest["names"]) == (3, (1, 2), ["a", ("b", 1.5)])


def test_what_lightning_saves_beside_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the first files of Stable Diffusion: a class as a key, numbers of NumPy, the optimizer's moments."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})  # type: ignore[attr-defined]
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    state = torch.nn.Linear(2, 3).state_dict()
    whole = {
        "state_dict": {"state_dict": state},
        "callbacks": {module.ModelCheckpoint: {"best_model_score": np.float64(0.5), "best": np.float32(2)}},
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.ones(2, 3)}}, "param_groups": [{"lr": 1e-4}]}],
        "global_step": 875000,
    }
    for newer_format in (True, False):
        torch.save(whole, tmp_path / "a.ckpt", _use_new_zipfile_serialization=newer_format)
        assert read_torch(tmp_path / "a.ckpt").keys() == state.keys()
        assert read_torch_object(tmp_path / "a.ckpt")["global_step"] == 875000


OPENERS = {
    "UNet2DConditionModel": diffusers.UNet2DConditionModel,
    "AutoencoderKL": diffusers.AutoencoderKL,
    "CLIPTextModel": transformers.CLIPTextModel,
    "CLIPTextModelWithProjection": transformers.CLIPTextModelWithProjection,
}


@pytest.mark.parametrize("shard", ["10GB", "100KB"])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "sd1-inpaint"])
def test_pytorch_opens_what_is_saved(name: str, shard: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model, arrays = NETWORKS[name], views(NETWORKS[name], rng)
    model.save_pretrained(tmp_path, names.unflatten(arrays), max_shard_size=shard)
    module, report = OPENERS[type(model).__name__].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    prefix = "" if any(key.startswith("text_model.") for key in module.state_dict()) else "text_model."
    state = {key.removeprefix(prefix): tensor for key, tensor in module.state_dict().items()}
    for key, path in names.torch_keys(arrays).items():
        assert same_bits(numpy(state[key.removeprefix(prefix)]), names.to_torch(path, arrays[path])), key


@pytest.mark.parametrize("family", FAMILIES)
def test_single_files_are_split_as_diffusers_splits_them(family: str, tmp_path: Path, rng: np.random.Generator) -> None:
    from diffusers.loaders import single_file_utils as theirs

    write_single_file(tmp_path / "a.safetensors", family_tensors(family, rng), family)
    ours = read_single_file(tmp_path / "a.safetensors").networks
    stored = read_safetensors(tmp_path / "a.safetensors")
    whole = lambda: {key: torch.from_numpy(array.copy()) for key, array in stored.items()}
    split = {
        "unet": theirs.convert_ldm_unet_checkpoint(whole(), ours["unet"].config | {"class_embed_type": None}),
        "vae": theirs.convert_ldm_vae_checkpoint(whole(), ours["vae"].config),
    }
    module = OPENERS["CLIPTextModel"](transformers.CLIPTextConfig(hidden_size=64, num_hidden_layers=1))
    for part, prefix in (
        ("text_encoder", "cond_stage_model.model."),
        ("text_encoder_2", "conditioner.embedders.1.model."),
    ):
        if any(key.startswith(prefix) for key in stored):
            split[part] = theirs.convert_open_clip_checkpoint(module, whole(), prefix)
    if family in ("xl-refiner", "v2-turbo"):
        part = "text_encoder" if family == "v2-turbo" else "text_encoder_2"
        split[part] = theirs.convert_open_clip_checkpoint(module, whole(), "conditioner.embedders.0.model.")
    if family in ("v1", "xl"):
        split["text_encoder"] = theirs.convert_ldm_clip_checkpoint(whole())
    assert split.keys() == ours.keys() - {"depth_estimator"}
    for part, tensors in split.items():
        found = ours[part].checkpoint.tensors
        assert tensors.keys() == found.keys()
        for key, tensor in tensors.items():
            assert same_bits(found[key], numpy(tensor)), key


@pytest.mark.parametrize(("make", "changes"), [(stable_diffusion, {}), (stable_diffusion_xl, {})])
def test_pipelines_of_diffusers_survive_every_layout(make: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    first = make(tmp_path / "first", **changes)
    flax = convert(first, tmp_path / "flax", to="flax-msgpack")
    last = convert(flax, tmp_path / "last")
    before, after = (diffusers.DiffusionPipeline.from_pretrained(folder) for folder in (first, last))
    for name, part in before.components.items():
        if hasattr(part, "state_dict"):
            own = after.components[name].state_dict()
            assert all(torch.equal(tensor, own[key]) for key, tensor in part.state_dict().items())
    assert type(before.scheduler) is type(after.scheduler)
