"""Files of every layout and kind of adapter, read into one form and merged into the kernels."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffuse_jax.adapters.lora_file import load_lora, read_adapter, stem_of
from diffuse_jax.adapters.merging import merged
from diffuse_jax.layouts.lora_names import finder, layer_name, spellings_of
from diffuse_jax.models import UNet2DConditionModel
from diffuse_jax.models.controlnet import ControlNetModel
from diffuse_jax.models.presets import SD15_CONTROLNET, SD15_UNET, SDXL_UNET
from diffuse_jax.text.clip import CLIPTextModel
from diffuse_jax.text.presets import CLIP_L
from diffuse_jax.weights import WeightsError
from diffuse_jax.weights.names import flatten, from_torch, to_torch
from diffuse_jax.weights.safetensors import write_safetensors
from tests.pipelines import tiny

PIPE = tiny.pipeline()
SHAPES = {name: PIPE.components[name].shapes() for name in ("unet", "text_encoder")}
LAYERS = {
    "unet": [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "down_blocks.0.attentions.0.proj_in",
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.0.resnets.0.time_emb_proj",
        "down_blocks.0.downsamplers.0.conv",
        "conv_in",
        "time_embedding.linear_1",
    ],
    "text_encoder": [
        "text_model.encoder.layers.0.self_attn.q_proj",
        "text_model.encoder.layers.1.self_attn.out_proj",
        "text_model.encoder.layers.1.mlp.fc1",
    ],
}
"""A dense layer, a 1x1, a 3x3 and a strided convolution, and layers outside of the blocks."""

KERNELS = {
    (network, layer_name(path[:-1])): (path[:-1], to_torch(path, np.zeros(leaf.shape)).shape)
    for network, tree in SHAPES.items()
    for path, leaf in flatten(tree).items()
    if path[-1] == "kernel"
}

Factors = dict[tuple[str, str], dict[str, np.ndarray]]


def lora(rng: np.random.Generator, rank: Callable[[int], int] = lambda n: 2 + n % 3) -> Factors:
    """Random pairs of mixed ranks, float32 in PyTorch's axis order."""
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32) / 4
    found: Factors = {}
    for n, (network, name) in enumerate((net, name) for net, names in LAYERS.items() for name in names):
        out, *inner = KERNELS[network, name][1]
        r, ones = rank(n), (1,) * (len(inner) - 1)
        found[network, name] = {"down": normal(r, *inner), "up": normal(out, r, *ones)}
    return found


def product(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """``up @ down`` of the kernel's shape."""
    down, up = parts["down"], parts["up"]
    return (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(len(up), *down.shape[1:])


DOTS = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}
NEW = {"down": "lora.down.weight", "up": "lora.up.weight", "alpha": "alpha"}
PEFT = {"down": "lora_A.weight", "up": "lora_B.weight", "alpha": "alpha"}


def kohya(network: str, name: str) -> str:
    return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[network] + name.replace(".", "_")


def original(network: str, name: str) -> str:
    """The name of a layer in original checkpoints, if it has one."""
    table = spellings_of(network, SHAPES[network])
    path = table[name]
    return next((other for other, place in table.items() if place == path and other != name), name)


SPELLINGS: dict[str, tuple[Callable[[str, str], str], dict[str, str]]] = {
    "kohya": (kohya, DOTS),
    "kohya, first of two encoders": (lambda n, k: kohya(n, k).replace("lora_te_", "lora_te1_"), DOTS),
    "kohya, original names": (lambda n, k: kohya(n, original(n, k)), DOTS),
    "diffusers": (lambda n, k: f"{n}.{k}", NEW),
    "diffusers, kohya's ends": (lambda n, k: f"{n}.{k}", DOTS),
    "PEFT": (lambda n, k: f"{n}.{k}", PEFT),
    "PEFT with an adapter's name": (lambda n, k: f"{n}.{k}", {k: v.replace("_A", "_A.style") for k, v in PEFT.items()}),
    "PEFT, wrapped": (lambda n, k: f"base_model.model.{k}", PEFT),
    "ComfyUI": (lambda n, k: {"unet": "diffusion_model.", "text_encoder": "text_encoders.clip_l.transformer."}[n]
                + original(n, k), DOTS),
    "ai-toolkit": (lambda n, k: {"unet": "diffusion_model.", "text_encoder": "clip_l."}[n] + k, PEFT),
    "LyCORIS": (lambda n, k: kohya(n, k).replace("lora_unet_", "lycoris_"), DOTS),
}  # fmt: skip


def write(folder: Path, factors: Factors, spelling: str, **metadata: str) -> Path:
    """A file with these factors in one of the layouts."""
    spell, ends = SPELLINGS[spelling]
    tensors = {
        f"{spell(*layer)}.{ends.get(kind, kind)}": array for layer, p in factors.items() for kind, array in p.items()
    }
    save_file({key: np.ascontiguousarray(array) for key, array in tensors.items()}, folder / "a.safetensors", metadata)
    return folder / "a.safetensors"


def differences(source: Path) -> dict[tuple[str, str], np.ndarray]:
    """What a file adds to each kernel, in PyTorch's axis order."""
    found = {}
    for network, changes in read_adapter(source, SHAPES).items():
        for path, change in changes.items():
            kernel = flatten(PIPE.params[network])[(*path, "kernel")]
            found[network, layer_name(path)] = change.difference(to_torch(("kernel",), np.asarray(kernel)))
    return found


def same(found: Mapping[Any, np.ndarray], expected: Mapping[Any, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for layer, array in expected.items():
        np.testing.assert_allclose(found[layer], array, rtol=1e-5, atol=1e-6, err_msg=str(layer))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_layout_names_the_same_layers(spelling: str, tmp_path: Path, rng: np.random.Generator) -> None:
    factors = lora(rng)
    for n, parts in enumerate(factors.values()):
        if n % 2:  # half of the layers have no alpha, which means a factor of 1
            parts["alpha"] = np.float32(1 + n)
    expected = {k: product(p) * float(p.get("alpha", len(p["down"]))) / len(p["down"]) for k, p in factors.items()}
    same(differences(write(tmp_path, factors, spelling)), expected)


def test_merging_adds_the_differences(tmp_path: Path, rng: np.random.Generator) -> None:
    factors = lora(rng)
    file = write(tmp_path, factors, "kohya")
    after = PIPE.load_lora_weights(file, scale=0.5)
    for network in SHAPES:
        before, now = flatten(PIPE.params[network]), flatten(after.params[network])
        by_path = {KERNELS[layer][0]: product(parts) for layer, parts in factors.items() if layer[0] == network}
        for path, leaf in before.items():
            added = 0.5 * from_torch(path, by_path[path[:-1]]) if path[:-1] in by_path and path[-1] == "kernel" else 0
            np.testing.assert_allclose(now[path], leaf + added, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_narrow_dtypes_are_widened(dtype: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    factors = {k: {n: a.astype(dtype) for n, a in p.items()} | {"alpha": np.asarray(4, dtype)}
               for k, p in lora(rng).items()}  # fmt: skip
    tensors = {f"{kohya(*k)}.{DOTS[n]}": a for k, p in factors.items() for n, a in p.items()}
    specs = {key: (array.dtype, array.shape) for key, array in tensors.items()}
    write_safetensors(tmp_path / "narrow.safetensors", specs, iter(tensors.values()))
    full = {k: {n: a.astype(np.float32) for n, a in p.items()} for k, p in factors.items()}
    same(differences(tmp_path / "narrow.safetensors"), {k: product(p) * 4 / len(p["down"]) for k, p in full.items()})


def test_pickles_may_hold_alphas_as_numbers(tmp_path: Path, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    factors = lora(rng)
    tensors: dict[str, Any] = {f"{kohya(*k)}.{DOTS[n]}": torch.tensor(a) for k, p in factors.items()
                               for n, a in p.items()}  # fmt: skip
    tensors |= {f"{kohya(*k)}.alpha": 6 for k in factors}
    expected = {k: product(p) * 6 / len(p["down"]) for k, p in factors.items()}
    for name, content in (("a.pt", tensors), ("b.bin", {"state_dict": tensors, "epoch": 3})):
        torch.save(content, tmp_path / name)
        same(differences(tmp_path / name), expected)


def test_a_folder_of_peft_has_its_settings_beside(tmp_path: Path, rng: np.random.Generator) -> None:
    factors = {layer: parts for layer, parts in lora(rng, lambda n: 2).items() if layer[0] == "unet"}
    write(tmp_path, factors, "PEFT, wrapped").rename(tmp_path / "adapter_model.safetensors")
    settings = {"r": 2, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}, "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    same(differences(tmp_path), {k: product(p) * (1 if "attn1.to_q" in k[1] else 4) for k, p in factors.items()})


# Other kinds


def test_convolutions_with_a_core(tmp_path: Path, rng: np.random.Generator) -> None:
    """LoCon's Tucker form: down and up are 1x1, and the window is in between."""
    name = "down_blocks.0.resnets.0.conv1"
    out, inner, *window = KERNELS["unet", name][1]
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    parts = {"down": normal(3, inner, 1, 1), "lora_mid.weight": normal(4, 3, *window), "up": normal(out, 4, 1, 1)}
    expected = np.einsum(
        "ua,adhw,di->uihw", parts["up"][:, :, 0, 0], parts["lora_mid.weight"], parts["down"][:, :, 0, 0]
    )
    same(differences(write(tmp_path, {("unet", name): parts}, "kohya")), {("unet", name): expected})
    pair = load_lora(tmp_path / "a.safetensors", SHAPES)["unet"]["down_blocks_0"]["resnets_0"]["conv1"]
    assert pair["down"].shape == (*window, inner, 4), "a Tucker product is a pair like any other"


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoKr with a whole factor", "diff"])
@pytest.mark.parametrize("name", ["mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj", "conv_in"])
def test_products_of_other_kinds(kind: str, name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    out, inner, *window = shape = KERNELS["unet", name][1]
    normal = lambda *s: rng.standard_normal(s).astype(np.float32)
    t = lambda key: torch.tensor(parts[key])
    parts: dict[str, np.ndarray]
    if kind == "LoHa":
        wide = inner * int(np.prod(window))
        parts = {f"hada_w{i}_{h}": normal(*((out, 3) if h == "a" else (3, wide))) for i in (1, 2) for h in "ab"}
        expected = (t("hada_w1_a") @ t("hada_w1_b")) * (t("hada_w2_a") @ t("hada_w2_b")) * 6 / 3
    elif kind == "LoKr":
        parts = {"lokr_w1_a": normal(2, 3), "lokr_w1_b": normal(3, 2), "lokr_w2": normal(out // 2, inner // 2, *window)}
        first = (t("lokr_w1_a") @ t("lokr_w1_b")).reshape(2, 2, *[1] * len(window))
        expected = torch.kron(first, t("lokr_w2")) * 6 / 3
    elif kind == "LoKr with a whole factor":  # without an inner dimension, alpha has no meaning
        parts = {"lokr_w1": normal(2, 2), "lokr_w2": normal(out // 2, inner // 2, *window)}
        expected = torch.kron(t("lokr_w1").reshape(2, 2, *[1] * len(window)), t("lokr_w2"))
    else:
        parts = {"diff": normal(*shape)}
        expected = t("diff")
    file = write(tmp_path, {("unet", name): parts | {"alpha": np.float32(6)}}, "kohya")
    same(differences(file), {("unet", name): expected.numpy().reshape(shape)})
    with pytest.raises(WeightsError, match=f"is a {kind[:4]}, not a pair"):
        load_lora(file, SHAPES)


@pytest.mark.parametrize("by", ["output", "input"])
@pytest.mark.parametrize("name", ["mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0", "conv_in"])
def test_dora_has_columns_of_given_lengths(by: str, name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    factors = {layer: parts for layer, parts in lora(rng).items() if layer == ("unet", name)}
    (parts,) = factors.values()
    path, (out, inner, *window) = KERNELS["unet", name]
    shape = (1, inner) if by == "input" else (out, 1)
    parts["dora_scale"] = 1 + rng.random((*shape, *[1] * len(window))).astype(np.float32)
    change = read_adapter(write(tmp_path, factors, "kohya"), SHAPES)["unet"][path]
    new = to_torch(("kernel",), np.asarray(flatten(merged(PIPE.params["unet"], {path: change}))[(*path, "kernel")]))
    others = tuple(i for i in range(new.ndim) if i != (by == "input"))
    lengths = np.sqrt(np.square(new).sum(others, keepdims=True))
    np.testing.assert_allclose(lengths.ravel(), parts["dora_scale"].ravel(), rtol=1e-5)
    old = to_torch(("kernel",), np.asarray(flatten(PIPE.params["unet"])[(*path, "kernel")])) + product(parts)
    np.testing.assert_allclose(new, old * (lengths / np.sqrt(np.square(old).sum(others, keepdims=True))), rtol=1e-4)


# Names


SGM = {
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks_4_0_in_layers_2": "down_blocks.1.resnets.0.conv1",
    "input_blocks_4_0_out_layers_3": "down_blocks.1.resnets.0.conv2",
    "input_blocks_4_0_emb_layers_1": "down_blocks.1.resnets.0.time_emb_proj",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "middle_block_0_in_layers_2": "mid_block.resnets.0.conv1",
    "middle_block_1_transformer_blocks_9_attn2_to_k": "mid_block.attentions.0.transformer_blocks.9.attn2.to_k",
    "middle_block_2_emb_layers_1": "mid_block.resnets.1.time_emb_proj",
    "output_blocks_2_1_transformer_blocks_3_ff_net_2": "up_blocks.0.attentions.2.transformer_blocks.3.ff.net.2",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_0_skip_connection": "up_blocks.1.resnets.2.conv_shortcut",
    "input_blocks_0_0": "conv_in",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "out_2": "conv_out",
}


def test_original_names_of_sdxl() -> None:
    find = finder({"unet": UNet2DConditionModel(SDXL_UNET).shapes()})
    for name, ours in SGM.items():
        network, path = find(f"lora_unet_{name}") or ("", ())
        assert (network, layer_name(path)) == ("unet", ours), name


def test_original_names_of_stable_diffusion_1_beyond_block_ten() -> None:
    find = finder({"unet": UNet2DConditionModel(SD15_UNET).shapes()})
    for name, ours in {"input_blocks_10_0_in_layers_2": "down_blocks.3.resnets.0.conv1",
                       "output_blocks_11_1_proj_out": "up_blocks.3.attentions.2.proj_out"}.items():  # fmt: skip
        assert layer_name((find(f"lora_unet_{name}") or ("", ()))[1]) == ours


@pytest.mark.parametrize("model", [UNet2DConditionModel(SD15_UNET), UNet2DConditionModel(SDXL_UNET),
                                   ControlNetModel(SD15_CONTROLNET), CLIPTextModel(CLIP_L)])  # fmt: skip
def test_no_two_layers_share_a_name(model: Any) -> None:
    """Also with underscores, which kohya's scripts put in place of dots; every name leads back to its layer."""
    network = {"ControlNetModel": "controlnet", "CLIPTextModel": "text_encoder"}.get(type(model).__name__, "unet")
    prefix = {"controlnet": "lora_controlnet_", "text_encoder": "lora_te1_", "unet": "lora_unet_"}[network]
    shapes = {network: model.shapes()}
    find = finder(shapes)
    for name, path in spellings_of(network, shapes[network]).items():
        assert find(f"{network}.{name}") == find(prefix + name.replace(".", "_")) == (network, path)


# What is refused


def test_keys_that_match_no_layer_are_listed_or_left_out(tmp_path: Path, rng: np.random.Generator) -> None:
    factors = lora(rng)
    file = write(tmp_path, factors | {("unet", f"up.{i}.x"): {"down": np.ones((1, 1))} for i in range(9)}, "kohya")
    with pytest.raises(
        WeightsError, match=r"9 keys belong to no layer of unet, text_encoder: 'lora_unet_up_0_x.* and 3"
    ):
        read_adapter(file, SHAPES)
    with pytest.warns(UserWarning, match="9 keys belong to no layer") as caught:
        found = read_adapter(file, SHAPES, strict=False)
    assert len(caught) == 1
    assert {stem_of(n, p) for n, tree in found.items() for p in tree} == {".".join(layer) for layer in factors}


def test_junk_of_trainers_is_ignored(tmp_path: Path, rng: np.random.Generator) -> None:
    factors = lora(rng)
    file = write(tmp_path, factors, "kohya")
    junk = ["text_encoder.text_model.embeddings.position_ids", "bundle_emb.word.string_to_param.*", "global_step"]
    save_file(load_file(file) | {key: np.zeros(2, np.float32) for key in junk}, file)
    same(differences(file), {k: product(p) for k, p in factors.items()})


@pytest.mark.parametrize(
    ("key", "shape", "name"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", (4, 8), ""),
        ("transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight", (4, 8), "FLUX"),
        ("transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight", (4, 8), "Stable Diffusion 3"),
        ("diffusion_model.blocks.3.self_attn.q.lora_A.weight", (4, 8), "Wan"),
        (
            "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k.lora_down.weight",
            (4, 2048),
            "Stable Diffusion XL",
        ),
        ("unet.x.attn2.processor.to_k_lora.down.weight", (4, 1024), "Stable Diffusion 2"),
    ],
)
def test_a_file_for_another_architecture_says_which(key: str, shape: tuple, name: str, tmp_path: Path) -> None:
    save_file({key: np.zeros(shape, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=f"This LoRA is for {name}" if name else "belong to no layer"):
        read_adapter(tmp_path / "other.safetensors", SHAPES)


@pytest.mark.parametrize(
    ("end", "what"),
    [
        ("oft_diag", "OFT"),
        ("oft_blocks", "OFT"),
        ("oft_R.weight", "OFT"),
        ("boft_R", "BOFT"),
        ("on_input", "IA3"),
        ("ia3_l", "IA3"),
        ("a1.weight", "GLoRA"),
        ("vera_lambda_b", "VeRA"),
        ("lora_up.bias", "biases"),
        ("w_norm", "norms"),
    ],
)
def test_kinds_that_are_not_supported_are_named(end: str, what: str, tmp_path: Path) -> None:
    save_file({f"lora_unet_conv_in.{end}": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=f"The file holds .*{what}.* not supported"):
        read_adapter(tmp_path / "other.safetensors", SHAPES)


def test_a_controlnet_lllite_is_named(tmp_path: Path) -> None:
    name = "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    save_file(
        {f"{name}.{end}": np.zeros(3, np.float32) for end in ("down.0.weight", "up.0.weight")},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(WeightsError, match=r"holds a ControlNet-LLLite, which is not supported\.$"):
        read_adapter(tmp_path / "a.safetensors", SHAPES)


def test_factors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"  # 32 -> 32
    ones = lambda *shape: np.ones(shape, np.float32)
    cases = [
        ({"down": ones(2, 32), "hada_w1_a": ones(32, 2)}, "has factors of LoHa and LoRA"),
        ({"hada_w1_a": ones(32, 2), "hada_w1_b": ones(2, 32), "hada_w2_a": ones(32, 2)}, "has no hada_w2_b"),
        ({"hada_w1_a": ones(32, 2), "hada_w1_b": ones(3, 32), "hada_w2_a": ones(32, 2), "hada_w2_b": ones(2, 32)},
         "do not fit a layer 32 -> 32"),
        ({"lokr_w1": ones(3, 2), "lokr_w2": ones(16, 16)}, "do not fit"),
        ({"lokr_w1": ones(2, 2)}, "do not fit"),
        ({"diff": ones(32, 31)}, "do not fit"),
        ({"alpha": np.float32(1)}, "has alpha and no factors"),
        ({"down": ones(2, 32), "up": ones(32, 2), "dora_scale": ones(31, 1)}, r"dora_scale \(31, 1\) does not fit"),
    ]  # fmt: skip
    for parts, message in cases:
        file = write(tmp_path, {("unet", name): parts}, "kohya")
        with pytest.raises(WeightsError, match=message):
            read_adapter(file, SHAPES)


def test_one_of_several_files_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    file = write(tmp_path, lora(rng), "kohya")
    (tmp_path / "b.safetensors").write_bytes(file.read_bytes())
    (tmp_path / "optimizer.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"'a.safetensors', 'b.safetensors'.*weight_name="):
        read_adapter(tmp_path, SHAPES)
    assert read_adapter(tmp_path, SHAPES, weight_name="b.safetensors").keys() == SHAPES.keys()
    (tmp_path / "b.safetensors").unlink()
    assert read_adapter(tmp_path, SHAPES).keys() == SHAPES.keys()
