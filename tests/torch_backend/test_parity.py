"""``diffuse-jax parity`` passes a good checkpoint, and finds and names what is wrong with a bad one.

Faults are planted in copies that PyTorch reads, so that our side is compiled once for all of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffuse_jax import cli
from diffuse_jax.convert import convert
from diffuse_jax.schedulers import EulerAncestralDiscreteScheduler
from tests.pipelines import tiny
from tests.torch_backend import faults

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")

from diffuse_jax.torch_backend import comparison_image, parity  # noqa: E402
from diffuse_jax.torch_backend.networks import choose_device, open_network  # noqa: E402
from diffuse_jax.torch_backend.pipeline import wrap_module  # noqa: E402
from diffuse_jax.torch_backend.tolerances import TOLERANCES  # noqa: E402

EMOJI = faults.SHIPPED
SMALL = {"num_inference_steps": 2, "height": 32, "width": 32, "seed": 0, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def sides() -> parity.Sides:
    return parity.open_sides(str(EMOJI), device="cpu")


def request(*components: str) -> parity.Request:
    return parity.Request(["a red apple, noto style"], SMALL, components, bisect=True)


def faulty(sides: parity.Sides, folder: Path, component: str, edit: faults.Edit) -> parity.Sides:
    """The two sides with a fault in one of PyTorch's networks."""
    bad = faults.copied(EMOJI / component, folder / component, "", edit)
    kind = type(sides.ours.components[component])
    module = open_network(kind, bad, "float32", choose_device("cpu"))
    twin = wrap_module(kind.from_config(bad), module)
    return sides._replace(theirs=sides.theirs.replace(**{component: (twin, {})}))


def test_the_shipped_model_is_the_same(sides: parity.Sides) -> None:
    result = parity.check(sides, request())
    assert result.ok, (result.rows, result.differences)
    assert not result.first
    names = [row.name for row in result.rows]
    assert names[0] == "text_encoder last hidden state"
    assert {"unet timestep 999", "vae decode", "vae encode mean", "latents at the start", "pixels"} <= {*names}
    assert "latents after step 2" in names
    assert max(row.relative_error for row in result.rows) < 1e-5, "far below the tolerance, or it means nothing"


def test_images_that_are_only_compared_need_no_safety_checker(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    folder = shutil.copytree(EMOJI, tmp_path / "checked")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | checker))
    assert parity.open_sides(str(folder), device="cpu").theirs.components["safety_checker"] is None
    assert not [str(w.message) for w in recwarn if "safety_checker" in str(w.message)]


@pytest.mark.slow
def test_a_small_sdxl_is_the_same_with_a_sampler_that_draws_noise(tmp_path: Path) -> None:
    folder = folders.stable_diffusion_xl(tmp_path / "sdxl")
    sides = parity.open_sides(str(folder), device="cpu", scheduler=EulerAncestralDiscreteScheduler)
    result = parity.check(sides, parity.Request(["a cat", "x"], {"num_inference_steps": 3, "seed": 0}))
    assert result.ok, (result.rows, result.differences)
    assert {"text_encoder_2 text embeds", "latents after step 3"} <= {row.name for row in result.rows}


LAST_TEXT_LAYER = "text_model.encoder.layers.1"
PERMUTED = [
    ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
    ("vae", "decoder.mid_block.attentions.0.to_k"),
    ("text_encoder", f"{LAST_TEXT_LAYER}.self_attn.v_proj"),
]


@pytest.mark.parametrize(("component", "layer"), PERMUTED)
def test_a_permuted_tensor_is_found_and_its_layer_named(
    sides: parity.Sides, component: str, layer: str, tmp_path: Path
) -> None:
    bad = faulty(sides, tmp_path, component, faults.permuted(f"{layer}.weight"))
    result = parity.check(bad, request(component))
    (difference,) = result.differences
    assert difference[:3] == (component, "parameter", f"{layer}.weight")
    assert difference.detail.startswith("the same values in another order")
    (first,) = result.first
    assert (first["component"], first["layer"], first["input_agrees"]) == (component, layer, True)
    assert not all(row.ok for row in result.rows)


BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
WRONG: list[tuple[str, dict[str, Any], str, bool, str | None]] = [
    # component, the wrong value, the first layer that parts, whether its input agrees, the layer around the fault
    ("unet", {"norm_num_groups": 4}, "down_blocks.0.resnets.0.norm1", True, None),
    ("unet", {"flip_sin_to_cos": False}, "time_embedding.linear_1", False, None),
    ("unet", {"attention_head_dim": [2, 2, 6]}, f"{BLOCK}.attn1.to_out.0", False, f"{BLOCK}.attn1"),
    ("vae", {"norm_num_groups": 4}, "decoder.mid_block.resnets.0.norm1", True, None),
    ("text_encoder", {"num_attention_heads": 2}, "text_model.encoder.layers.0.self_attn.out_proj", False, "self_attn"),
    ("text_encoder", {"eos_token_id": 5, "layer_norm_eps": 0.1}, "text_model.encoder.layers.0.layer_norm1", True, None),
]
OTHER_ACTIVATIONS: list[tuple[str, dict[str, Any], str, bool, str | None]] = [
    ("unet", {"act_fn": "mish"}, "time_embedding.linear_2", False, "time_embedding"),
    ("text_encoder", {"hidden_act": "gelu"}, "text_model.encoder.layers.0.mlp.fc2", False, "mlp"),
]


@pytest.mark.parametrize(
    ("component", "values", "layer", "agrees", "inside"),
    [*WRONG, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHER_ACTIVATIONS)],
    ids=str,
)
def test_a_wrong_setting_is_found_and_the_layer_named(
    sides: parity.Sides,
    component: str,
    values: dict[str, Any],
    layer: str,
    agrees: bool,
    inside: str | None,
    tmp_path: Path,
) -> None:
    result = parity.check(faulty(sides, tmp_path, component, faults.configured(**values)), request(component))
    assert {(d.component, d.what, d.name) for d in result.differences} == {(component, "config", k) for k in values}
    (first,) = result.first
    assert (first["layer"], first["input_agrees"]) == (layer, agrees)
    assert (first["inside"] or "").endswith(inside or "")
    assert layer in first["message"]


def test_a_wrong_scale_of_latents_shows_in_the_pixels(sides: parity.Sides, tmp_path: Path) -> None:
    """It is applied between the networks, so no layer is to blame."""
    result = parity.check(faulty(sides, tmp_path, "vae", faults.configured(scaling_factor=0.18215)), request())
    assert [(d.component, d.what, d.name) for d in result.differences] == [("vae", "config", "scaling_factor")]
    assert [row.name for row in result.rows if not row.ok] == ["pixels"]
    assert not result.first


# The ordinary suite has the run from an image in the test of several control images below.
FROM_IMAGES = ("StableDiffusionControlNetImg2ImgPipeline", "StableDiffusionInpaintPipeline")


@pytest.mark.parametrize("name", ["", *(pytest.param(name, marks=pytest.mark.slow) for name in FROM_IMAGES)])
def test_every_pipeline_is_compared_without_code_for_its_task(name: str, tmp_path: Path) -> None:
    folder = folders.controlled(tmp_path / "sd", nets=2)
    options = {"num_inference_steps": 2, "seed": 0} | ({"strength": 0.9} if name else {})
    sides = parity.open_sides(str(folder), device="cpu", pipeline_name=name or None)
    result = parity.check(sides, parity.Request(["a cat"], options))
    assert result.ok, (name, result.rows, result.differences)
    rows = {row.name for row in result.rows}
    assert name == "StableDiffusionInpaintPipeline" or {"controlnet.0 embed", "controlnet.1 embed"} <= rows


def test_a_fault_in_one_of_a_list_of_networks_is_found_there(tmp_path: Path) -> None:
    folder = folders.controlled(tmp_path / "sd", nets=2)
    broken = faults.copied(
        folder, tmp_path / "bad", "controlnet_1", faults.permuted("mid_block.resnets.0.conv1.weight")
    )
    result = parity.check(
        parity.open_sides(str(folder), str(broken), device="cpu"),
        parity.Request(["a cat"], {"seed": 0}, ("controlnet.1",), bisect=True),
    )
    assert {d.component for d in result.differences} == {"controlnet.1"}
    assert [first["layer"] for first in result.first] == ["mid_block.resnets.0.conv1"]


@pytest.mark.slow
def test_several_control_images_are_read_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In half precision too, where a run from an image starts as far apart as its encoders are."""
    folder = folders.controlled(tmp_path / "sd", nets=2)
    files = [tmp_path / f"{shade}.png" for shade in (40, 90, 200)]
    for file in files:
        Image.new("RGB", (32, 32), (int(file.stem), 120, 60)).save(file)
    words = ["parity", str(folder), "--device", "cpu", "--pipeline", "StableDiffusionControlNetImg2ImgPipeline"]
    words += ["--image", str(files[0]), "--control-image", str(files[1]), "--control-image", str(files[2])]
    words += ["--num-inference-steps", "2", "--dtype", "bfloat16", "--prompt", "a cat", "--report", str(tmp_path)]
    code, found = cli.main(words), json.loads((tmp_path / "parity.json").read_text())
    start = next(row for row in found["rows"] if row["name"] == "latents at the start")
    assert 1e-6 < start["relative_error"] < start["tolerance"] == TOLERANCES["bfloat16"].network
    assert found["options"]["control_image"] == [str(file) for file in files[1:]]
    assert code == 0, capsys.readouterr().out
    assert cli.main([*words[:-2], "--control-image", str(files[0])]) == 1
    assert "there are 2 ControlNets and 3 control images" in capsys.readouterr().err


def test_pipelines_without_text_and_with_two_encoders_are_compared_too(tmp_path: Path) -> None:
    twins = pytest.importorskip("tests.oracle.twins")
    unet = twins.randomise(twins.diffusers.UNet2DModel(**twins.PIXELS))
    twins.diffusers.DDPMPipeline(unet=unet, scheduler=twins.diffusers.DDPMScheduler()).save_pretrained(
        tmp_path / "ddpm"
    )
    folders.stable_diffusion_xl(tmp_path / "xl")
    for folder, name in (("ddpm", None), ("xl", "StableDiffusionXLImg2ImgPipeline")):
        sides = parity.open_sides(str(tmp_path / folder), device="cpu", pipeline_name=name)
        result = parity.check(sides, parity.Request(["a", "b"], {"num_inference_steps": 4, "seed": 0}))
        assert result.ok, (name, result.rows, result.differences)


def test_a_wrong_scheduler_shows_in_the_latents_alone(sides: parity.Sides) -> None:
    wrong = sides.theirs.scheduler.replace(prediction_type="epsilon", rescale_betas_zero_snr=False)
    result = parity.check(sides._replace(theirs=sides.theirs.replace(scheduler=wrong)), request())
    assert [str(d) for d in result.differences if d.name == "prediction_type"] == [
        "scheduler config prediction_type: 'v_prediction' here, 'epsilon' in PyTorch"
    ]
    outside = [row.name for row in result.rows if not row.ok]
    assert outside == ["latents after step 1", "latents after step 2", "pixels"]
    assert not result.first


def test_a_different_tokenizer_is_named(sides: parity.Sides) -> None:
    class Shouting:
        """A tokenizer that writes every prompt in capitals."""

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, prompts: list[str], **options: Any) -> Any:
            return self.inner([f"{prompt} {prompt}" for prompt in prompts], **options)

    shouting = Shouting(sides.theirs.components["tokenizer"])
    result = parity.check(sides._replace(theirs=sides.theirs.replace(tokenizer=shouting)), request())
    (difference,) = result.differences
    assert difference[:2] == ("text_encoder", "tokens")
    assert difference.name.startswith("prompt 1, position ")


def test_the_command_passes_the_shipped_model_and_writes_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["parity", "diffuse-jax/emoji", "--device", "cpu", "--num-inference-steps", "2", "--height", "32"]
    words += ["--width", "32", "--guidance-scale", "5", "--prompt", "a red apple, noto style"]
    assert cli.main([*words, "--report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "the same: " in out
    assert "DIFFERENT" not in out
    data = json.loads((tmp_path / "parity.json").read_text())
    assert data["same"] is data["ok"] is True
    assert (data["device"], data["dtype"]) == ("cpu", "float32")
    assert all(row["tolerance"] >= row["relative_error"] for row in data["rows"])
    with Image.open(tmp_path / "parity.png") as sheet:
        assert sheet.width == 3 * comparison_image.SMALLEST + 2 * comparison_image.GAP


def test_the_command_compares_a_run_on_a_mesh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Networks and the whole run, with images and parameters divided over devices."""
    folder = str(tiny.pipeline().save_pretrained(tmp_path / "model"))
    words = ["parity", folder, "--device", "cpu", "--num-inference-steps", "2"]
    assert cli.main([*words, "--mesh", "data=2,fsdp=4", "--report", str(tmp_path)]) == 0
    assert "the same: " in capsys.readouterr().out
    assert json.loads((tmp_path / "parity.json").read_text())["mesh"] == "data=2,fsdp=4"
    assert cli.main([*words, "--mesh", "data=64"]) == 1
    assert "64" in capsys.readouterr().err


def test_the_command_finds_a_fault_in_the_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
    bad = faults.copied(EMOJI, tmp_path / "bad", "unet", faults.permuted(f"{layer}.weight"))
    words = ["parity", "diffuse-jax/emoji", "--reference", bad, "--device", "cpu", "--num-inference-steps", "2"]
    words += ["--height", "32", "--width", "32", "--prompt", "a red apple, noto style", "--bisect", "--guidance-scale"]
    assert cli.main([*map(str, words), "5", "--report", str(tmp_path / "report")]) == 1
    out, err = capsys.readouterr()
    assert f"differs: unet parameter {layer}.weight: the same values in another order" in out
    assert f"first diverges in unet timestep 999: {layer}: relative error" in out
    assert "not the same: " in err
    data = json.loads((tmp_path / "report" / "parity.json").read_text())
    assert data["same"] is False
    assert data["first_layers"][0]["layer"] == layer


def test_the_reference_may_have_files_of_a_variant_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = shutil.copytree(EMOJI, tmp_path / "original")
    for file in original.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    words = ["parity", "diffuse-jax/emoji", "--reference", str(original), "--device", "cpu", "--component", "vae"]
    words += ["--num-inference-steps", "1", "--height", "32", "--width", "32"]
    assert cli.main([*words, "--reference-variant", "fp16"]) == 0
    assert cli.main(words) == 1
    assert "original/text_encoder: PyTorch can" in capsys.readouterr().err
    assert cli.main(["parity", "diffuse-jax/emoji", "--reference-variant", "fp16"]) == 1
    assert "there is no --reference; for MODEL use --variant" in capsys.readouterr().err


def test_networks_of_other_shapes_are_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = folders.stable_diffusion(tmp_path / "other")
    command = ["parity", "diffuse-jax/emoji", "--reference", str(other), "--device", "cpu", "--report", str(tmp_path)]
    assert cli.main(command) == 1
    out, err = capsys.readouterr()
    assert "differs: unet config block_out_channels: [48, 96, 144] here, [32, 64] in PyTorch" in out
    assert "differs: unet shape " in out
    found = json.loads((tmp_path / "parity.json").read_text())["differences"]
    (conv_in,) = [x["detail"] for x in found if (x["component"], x["name"]) == ("unet", "conv_in.weight")]
    assert conv_in == "[48, 4, 3, 3] here, [32, 4, 3, 3] in PyTorch"
    assert "networks of different shapes were not run" in err


def test_a_network_that_one_side_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sd, xl = folders.stable_diffusion(tmp_path / "sd"), folders.stable_diffusion_xl(tmp_path / "xl")
    for words, side in ([(sd, xl), "only in PyTorch"], [(xl, sd), "only here"]):
        for more in ([], ["--training"]):
            command = ["parity", str(words[0]), "--reference", str(words[1]), "--device", "cpu", *more]
            assert cli.main(command) == 1
            assert f"differs: text_encoder_2 shape of the network: {side}" in capsys.readouterr().out


def test_a_cast_conversion_is_reported_in_a_few_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cast = convert(folders.stable_diffusion(tmp_path / "sd"), tmp_path / "cast", dtype="float16")
    command = ["parity", str(cast), "--reference", str(tmp_path / "sd"), "--device", "cpu", "--component", "vae"]
    assert cli.main([*command, "--num-inference-steps", "1", "--report", str(tmp_path / "report")]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("differs: ")]
    differences = json.loads((tmp_path / "report" / "parity.json").read_text())["differences"]
    assert len(lines) == 11
    assert lines[-1] == f"differs: vae parameter, {len(differences) - 10} more, listed in the --report"


def test_weights_that_do_not_fit_their_configuration_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = faults.copied(EMOJI, tmp_path / "bad", "unet", faults.configured(cross_attention_dim=64))
    assert cli.main(["parity", str(bad), "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert "attn2.to_k.weight" in err
    assert str(bad / "unet") in err


@pytest.mark.parametrize("words", [(), ("m", "--component"), ("m", "--dtype", "int8"), ("m", "--device", "tpu")])
def test_wrong_usage_is_status_2(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["parity", *words])
    assert stop.value.code == 2


def test_an_unknown_network_is_refused_before_anything_runs(sides: parity.Sides) -> None:
    with pytest.raises(ValueError, match="has no network text_encoder_2; it has text_encoder, unet, vae"):
        parity.check(sides, request("text_encoder_2"))


def test_tolerances_grow_with_the_rounding_of_the_dtype() -> None:
    for kind in ("network", "latents", "pixels"):
        values = [getattr(TOLERANCES[dtype], kind) for dtype in ("float32", "float16", "bfloat16")]
        assert values == sorted(values)
        assert len(set(values)) == 3


def test_the_factor_of_the_difference_is_stated() -> None:
    zeros = np.zeros((1, 4, 4, 3))
    assert comparison_image.amplification(zeros, zeros) == 1
    assert comparison_image.amplification(zeros, zeros + 0.03) == 20
    assert comparison_image.amplification(zeros, zeros + 3e-7) == 10**6
    sheet = np.asarray(comparison_image.side_by_side(zeros, zeros + 0.03))
    assert sheet[comparison_image.HEADER + 1, -1].tolist() == [153] * 3  # 0.03 times 20 of 255
