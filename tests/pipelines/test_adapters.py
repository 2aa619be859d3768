"""Live adapters: the same as merged ones, mixed, scaled, fused and removed, without compiling anything again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax import DiffusionPipeline
from diffuse_jax.adapters import lora as pairs
from diffuse_jax.adapters.lora_file import save_lora
from diffuse_jax.adapters.named import weight_at
from diffuse_jax.models.controlnet import ControlNetConfig, ControlNetModel
from diffuse_jax.pipelines import StableDiffusionControlNetPipeline, StableDiffusionImg2ImgPipeline
from diffuse_jax.pipelines.modifiers import FreeU, GuidanceInterval
from diffuse_jax.pipelines.parts import Guidance
from diffuse_jax.pipelines.parts.adapted import AdaptedNet, AtScale
from diffuse_jax.sharding import make_mesh
from tests.adapters.test_layouts import KERNELS, lora, write
from tests.models.filling import random_params
from tests.pipelines import tiny

PLAIN = tiny.pipeline()
SHARED: dict[str, Any] = {
    name: getattr(tiny.UNET, name)
    for name in ("block_out_channels", "layers_per_block", "down_block_types", "cross_attention_dim", "norm_num_groups",
                 "num_attention_heads")
}  # fmt: skip
"""What a ControlNet has in common with its UNet."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of dense layers, convolutions and the text encoder: ``a`` of rank 4, ``b`` of smaller, mixed ranks, and
    ``loha`` for one layer."""
    rng = np.random.default_rng(5)
    ranks = {"a": lambda n: 4, "b": lambda n: 1 + n % 3}
    found = {name: write(tmp_path_factory.mktemp(name), lora(rng, rank), "kohya") for name, rank in ranks.items()}
    layer = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    out, inner = KERNELS[layer][1]
    shapes = {f"hada_w{i}_{half}": (out, 2) if half == "a" else (2, inner) for i in (1, 2) for half in "ab"}
    parts = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return found | {"loha": write(tmp_path_factory.mktemp("loha"), {layer: parts}, "kohya")}


@pytest.fixture(scope="module")
def pipe(files: Mapping[str, Path]) -> Any:
    """Two adapters; ``b``, loaded last, is active."""
    first = PLAIN.load_lora_weights(files["a"], adapter_name="a", max_rank=8)
    return first.load_lora_weights(files["b"], adapter_name="b")


@dataclasses.dataclass(frozen=True)
class OwnGuidance(Guidance):
    """Only its type matters."""


def test_a_call_changes_the_method_of_the_pipeline(pipe: Any) -> None:
    """``method=`` finds the guidance that it finds without adapters, and these act in what it returns."""
    own = lambda m: dataclasses.replace(m, denoiser=OwnGuidance(m.denoiser.inner))
    denoiser = pipe.request("cat", guidance_scale=3.0, seed=0, method=own).method.denoiser
    assert isinstance(denoiser, AtScale)
    assert isinstance(denoiser.inner, OwnGuidance)
    assert isinstance(denoiser.inner.inner.net, AdaptedNet)


def latents(pipe: DiffusionPipeline, **options: Any) -> np.ndarray:
    """The latents of two images after two steps."""
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": [1, 2], "output_type": "latent"}
    return np.asarray(pipe(["cat", "dog"], **call | options).images)


def merged(files: Mapping[str, Path], **weights: float) -> Any:
    """The plain pipeline with files merged into it."""
    pipe = PLAIN
    for name, weight in weights.items():
        pipe = pipe.load_lora_weights(files[name], scale=weight)
    return pipe


def same(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max())


def test_live_adapters_equal_merged_ones_and_compile_nothing(pipe: Any, files: Mapping[str, Path]) -> None:
    live_b = latents(pipe)
    compiled = pipe.programs.compilations
    results = {
        "b": live_b,
        "a": latents(pipe.set_adapters("a")),
        "a at 0.5": latents(pipe.set_adapters("a", 0.5)),
        "both": latents(pipe.set_adapters(["a", "b"], [0.5, 0.6])),
        "called at 0.5": latents(pipe.set_adapters("a"), lora_scale=0.5),
        "called at 0": latents(pipe, lora_scale=0.0),
        "one image each": latents(pipe.set_adapters("a"), lora_scale=[0.5, 1.0]),
        "without b": latents(pipe.set_adapters(["a", "b"]).delete_adapters("b")),
    }
    assert pipe.programs.compilations == compiled, "weights, scales and other adapters are data"
    plain, only_a, half_a = latents(PLAIN), latents(merged(files, a=1.0)), latents(merged(files, a=0.5))
    same(results["b"], latents(merged(files, b=1.0)))
    same(results["a"], only_a)
    same(results["a at 0.5"], half_a)
    same(results["both"], latents(merged(files, a=0.5, b=0.6)))
    same(results["called at 0.5"], half_a)
    same(results["called at 0"], plain)
    same(results["one image each"], np.stack([half_a[0], only_a[1]]))
    same(results["without b"], only_a)
    different = [plain, only_a, half_a, results["both"], results["b"]]
    assert all(np.abs(x - y).max() > 1e-2 for i, x in enumerate(different) for y in different[:i])


def test_disabled_or_unloaded_is_the_plain_pipeline(pipe: Any) -> None:
    plain = latents(PLAIN)
    np.testing.assert_array_equal(latents(pipe.disable_lora()), plain)
    np.testing.assert_array_equal(latents(pipe.unload_lora_weights()), plain)
    np.testing.assert_array_equal(latents(pipe.delete_adapters(["a", "b"])), plain)
    np.testing.assert_array_equal(latents(pipe.disable_lora().enable_lora()), latents(pipe))


def test_names(pipe: Any) -> None:
    assert PLAIN.get_active_adapters() == []
    assert pipe.get_active_adapters() == ["b"]
    assert pipe.set_adapters(["a", "b"]).get_active_adapters() == ["a", "b"]
    assert pipe.set_adapters(["a", "b"]).delete_adapters("a").get_active_adapters() == ["b"]
    assert pipe.get_list_adapters() == {"unet": ["a", "b"], "text_encoder": ["a", "b"]}
    assert pipe.unload_lora_weights().get_list_adapters() == {}


def test_weights_may_be_numbers_of_numpy_and_jax(pipe: Any) -> None:
    expected = pipe.set_adapters(["a", "b"], [0.5, 0.25]).adapters.weights
    by_block = {"unet": {"up": jnp.float32(0.5)}}
    for given in (np.array([0.5, 0.25]), jnp.array([0.5, 0.25]), [np.float32(0.5), jnp.float32(0.25)]):
        assert pipe.set_adapters(["a", "b"], given).adapters.weights == expected
    kept = pipe.set_adapters("a", by_block).adapters.weights
    by_block["unet"]["up"] = jnp.float32(9)
    assert kept == {"a": {"unet": {"up": 0.5}}}, "pipelines are immutable"


def test_fusing_changes_nothing_and_unfusing_restores_every_bit(pipe: Any) -> None:
    mixed = pipe.set_adapters(["a", "b"], [0.5, 0.6])
    fused = mixed.fuse_lora(lora_scale=0.7)
    same(latents(fused), latents(mixed, lora_scale=0.7))
    assert "lora" not in fused.params, "nothing is left to compute"
    again = fused.unfuse_lora()
    for network in ("unet", "text_encoder"):
        jax.tree.map(np.testing.assert_array_equal, again.params[network], PLAIN.params[network])
    np.testing.assert_array_equal(latents(again), latents(mixed))
    one = mixed.fuse_lora(adapter_names="a")
    same(latents(one), latents(mixed))  # b is live beside it
    both = one.fuse_lora(adapter_names="b").unfuse_lora()
    jax.tree.map(np.testing.assert_array_equal, both.params["unet"], PLAIN.params["unet"])
    same(latents(fused.unload_lora_weights()), latents(fused))


def test_a_fused_pipeline_is_saved_as_an_ordinary_one(pipe: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="not part of the saved model .b."):
        pipe.save_pretrained(tmp_path / "live")
    fused = pipe.fuse_lora()
    opened = DiffusionPipeline.from_pretrained(fused.save_pretrained(tmp_path / "fused"))
    jax.tree.map(np.testing.assert_array_equal, opened.params["unet"], fused.params["unet"])


def test_kinds_without_pairs_take_the_whole_difference(pipe: Any, files: Mapping[str, Path]) -> None:
    loaded = pipe.load_lora_weights(files["loha"], adapter_name="loha")
    same(latents(loaded, lora_scale=0.5), latents(merged(files, loha=0.5)))
    compiled = loaded.programs.compilations
    same(latents(loaded.set_adapters(["a", "loha"])), latents(merged(files, a=1.0, loha=1.0)))
    same(latents(loaded.set_adapters("a")), latents(merged(files, a=1.0)))
    assert loaded.programs.compilations == compiled


def test_another_task_and_prompts_as_embeddings(pipe: Any) -> None:
    """Adapters go with ``from_pipe``, and to text encoders that run by themselves."""
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.params["lora"] is pipe.params["lora"]
    network, params = pipe.components["text_encoder"], pipe.fuse_lora(lora_scale=0.5).params["text_encoder"]
    ids = pipe.components["tokenizer"](["", ""], padding="max_length", return_tensors="np")["input_ids"]
    states = network.apply({"params": params}, ids).last_hidden_state
    same(latents(pipe, lora_scale=0.5, negative_prompt_embeds=states), latents(pipe, lora_scale=0.5))
    with pytest.raises(ValueError, match="must be one number where only some of the prompts"):
        latents(pipe, lora_scale=[0.5, 1.0], negative_prompt_embeds=states)


def test_weights_by_network_and_block() -> None:
    weight = {"unet": {"down": 0.5, "up": {"block_1": [0.1, 0.2], "block_0": 0.3}}, "text_encoder": 0.7}
    expected = {
        ("unet", "down_blocks_0", "resnets_0", "conv1"): 0.5,
        ("unet", "mid_block", "attentions_0", "proj_in"): 1.0,
        ("unet", "up_blocks_0", "resnets_1", "conv1"): 0.3,
        ("unet", "up_blocks_1", "attentions_1", "proj_in"): 0.2,
        ("unet", "up_blocks_1", "upsamplers_0", "conv"): 1.0,
        ("unet", "conv_in"): 1.0,
        ("text_encoder", "text_model", "encoder"): 0.7,
        ("text_encoder_2", "text_model", "encoder"): 1.0,
    }
    assert {place: weight_at(weight, place[0], place[1:]) for place in expected} == expected
    layer = ("up_blocks_1", "attentions_2", "proj_in")
    assert weight_at({"unet": {"up": {"block_1": [0.1]}}}, "unet", layer) == 0.1
    wrong: list[tuple[Any, str]] = [
        ({"vae": 1.0}, "expected networks"),
        ({"unet": {"left": 1.0}}, "expected down, mid or up"),
        ({"unet": {"up": {"1": 1.0}}}, "expected block_0"),
        ({"unet": {"up": {"block_1": [0.1, 0.1]}}}, "has a layer 2"),
        (float("nan"), "finite number"),
        ("1", "finite number"),
    ]
    for value, message in wrong:
        with pytest.raises(ValueError, match=message):
            weight_at(value, "unet", layer)


def test_impossible_adapters_are_refused(pipe: Any, files: Mapping[str, Path]) -> None:
    fused = pipe.fuse_lora()
    unet = (pipe.components["unet"], jax.tree.map(lambda x: x + 1, pipe.params["unet"]))
    cases = [
        (lambda: pipe.load_lora_weights(files["a"], adapter_name="a"), "already an adapter 'a'"),
        (lambda: pipe.load_lora_weights(files["a"], max_rank=8), "give adapter_name too"),
        (lambda: pipe.set_adapters("c"), "no adapter is called 'c'; there are a, b"),
        (lambda: PLAIN.set_adapters("c"), "there are none; load with adapter_name="),
        (lambda: pipe.set_adapters(["a", "b"], [1.0]), "2 adapters, a, b, have 1 weights"),
        (lambda: pipe.set_adapters("a", float("inf")), "must be a finite number, got inf"),
        (lambda: pipe.fuse_lora(lora_scale=float("nan")), "must be a finite number, got nan"),
        (lambda: pipe.load_lora_weights("any", scale=float("nan")), "must be a finite number, got nan"),
        (lambda: PLAIN("a", lora_scale=0.5), "lora_scale needs an active live adapter"),
        (lambda: pipe.disable_lora()("a", lora_scale=0.5), "lora_scale needs an active live adapter"),
        (lambda: PLAIN.fuse_lora(), "no active adapter to fuse"),
        (lambda: PLAIN.unfuse_lora(), "no adapter is fused"),
        (lambda: fused.fuse_lora(), "b is fused already"),
        (lambda: fused.delete_adapters("b"), "cannot be deleted while fused"),
        (lambda: fused.replace(unet=unet), "unet has fused adapters"),
        (lambda: pipe("a", lora_scale=[1.0, 2.0, 3.0]), "lora_scale"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_fusing_what_is_not_finite_is_refused_on_request(pipe: Any) -> None:
    (path, change), *rest = pipe.adapters.named["a"]["unet"].items()
    parts = dict(change.parts) | {"up": np.full(change.parts["up"].shape, np.inf, np.float32)}
    broken = {"unet": dict(rest) | {path: dataclasses.replace(change, parts=parts)}}
    spoilt = dataclasses.replace(pipe, adapters=pipe.adapters.loaded("broken", broken))
    with pytest.raises(ValueError, match="NaN or infinite; the pipeline is unchanged"):
        spoilt.fuse_lora(safe_fusing=True)
    assert spoilt.fuse_lora().adapters.fused == ("broken",)


def test_a_replaced_network_keeps_the_adapters(pipe: Any) -> None:
    swapped = pipe.replace(unet=(pipe.components["unet"], jax.tree.map(lambda x: 2 * x, pipe.params["unet"])))
    assert swapped.get_active_adapters() == ["b"]
    jax.tree.map(np.testing.assert_array_equal, swapped.params["lora"], pipe.params["lora"])


def test_a_controlnet_has_adapters_too(tmp_path: Path) -> None:
    """Its layers have the same paths as the UNet's, and each network gets its own."""
    rng = np.random.default_rng(1)
    net = ControlNetModel(ControlNetConfig(**SHARED, conditioning_embedding_out_channels=(4, 8)))
    control = StableDiffusionControlNetPipeline.from_pipe(PLAIN, controlnet=(net, random_params(net.shapes(), rng)))
    fresh = pairs.init(net.shapes(), 3, jax.random.key(0))
    own = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32) / 4, fresh)
    save_lora(tmp_path, {"controlnet": own}, to="kohya")
    live, fixed = control.load_lora_weights(tmp_path, adapter_name="a"), control.load_lora_weights(tmp_path)
    image = np.full((16, 16, 3), 100, np.uint8)
    plain, a, b = (latents(p, image=[image, image]) for p in (control, live, fixed))
    same(a, b)
    assert np.abs(a - plain).max() > 1e-3
    assert live.get_list_adapters() == {"controlnet": ["a"]}


@pytest.mark.slow
def test_on_a_mesh_with_a_controlnet_and_modifiers(pipe: Any) -> None:
    """On eight devices, with parameters sharded, kept features and changed layers: what the merged adapters give."""
    rng = np.random.default_rng(1)
    net = ControlNetModel(ControlNetConfig(**SHARED, conditioning_embedding_out_channels=(4, 8)))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    control = StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=(net, random_params(net.shapes(), rng)))
    control = control.replace(mesh=mesh)
    live = control.set_adapters(["a", "b"], [0.5, 0.6])
    placed = {device for leaf in jax.tree.leaves(live.params["lora"]) for device in leaf.devices()}
    assert placed == {*mesh.devices.flat}
    call = {
        "image": [np.full((16, 16, 3), shade, np.uint8) for shade in (50, 200)],
        "modifiers": [FreeU(0.9, 0.2, 1.2, 1.4), GuidanceInterval(0.0, 0.5)],
    }
    found = latents(live, **call)
    compiled = live.programs.compilations
    other = latents(live.set_adapters("b"), **call)
    assert live.programs.compilations == compiled
    same(found, latents(live.fuse_lora(), **call))
    assert np.abs(found - other).max() > 1e-2
