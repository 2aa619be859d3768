"""LoRA files as diffusers and PEFT write them change the kernels by as much as they do there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffuse_jax.adapters import lora
from diffuse_jax.adapters.lora_file import load_lora, read_adapter
from diffuse_jax.models import UNet2DConditionModel
from diffuse_jax.weights.names import flatten, to_torch, torch_key
from tests.adapters.test_layouts import kohya, original
from tests.adapters.test_layouts import lora as random_pairs
from tests.pipelines import tiny

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 16},
        {"lora_alpha": 16, "use_rslora": True},
        {"lora_alpha": 2, "alpha_pattern": {"attn1.to_out.0": 8}, "rank_pattern": {"to_q": 2}},
    ],
)
@pytest.mark.parametrize("saved_by", ["network", "pipeline"])
def test_a_pair_is_as_strong_as_in_peft(settings: dict[str, Any], saved_by: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel.from_config(tiny.UNET.to_json())
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **settings))
    if saved_by == "network":
        unet.save_lora_adapter(tmp_path)
    else:
        diffusers.StableDiffusionPipeline.save_lora_weights(
            tmp_path,
            unet_lora_layers=peft.get_peft_model_state_dict(unet),
            unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        )
    read = lora.pairs_of(load_lora(tmp_path, {"unet": UNet2DConditionModel(tiny.UNET).shapes()})["unet"])
    layers = {name: layer for name, layer in unet.named_modules() if hasattr(layer, "get_delta_weight")}
    assert len(read) == len(layers) > 0
    for path, pair in read.items():
        theirs = layers[torch_key((*path, "kernel")).removesuffix(".weight")].get_delta_weight("default")
        np.testing.assert_allclose(pair["down"] @ pair["up"], theirs.detach().numpy().T, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as a folder that PyTorch opens."""
    return tiny.pipeline().save_pretrained(tmp_path_factory.mktemp("model"))


def kohya_file(folder: Path, rng: np.random.Generator, *, sgm: bool = False) -> Path:
    """Pairs of attention, feed-forward layers, convolutions and the text encoder, with rank 4 and alpha 2; diffusers
    does not apply mixed alphas as the file says, so ``tests/adapters`` compares those with products by hand."""
    tensors: dict[str, np.ndarray] = {}
    for (network, name), parts in random_pairs(rng, lambda n: 4).items():
        if name in ("conv_in", "time_embedding.linear_1"):
            continue  # diffusers mangles names outside of the blocks
        stem = kohya(network, original(network, name) if sgm else name)
        tensors |= {f"{stem}.lora_{half}.weight": parts[half] for half in ("down", "up")}
        tensors[f"{stem}.alpha"] = np.asarray(2, np.float32)
    save_file({key: np.ascontiguousarray(array) for key, array in tensors.items()}, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def test_kohyas_files_are_merged_as_in_diffusers(folder: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    file = kohya_file(tmp_path, rng)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs.load_lora_weights(str(file))
    theirs.fuse_lora(lora_scale=0.7)
    theirs.unload_lora_weights()
    ours = tiny.pipeline().load_lora_weights(file, scale=0.7)
    plain = tiny.pipeline()
    for network in ("unet", "text_encoder"):
        state = getattr(theirs, network).state_dict()
        compare_kernels(ours.params[network], state)
        moved = [path for path, leaf in flatten(plain.params[network]).items()
                 if not np.array_equal(leaf, flatten(ours.params[network])[path])]  # fmt: skip
        assert len(moved) == {"unet": 8, "text_encoder": 3}[network]


def compare_kernels(params: Any, state: Any) -> None:
    """Parameters here and in PyTorch are equal to 1e-6."""
    for path, leaf in flatten(params).items():
        key = torch_key(path)
        key = key if key in state else key.removeprefix("text_model.")
        theirs = state[key].numpy()
        np.testing.assert_allclose(to_torch(path, np.asarray(leaf)), theirs, rtol=1e-5, atol=1e-6, err_msg=key)


def test_original_block_names_are_those_of_diffusers(folder: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """diffusers renames them only where it gets the configuration, as in its SDXL pipelines."""
    file = kohya_file(tmp_path, rng, sgm=True)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    state, alphas = diffusers.StableDiffusionXLPipeline.lora_state_dict(str(file), unet_config=unet.config)[:2]
    diffusers.StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, unet)
    unet.fuse_lora()
    unet.unload_lora()
    compare_kernels(tiny.pipeline().load_lora_weights(file).params["unet"], unet.state_dict())


def test_dora_is_merged_as_in_peft(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    targets = ["to_q", "to_out.0", "conv1", "proj_in"]
    unet.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False, use_dora=True))
    for name, parameter in unet.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + torch.rand_like(parameter)
    unet.save_lora_adapter(tmp_path)
    unet.fuse_lora()
    unet.unload_lora()
    compare_kernels(tiny.pipeline().load_lora_weights(tmp_path).params["unet"], unet.state_dict())


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoKr, whole", "LoHa with a core", "LoKr with a core"])
def test_hadamard_and_kronecker_products_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel.from_config(tiny.UNET.to_json())
    targets = {"target_modules": ["to_q", "ff.net.0.proj", "conv1"], "init_weights": False, "alpha": 6, "r": 4}
    config = {
        "LoHa": lambda: peft.LoHaConfig(**targets),
        "LoHa with a core": lambda: peft.LoHaConfig(**targets, use_effective_conv2d=True),
        "LoKr": lambda: peft.LoKrConfig(**targets, decompose_both=True),
        "LoKr, whole": lambda: peft.LoKrConfig(**targets | {"r": 64}),
        "LoKr with a core": lambda: peft.LoKrConfig(**targets, use_effective_conv2d=True),
    }[kind]()
    peft.inject_adapter_in_model(config, unet)
    state = {f"base_model.model.{k}": v.numpy() for k, v in peft.get_peft_model_state_dict(unet).items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    config.save_pretrained(tmp_path)
    read = read_adapter(tmp_path, {"unet": UNet2DConditionModel(tiny.UNET).shapes()})["unet"]
    layers = {name: layer for name, layer in unet.named_modules() if hasattr(layer, "get_delta_weight")}
    assert len(read) == len(layers) > 0
    for path, change in read.items():
        layer = layers[torch_key((*path, "kernel")).removesuffix(".weight")]
        theirs = layer.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(change.difference(), theirs, rtol=1e-5, atol=1e-6)
