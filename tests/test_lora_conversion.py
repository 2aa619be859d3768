"""LoRA files written in every layout, extracted from checkpoints, and checkpoints merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffuse_jax import DiffusionPipeline, weights_commands
from diffuse_jax.adapters import lora_writer
from diffuse_jax.adapters.lora_file import read_adapter
from diffuse_jax.cli import main
from diffuse_jax.lora_conversion import convert_lora, extract_lora
from diffuse_jax.merging import merge
from diffuse_jax.weights import WeightsError
from tests.adapters.test_layouts import KERNELS, PIPE, SHAPES, differences, lora, same, write


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return PIPE.save_pretrained(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("to", ["diffusers", "peft", "kohya"])
def test_every_layout_round_trips(to: str, dora: bool, model: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    factors = lora(rng)
    for n, ((network, name), parts) in enumerate(factors.items()):
        if n % 2:
            parts["alpha"] = np.float32(n)
        if dora and network == "unet":
            out, _, *window = KERNELS[network, name][1]
            parts["dora_scale"] = 1 + rng.random((out, 1, *[1] * len(window))).astype(np.float32)
    file = write(tmp_path, factors, "kohya")
    if dora and to == "diffusers":
        with pytest.raises(WeightsError, match="is a DoRA, which this layout cannot hold"):
            convert_lora(file, tmp_path / "b.safetensors", to, model=model)
        assert not (tmp_path / "b.safetensors").exists()
        return
    other = convert_lora(file, tmp_path / "b.safetensors", to, model=model)
    same(differences(other), differences(file))
    ends = {"diffusers": ".lora.down.weight", "peft": ".lora_A.weight", "kohya": ".lora_down.weight"}
    assert any(key.endswith(ends[to]) for key in load_file(other))
    again = convert_lora(other, tmp_path / "c.safetensors", "kohya", model=model)
    same(differences(again), differences(file))


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_products_of_other_kinds_are_kohyas_alone(
    to: str, model: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    out, inner = KERNELS[layer := ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")][1]
    parts = {"lokr_w1": normal(2, 2), "lokr_w2_a": normal(out // 2, 3), "lokr_w2_b": normal(3, inner // 2)}
    file = write(tmp_path, {layer: parts | {"alpha": np.float32(6)}}, "kohya")
    if to == "kohya":
        same(differences(convert_lora(file, tmp_path / "b.safetensors", to, model=model)), differences(file))
    else:
        with pytest.raises(WeightsError, match="is a LoKr, which only the layout of kohya's scripts can hold"):
            convert_lora(file, tmp_path / "b.safetensors", to, model=model)


def test_published_architectures_need_no_model(tmp_path: Path) -> None:
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    shapes = {"lora_down.weight": (2, 2048), "lora_up.weight": (640, 2), "alpha": ()}
    save_file({f"{key}.{end}": np.ones(shape, np.float16) for end, shape in shapes.items()}, tmp_path / "a.safetensors")
    tensors = load_file(convert_lora(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "peft"))
    stem = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    assert {k: v.dtype for k, v in tensors.items()} == dict.fromkeys(
        (f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"), np.float16
    )
    np.testing.assert_array_equal(tensors[f"{stem}.lora_B.weight"], 0.5)
    save_file({"lora_unet_x.lora_down.weight": np.ones((1, 1), np.float32)}, tmp_path / "odd.safetensors")
    with pytest.raises(WeightsError, match=r"is for an unknown architecture.*--model"):
        convert_lora(tmp_path / "odd.safetensors", tmp_path / "c.safetensors")


def test_a_live_adapter_is_saved(tmp_path: Path, rng: np.random.Generator) -> None:
    live = PIPE.load_lora_weights(write(tmp_path, lora(rng), "kohya"), adapter_name="a")
    same(differences(live.save_lora_weights(tmp_path / "saved", to="peft")), differences(tmp_path / "a.safetensors"))
    with pytest.raises(ValueError, match="must say which live adapter to save; there is none"):
        PIPE.save_lora_weights(tmp_path)


def test_a_lora_is_extracted_from_two_checkpoints(model: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """Differences of rank 3 are found exactly by rank 3 or by all of their energy, and in part by less."""
    tuned = PIPE.load_lora_weights(file := write(tmp_path, lora(rng, lambda n: 3), "kohya"))
    folder = tuned.save_pretrained(tmp_path / "tuned")
    whole: list[dict[str, Any]] = [{"rank": 3}, {"energy": 0.999999}]
    for options in whole:
        found = differences(extract_lora(model, folder, tmp_path / f"{min(options)}.safetensors", **options))
        for layer, expected in differences(file).items():
            np.testing.assert_allclose(found[layer], expected, atol=2e-3 * np.abs(expected).max())
    less = read_adapter(extract_lora(model, folder, tmp_path / "less.safetensors", energy=0.5, to="kohya"), SHAPES)
    assert {change.rank for changes in less.values() for change in changes.values()} <= {1, 2}
    with pytest.raises(WeightsError, match="there is nothing to extract"):
        extract_lora(model, model, tmp_path / "none.safetensors", rank=1)
    lone = PIPE.components["unet"].save_single_file(tmp_path / "unet.safetensors", PIPE.params["unet"])
    with pytest.raises(WeightsError, match="have no network in common that a LoRA can change; give whole pipelines"):
        extract_lora(model, lone, tmp_path / "none.safetensors", rank=1)
    for wrong, message in (({}, "give rank="), ({"rank": 0}, "at least 1"), ({"energy": 1.5}, "at most 1")):
        with pytest.raises(ValueError, match=message):
            extract_lora(model, folder, tmp_path / "x.safetensors", **wrong)  # type: ignore[arg-type]
    with pytest.raises(FileExistsError):
        extract_lora(model, folder, tmp_path / "less.safetensors", rank=1)


def times(factor: float) -> Any:
    """The pipeline with the UNet's parameters multiplied."""
    return PIPE.replace(unet=(PIPE.components["unet"], jax.tree.map(lambda x: factor * x, PIPE.params["unet"])))


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a-file").touch()
    with pytest.raises(NotADirectoryError, match="a-file cannot be a folder"):
        extract_lora("no-such-model", "nor-this", tmp_path / "a-file" / "x.safetensors", rank=1)


def test_checkpoints_are_merged(model: Path, tmp_path: Path) -> None:
    two, four = (times(n).save_pretrained(tmp_path / str(n)) for n in (2.0, 4.0))
    cases = [
        ([model, two], {"weights": [0.25, 0.75]}, 1.75),
        ([model, two], {}, 1.5),
        ([model, two, four], {"weights": [0.5, 0.25, 0.25]}, 2.0),
        ([model, four, two], {"method": "add-difference", "weights": [0.5]}, 2.0),
    ]
    for n, (sources, options, factor) in enumerate(cases):
        merged = DiffusionPipeline.from_pretrained(merge(sources, tmp_path / f"m{n}", **options))  # type: ignore[arg-type]
        for network, expected in (("unet", factor), ("vae", 1.0)):
            close = lambda x, y, f=expected: np.testing.assert_allclose(x, f * y, rtol=1e-5, atol=1e-6)
            jax.tree.map(close, merged.params[network], PIPE.params[network])


def test_merges_that_make_no_sense_are_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases = [
        (lambda: merge([model], out), "at least two"),
        (lambda: merge([model, model], out, weights=[1.0]), "2 checkpoints have 1 weights"),
        (lambda: merge([model, model], out, weights=[0.7, 0.7]), "sum of 1"),
        (lambda: merge([model, model], out, weights=[float("nan"), 1.0]), "finite"),
        (lambda: merge([model, model], out, method="add-difference"), "takes three checkpoints and one weight"),
        (lambda: merge([model, model], out, method="slerp"), "one of weighted, add-difference"),
        (lambda: merge([model, model / "unet"], out), "has no "),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert not out.exists()


def test_commands_offer_every_layout() -> None:
    assert (*lora_writer.LAYOUTS,) == weights_commands.LAYOUTS


def test_the_commands(
    model: Path, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, lora(rng), "kohya")
    tuned = PIPE.load_lora_weights(file).save_pretrained(tmp_path / "tuned")
    runs = [
        ["convert-lora", file, tmp_path / "b.safetensors", "--to", "peft", "--model", model],
        ["extract-lora", model, tuned, tmp_path / "c.safetensors", "--energy", "0.9", "--dtype", "float16"],
        ["merge", model, tuned, "--weights", "0.5", "0.5", "--output", tmp_path / "merged"],
    ]
    for run in runs:
        assert main([str(word) for word in run]) == 0
    written = [Path(line) for line in capsys.readouterr().out.split()]
    assert all(path.exists() for path in written)
    assert len(written) == 3
    assert main(["merge", str(model), "--output", str(tmp_path / "one")]) != 0
    assert "at least two" in capsys.readouterr().err
