"""Low-rank pairs: the same computed beside the kernels and merged into them, files, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffuse_jax.adapters import lora
from diffuse_jax.adapters.lora_file import load_lora, save_lora
from diffuse_jax.adapters.targets import TARGETS, UNET_TARGETS
from diffuse_jax.models import UNet2DConditionModel
from diffuse_jax.models.presets import SD15_UNET
from diffuse_jax.text.clip import CLIPTextModel
from diffuse_jax.training.initial import initial_params
from diffuse_jax.weights import WeightsError
from diffuse_jax.weights.names import torch_key
from tests.bounds import bounded
from tests.models.small import one_level
from tests.pipelines import tiny

UNET, TEXT = (tiny.pipeline().components[name] for name in ("unet", "text_encoder"))
SMALL = UNet2DConditionModel(one_level(tiny.UNET))


def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    """A sample, a timestep and prompt embeddings for the tiny UNet."""
    k_sample, k_text = jax.random.split(jax.random.key(7))
    text = jax.random.normal(k_text, (1, 5, UNET.config.cross_attention_dim))
    return jax.random.normal(k_sample, (1, 8, 8, UNET.config.in_channels)), jnp.array([3]), text


def pairs(model: object, rng: np.random.Generator, rank: int = 3, targets: str = TARGETS) -> dict:
    """Pairs whose second half is not zero any more."""
    fresh = lora.init(model.shapes(), rank, jax.random.key(0), targets)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32) / 4, fresh)


def test_a_fresh_adapter_changes_nothing() -> None:
    params = initial_params(SMALL.shapes(), 0, zero=())
    fresh = lora.init(SMALL.shapes(), 4, jax.random.key(0))
    plain, adapted = (jax.jit(net.apply)({"params": params}, *inputs()) for net in (SMALL, lora.Adapted(SMALL, fresh)))
    np.testing.assert_array_equal(adapted, plain)
    down = np.concatenate([np.ravel(pair["down"]) for pair in lora.pairs_of(fresh).values()])
    assert down.std() == pytest.approx(1 / 4, rel=0.05)


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_live_and_merged_pairs_compute_the_same(remat: str, rng: np.random.Generator) -> None:
    params, own = initial_params(SMALL.shapes(), 0, zero=()), pairs(SMALL, rng, targets=UNET_TARGETS)
    model = SMALL.clone(remat=remat)

    def loss(own: dict, merged: bool) -> jax.Array:
        apply = model.apply if merged else lora.Adapted(model, own, 0.5).apply
        return jnp.square(apply({"params": lora.merge(params, own, 0.5) if merged else params}, *inputs())).mean()

    (a, grad_a), (b, grad_b) = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(own, m) for m in (True, False))
    assert float(a) == pytest.approx(float(b), rel=1e-5)
    without = jax.jit(model.apply)({"params": params}, *inputs())
    assert float(a) != pytest.approx(float(jnp.square(without).mean()), rel=1e-3)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grad_a))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4 * scale), grad_a, grad_b)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grad_b)), "a pair that gets no gradient"


def test_merging_is_undone_by_the_opposite_scale(rng: np.random.Generator) -> None:
    params, own = initial_params(UNET.shapes(), 0), pairs(UNET, rng, targets=UNET_TARGETS)
    again = lora.merge(lora.merge(params, own, 0.7), own, -0.7)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), params, again)


def test_all_attention_of_stable_diffusion_gets_pairs() -> None:
    """32 attention layers of four projections (spec: 12 down, 2 in the middle, 18 up), whose file PyTorch knows."""
    found = lora.pairs_of(
        jax.eval_shape(lambda k: lora.init(UNet2DConditionModel(SD15_UNET).shapes(), 4, k), jax.random.key(0))
    )
    assert len(found) == 4 * 32
    assert sum(leaf.size for pair in found.values() for leaf in pair.values()) == 797_184


def test_files_round_trip_and_other_layouts_are_read(tmp_path: Path, rng: np.random.Generator) -> None:
    own = {"unet": pairs(UNET, rng, targets=UNET_TARGETS), "text_encoder": pairs(TEXT, rng)}
    shapes = {"unet": UNET.shapes(), "text_encoder": TEXT.shapes()}
    file = save_lora(tmp_path, own)
    jax.tree.map(np.testing.assert_array_equal, load_lora(tmp_path, shapes), own)
    tensors = load_file(file)
    assert all("lora" in key for key in tensors)
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight" in tensors

    peft = {k.replace(".lora.down", ".lora_A").replace(".lora.up", ".lora_B"): v for k, v in tensors.items()}
    doubled = {f"unet.{k}" if k.startswith("unet") else k: v for k, v in tensors.items()}
    for other in (peft, doubled):
        save_file(other, tmp_path / "other.safetensors")
        jax.tree.map(np.testing.assert_array_equal, load_lora(tmp_path / "other.safetensors", shapes), own)

    key = next(k for k in tensors if k.endswith(".lora.up.weight"))
    scaled = tensors | {key.replace(".lora.up.weight", ".alpha"): np.float32(6.0)}
    save_file({k: np.asarray(v) for k, v in scaled.items()}, tmp_path / "alpha.safetensors")
    read = save_lora(tmp_path / "again", load_lora(tmp_path / "alpha.safetensors", shapes))
    np.testing.assert_allclose(load_file(read)[key], 2.0 * tensors[key], err_msg="alpha 6 for rank 3 is a factor of 2")


def older(key: str) -> str:
    """The layout of diffusers 0.14 to 0.16: attention processors, and no network's name before the UNet's layers."""
    key = re.sub(r"\.(to_\w+?)(\.0)?\.lora\.(down|up)", r".processor.\1_lora.\3", key.removeprefix("unet."))
    return re.sub(r"self_attn\.([a-z]+)_proj\.lora_linear_layer", r"self_attn.to_\1_lora", key)


def newer(key: str) -> str:
    """The layout of PEFT with transformers 5, whose encoders have lost a level."""
    return re.sub(r"\.lora(_linear_layer)?\.(down|up)", lambda m: f".lora_{'AB'[m[2] == 'up']}", key).replace(
        "text_encoder.text_model.", "text_encoder."
    )


@pytest.mark.parametrize("spelling", [older, newer])
def test_files_of_other_releases(spelling: Callable[[str], str], tmp_path: Path, rng: np.random.Generator) -> None:
    own = {"unet": pairs(UNET, rng), "text_encoder": pairs(TEXT, rng)}
    tensors = load_file(save_lora(tmp_path, own))
    renamed = {spelling(key): array for key, array in tensors.items()}
    assert not renamed.keys() & tensors.keys()
    save_file(renamed, tmp_path / "other.safetensors")
    shapes = {"unet": UNET.shapes(), "text_encoder": TEXT.shapes()}
    jax.tree.map(np.testing.assert_array_equal, load_lora(tmp_path / "other.safetensors", shapes), own)


def test_pickles_are_read(tmp_path: Path, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    own, shapes = {"unet": pairs(UNET, rng)}, {"unet": UNET.shapes()}
    tensors = {key: torch.tensor(array) for key, array in load_file(save_lora(tmp_path / "new", own)).items()}
    torch.save(tensors, tmp_path / "pytorch_lora_weights.bin")
    for source in (tmp_path, tmp_path / "pytorch_lora_weights.bin"):
        jax.tree.map(np.testing.assert_array_equal, load_lora(source, shapes), own)


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"unet.lora_alpha": 6, "unet.r": 3}, 2.0),
        ({"unet.lora_alpha": 6, "unet.use_rslora": True}, 6 / math.sqrt(3)),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {r"attn\d.to_[a-z]+(.0)?": 9}}, 3.0),
        ({"lora_alpha": 6, "r": 3}, 2.0),
        ({"unet.unet.lora_alpha": 6}, 2.0),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / math.sqrt(3)),
        ({"alpha_pattern": {r"attn\d.to_[a-z]+(.0)?": 9}}, 3.0),
    ],
)
def test_the_scale_in_pefts_settings_counts(
    settings: dict, factor: float, tmp_path: Path, rng: np.random.Generator
) -> None:
    """The cases are peft's arithmetic: alpha / r, or alpha / sqrt(r), with an alpha of the layer where one matches."""
    own, shapes = {"unet": pairs(UNET, rng)}, {"unet": UNET.shapes()}
    tensors = load_file(save_lora(tmp_path, own))
    if not any(key.startswith("unet.") for key in settings):  # as unet.save_lora_adapter writes both
        tensors = {key.removeprefix("unet."): array for key, array in tensors.items()}
    save_file(tensors, tmp_path / "peft.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    scaled = lora.pairs_of(load_lora(tmp_path / "peft.safetensors", shapes)["unet"])
    for path, pair in lora.pairs_of(own["unet"]).items():
        np.testing.assert_allclose(scaled[path]["up"], factor * pair["up"], rtol=1e-6)
        np.testing.assert_array_equal(scaled[path]["down"], pair["down"])


@pytest.mark.parametrize("network", ["unet", "text_encoder"])
@pytest.mark.parametrize("spelling", [older, newer, str])
def test_a_pattern_matches_the_names_in_the_file(
    network: str, spelling: Callable[[str], str], tmp_path: Path, rng: np.random.Generator
) -> None:
    model = {"unet": UNET, "text_encoder": TEXT}[network]
    own, shapes = {network: pairs(model, rng)}, {network: model.shapes()}
    tensors = {spelling(key): array for key, array in load_file(save_lora(tmp_path, own)).items()}
    key = next(key for key in tensors if "to_out" in key or "out_proj" in key)
    layer = re.sub(r"(_lora|\.lora(_linear_layer)?)[._](down|up|A|B)\.weight$", "", key).removeprefix(f"{network}.")
    settings = {f"{network}.alpha_pattern": {re.escape(layer): 6}}
    save_file(tensors, tmp_path / "peft.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    scaled = lora.pairs_of(load_lora(tmp_path / "peft.safetensors", shapes)[network])
    factors = [float(scaled[p]["up"][0, 0] / pair["up"][0, 0]) for p, pair in lora.pairs_of(own[network]).items()]
    assert sorted(factors)[-1] == pytest.approx(2.0)
    assert sorted(factors)[:-1] == pytest.approx([1.0] * (len(factors) - 1))


def test_settings_that_match_nothing_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = load_file(save_lora(tmp_path, {"unet": pairs(UNET, rng)}))
    cases = [
        ({"text_encoder.lora_alpha": 6}, "'text_encoder.lora_alpha', but the file has no pairs for 'text_encoder'"),
        ({"transformer.lora_alpha": 6}, "'transformer.lora_alpha', but the file has no pairs for"),
        ({"unet.lora_alhpa": 6}, "'unet.lora_alhpa', which is no setting that is supported"),
        ({"": 6}, "'', which is no setting"),
        ({"unet.lora_alpha": 6, "lora_alpha": 3}, "'lora_alpha' of unet twice, with different prefixes"),
        ({"unet.alpha_pattern": {"to_nothing": 6}}, "alpha_pattern 'to_nothing' .* matches no layer of unet"),
    ]
    for settings, message in cases:
        save_file(tensors, tmp_path / "odd.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
        with pytest.raises(WeightsError, match=message):
            load_lora(tmp_path / "odd.safetensors", {"unet": UNET.shapes(), "text_encoder": TEXT.shapes()})


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(WeightsError, match=r"empty\.safetensors: holds no tensors of a LoRA"):
        load_lora(tmp_path / "empty.safetensors", {"unet": UNET.shapes()})


def test_settings_that_are_damaged_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = load_file(save_lora(tmp_path, {"unet": pairs(UNET, rng)}))
    for text, message in [
        ("{", "is not JSON"),
        ("[]", "are not an object"),
        ('{"unet.lora_alpha": "a"}', "not a number"),
    ]:
        save_file(tensors, tmp_path / "bad.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(WeightsError, match=message):
            load_lora(tmp_path / "bad.safetensors", {"unet": UNET.shapes()})


def test_what_does_not_fit_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    own, shapes = {"unet": pairs(UNET, rng)}, {"unet": UNET.shapes()}
    tensors = load_file(save_lora(tmp_path, own))
    key = next(k for k in tensors if k.endswith("down.weight"))
    cases = [
        ({k: v for k, v in tensors.items() if k != key}, "has no down half"),
        (tensors | {"unet.conv_in.lora.down.weight": tensors[key]}, "unet.conv_in: has no up half"),
        (tensors | {"unet.lora_conv": tensors[key]}, "1 keys belong to no layer of unet: 'unet.lora_conv'"),
        (tensors | {"lora_unet_mid_block.alpha": np.float32(1)}, "belong to no layer .* 'lora_unet_mid_block.alpha'"),
        (tensors | {key.replace(".lora.down", ".lora_A"): tensors[key]}, "are the same tensor"),
        (tensors | {key: tensors[key][:, :2]}, "do not fit"),
    ]
    for content, message in cases:
        save_file({k: np.ascontiguousarray(v) for k, v in content.items()}, tmp_path / "bad.safetensors")
        with pytest.raises(WeightsError, match=message):
            load_lora(tmp_path / "bad.safetensors", shapes)
    with pytest.raises(WeightsError, match="no such file"):
        load_lora(tmp_path / "nowhere", shapes)
    with pytest.raises(ValueError, match="made for another network"):
        lora.merge(initial_params(TEXT.shapes(), 0), own["unet"])
    with pytest.raises(ValueError, match="at least 1"):
        lora.init(UNET.shapes(), 0, jax.random.key(0))
    with pytest.raises(ValueError, match="no layer matches"):
        lora.init(UNET.shapes(), 1, jax.random.key(0), targets="nothing")


def test_text_encoders_take_pairs_too(rng: np.random.Generator) -> None:
    params, own, ids = initial_params(TEXT.shapes(), 0), pairs(TEXT, rng), jnp.arange(8)[None]
    assert isinstance(TEXT, CLIPTextModel)
    a = lora.Adapted(TEXT, own).apply({"params": params}, ids).last_hidden_state
    b = TEXT.apply({"params": lora.merge(params, own)}, ids).last_hidden_state
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('{"unet.lora_alpha": NaN}', "alpha is nan, not a number from"),
        ('{"unet.lora_alpha": 1e308}', "alpha is 1e[+]308, not a number from"),
        ('{"unet.lora_alpha": Infinity}', "alpha is inf, not a number from"),
        ('{"unet.lora_alpha": "8"}', "alpha is '8', not a number from"),
        ('{"unet.lora_alpha": true}', "alpha is True, not a number from"),
        ('{"unet.lora_alpha": 1, "unet.lora_alpha": 2}', "names 'unet.lora_alpha' twice"),
        ('{"unet.use_rslora": "false"}', "'unet.use_rslora', which must be true or false, got 'false'"),
        ('{"unet.alpha_pattern": [1]}', "alpha_pattern in its metadata is .1., not an object"),
        ('{"unet.alpha_pattern": {"[": 1}}', "the alpha_pattern '.' in its metadata is not supported"),
        ('{"unet.alpha_pattern": {"(((((((((((a+)+)+)+)+)+)+)+)+)+)+b": 1}}', "nested more than 8"),
        (json.dumps({"unet.alpha_pattern": {f"a*{i}": 1 for i in range(40)}}), "more than 5000 names or more than 32"),
        ('{"unet.lora_alpha": ' + "1" * 5000 + "}", "an integer of 5000 digits"),
        ("[" * 3000 + "]" * 3000, "nested more than 64"),
    ],
)
def test_settings_that_a_file_must_not_choose(
    settings: str, message: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = load_file(save_lora(tmp_path, {"unet": pairs(UNET, rng)}))
    save_file(tensors, tmp_path / "bad.safetensors", {"lora_adapter_metadata": settings})
    with bounded(20), pytest.raises(WeightsError, match=rf"bad\.safetensors: .*{message}"):
        load_lora(tmp_path / "bad.safetensors", {"unet": UNET.shapes()})


@pytest.mark.parametrize("half", ["down", "up"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_the_name_of_their_tensor(
    half: str, value: float, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = load_file(save_lora(tmp_path, {"unet": pairs(UNET, rng)}))
    key = next(k for k in tensors if f".{half}." in k)
    tensors[key].flat[-1] = value
    save_file({name: x.astype(np.float16) for name, x in tensors.items()}, tmp_path / "bad.safetensors")
    stem = key.partition(".lora")[0]
    with pytest.raises(WeightsError, match=rf"bad\.safetensors: '{half} of {stem}' holds NaN or infinity"):
        load_lora(tmp_path / "bad.safetensors", {"unet": UNET.shapes()})


def test_a_rank_that_no_layer_can_have_is_refused() -> None:
    kernels = {path: lora.highest_rank(shape) for path, shape in lora.adaptable(UNET.shapes()).items()}
    highest = max(kernels.values())
    pairs = lora.pairs_of(lora.init(UNET.shapes(), highest, jax.random.key(0), "."))
    assert pairs.keys() == kernels.keys()
    with pytest.raises(ValueError, match=f"rank must be at most {highest} here, got {highest + 1}: "):
        lora.init(UNET.shapes(), highest + 1, jax.random.key(0), ".")
    single = {"depthwise": {"kernel": jax.ShapeDtypeStruct((3, 3, 1, 40), jnp.float32)}}
    assert not lora.adaptable(single), "each channel by itself"
    window = {"conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 4, 40), jnp.float32)}}
    with pytest.raises(ValueError, match="rank must be at most 36 here, got 37: .* conv, is 3 x 3 x 4 x 40"):
        lora.init(window, 37, jax.random.key(0), ".")


def test_a_pair_is_judged_by_its_shape_before_it_is_converted(tmp_path: Path) -> None:
    path, pair = next((path, shape) for path, shape in lora.adaptable(UNET.shapes()).items() if len(shape) == 2)
    stem = "unet." + torch_key((*path, "kernel")).removesuffix(".weight")
    for rank, columns in ((0, pair[0]), (1 << 22, 1)):
        down = np.zeros((rank, columns), np.int8)
        tensors = {f"{stem}.lora.down.weight": down, f"{stem}.lora.up.weight": np.zeros((pair[1], 1), np.int8)}
        save_file(tensors, tmp_path / "rank.safetensors")
        with bounded(10), pytest.raises(WeightsError, match=rf"rank\.safetensors: .*down \({rank}, {columns}\)"):
            load_lora(tmp_path / "rank.safetensors", {"unet": UNET.shapes()})
