"""``diffuse-jax parity --training`` passes good checkpoints, and says what is wrong where something is.

Faults are planted on PyTorch's side, so that our step is compiled once for all of them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from diffuse_jax import cli
from diffuse_jax.torch_backend import training
from diffuse_jax.torch_backend.training_report import TOLERANCES, Compared, compare_updates, shown, verdict
from diffuse_jax.training.objective import Objective
from tests.torch_backend import faults
from tests.train.latent_models import SIZE, save_sd, save_sdxl

parity = pytest.importorskip("diffuse_jax.torch_backend.training_parity", reason="needs PyTorch and diffusers")

from diffuse_jax.torch_backend import training_torch as twin  # noqa: E402

SMALL = ["--resolution", "32", "--batch-size", "3", "--device", "cpu"]
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd(tmp_path_factory.mktemp("sd"), fresh=False)


class Ours(NamedTuple):
    """Our step of the UNet of a small Stable Diffusion, done once."""

    folder: Path
    objective: Objective
    batch: dict[str, np.ndarray]
    update: training.Update

    def against(self, edit: Callable[[Any], object] = lambda theirs: None, **changes: Any) -> Compared:
        """The comparison with PyTorch's step, after ``edit`` of its pipeline and with another objective."""
        theirs = twin.open_reference(self.folder, trainable=(), device="cpu")
        edit(theirs)
        objective = dataclasses.replace(self.objective, **changes)
        make = lambda: twin.text_to_image_loss(theirs, objective, self.batch, seed=3)
        update = twin.torch_step(twin.full_parameters(theirs, ["unet"]), make)
        return compare_updates(self.update, update, TOLERANCES["float32"])


@pytest.fixture(scope="module")
def ours(sd: Path) -> Ours:
    request = parity.TrainingRequest(seed=3, batch_size=3)
    pipe = parity.open_for(sd, request)
    objective = Objective(scheduler=pipe.scheduler, snr_gamma=5.0)
    batch = training.batch_of(pipe, parity.examples_for(pipe, request))
    return Ours(sd, objective, batch, training.our_step(pipe, training.full(pipe, ["unet"]), objective, batch, seed=3))


def first_different(compared: Compared) -> str:
    return next(row.name for row in compared.rows if not row.ok)


def test_a_correct_training_step_is_the_same(ours: Ours) -> None:
    compared = ours.against()
    assert compared.ok, verdict(compared)
    assert [row.name for row in compared.values] == ["prompt embeddings", "noised latents", "prediction", "mse", "loss"]
    assert compared.gradients[0].name == "gradient unet.conv_out.weight", "the order is that of the backward pass"
    assert max(row.relative_error for row in compared.gradients) < 1e-5, "far below the tolerance, or it means nothing"
    assert verdict(compared).startswith("the same: ")


def settings(**values: Any) -> Callable[[Any], object]:
    """Another setting of PyTorch's noise schedule."""
    return lambda theirs: theirs.scheduler.register_to_config(**values)


WRONG: list[tuple[str, Callable[[Any], object], dict[str, Any], str, str]] = [
    ("target", settings(prediction_type="epsilon"), {}, "mse", "prediction_type"),
    ("noise schedule", settings(beta_end=0.012), {}, "noised latents", "betas"),
    ("weights of the loss", lambda theirs: None, {"snr_gamma": None}, "loss", "snr_gamma"),
]


@pytest.mark.parametrize(("edit", "changes", "first", "says"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_the_first_difference_points_to_a_wrong_setting(
    ours: Ours, edit: Callable[[Any], object], changes: dict[str, Any], first: str, says: str
) -> None:
    compared = ours.against(edit, **changes)
    assert first_different(compared) == first
    assert says in verdict(compared)


def test_a_fault_in_a_forward_pass_points_to_the_network(ours: Ours) -> None:
    compared = ours.against(lambda theirs: theirs.unet.get_submodule(f"{BLOCK}.attn1.to_q").weight.data.mul_(1.01))
    assert first_different(compared) == "prediction"
    assert "--component unet --bisect" in verdict(compared)


def test_a_fault_in_a_backward_pass_is_named_where_it_begins(ours: Ours) -> None:
    """Values agree; gradients of the layers that the backward pass reaches before the fault do too."""
    wrong = lambda module, into, out: (1.1 * into[0],)
    conv = "up_blocks.0.resnets.1.conv2"
    compared = ours.against(lambda theirs: theirs.unet.get_submodule(conv).register_full_backward_hook(wrong))
    assert first_different(compared) == "gradient unet.up_blocks.0.resnets.1.norm2.weight"
    passed = {row.name for row in compared.gradients if row.ok}
    assert {f"gradient unet.{conv}.weight", "gradient unet.conv_norm_out.bias"} <= passed
    assert all(row.ok for row in compared.values)
    assert "backward pass" in verdict(compared)
    table = [row.name for row in shown(compared)]
    assert "gradient unet.up_blocks.0.resnets.1.norm2.weight" in table
    assert len(table) < 25 < len(compared.rows)


def test_a_different_update_is_not_a_gradient_error(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "LEARNING_RATE", 1.2e-3)
    compared = ours.against()
    assert first_different(compared).startswith("change unet.")
    assert "AdamW" in verdict(compared)


# The ordinary suite runs the command with LoRA, and compares full training steps of smaller models in this file.
@pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_the_command_passes_the_shipped_model(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    words = ["parity", "diffuse-jax/emoji", "--training", "--method", method, "--snr-gamma", "5", *SMALL]
    assert cli.main([*words, "--report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "the same: " in out
    assert "DIFFERENT" not in out
    data = json.loads((tmp_path / "training.json").read_text())
    assert data["same"] is data["ok"] is True
    assert (data["method"], data["snr_gamma"], data["batch_size"]) == (method, 5, 3)
    last = {"full": "conv_out.weight", "lora": "to_out.0.lora_B.weight"}[method]
    gradients = [row["name"] for row in data["rows"] if row["name"].startswith("gradient unet.")]
    assert gradients[0].endswith(last), "the backward pass begins at the end of the network"


@pytest.mark.slow
def test_a_small_sdxl_with_its_text_encoders_is_the_same(tmp_path: Path) -> None:
    folder = save_sdxl(tmp_path / "sdxl", fresh=False)
    compared = parity.compare_training(folder, parity.TrainingRequest(train_text_encoder=True), device="cpu")
    assert compared.ok, verdict(compared)
    assert any(row.name.startswith("gradient text_encoder_2.") for row in compared.gradients)
    unused = [row for row in compared.gradients if row.max_error == 0 and "layers.1.mlp" in row.name]
    assert unused, "the last layer of an encoder, whose states are not used, has no gradient on either side"


# With LoRA there are fewer parameters to compute in another precision than the rest.
@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_half_precision_has_its_own_tolerance(method: str, sd: Path) -> None:
    """Trained parameters are float32, frozen ones bfloat16, the autoencoder float32 as its configuration asks."""
    if method == "lora":
        pytest.importorskip("peft")
    request = parity.TrainingRequest(dtype="bfloat16", method=method, train_text_encoder=True)
    compared = parity.compare_training(sd, request, device="cpu")
    assert compared.ok, verdict(compared)
    rows = {row.name: row.relative_error for row in compared.values}
    assert 1e-3 < rows["prediction"] < 0.05, "it was computed in bfloat16"
    assert rows["noised latents"] < 1e-6, "and this in float32"


def test_the_command_names_a_permuted_tensor(sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = f"{BLOCK}.attn1.to_q.weight"
    bad = faults.copied(sd, tmp_path / "bad", "unet", faults.permuted(layer))
    assert cli.main(["parity", str(sd), "--training", "--reference", str(bad), "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert f"differs: unet parameter {layer}: the same values in another order" in out
    assert f"unet parameter {layer}" in err
    assert "DIFFERENT" in out


def test_a_wrong_configuration_is_named_before_the_step(sd: Path, tmp_path: Path) -> None:
    bad = faults.copied(sd, tmp_path / "bad", "scheduler", faults.configured(prediction_type="epsilon"))
    compared = parity.compare_training(sd, reference=bad, device="cpu")
    assert [str(found) for found in compared.differences] == [
        "scheduler config prediction_type: 'v_prediction' here, 'epsilon' in PyTorch"
    ]
    assert first_different(compared) == "mse"


def test_images_and_captions_may_be_given(sd: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (SIZE + 9, SIZE + 3, 3), np.uint8)).save(tmp_path / name)
    lines = [{"file_name": "a.png", "text": "a cat"}, {"file_name": "b.png", "text": "x"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    request = parity.TrainingRequest(train_data_dir=tmp_path)
    pipe = parity.open_for(sd, request)
    examples = parity.examples_for(pipe, request)
    assert [example.caption for example in examples] == ["a cat", "x"]
    assert training.batch_of(pipe, examples)["pixel_values"].shape == (2, SIZE, SIZE, 3)
    with pytest.raises(ValueError, match="has only 2 images for batch_size=3"):
        parity.examples_for(pipe, dataclasses.replace(request, batch_size=3))


def test_images_are_generated_where_none_are_given(sd: Path) -> None:
    request = parity.TrainingRequest(batch_size=4)
    images = [example.pixels for example in parity.examples_for(parity.open_for(sd, request), request)]
    assert all(image.std() > 5 for image in images), "an image without content proves nothing"
    assert np.abs(images[0].astype(int) - images[1]).mean() > 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", "4"], "--batch-size: only for comparisons of training steps; add --training"),
        (["--training", "--bisect", "--width", "64"], "--width, --bisect: only for comparisons of sampling"),
        (["--training", "--dtype", "float16"], "float32 or bfloat16, got float16"),
        (["--training", "--resolution", "12"], "resolution must be a multiple of 16"),
        (["--training", "--train-data-dir", "x", "--prompt", "a"], "leave out one of the two"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_requests(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["parity", "diffuse-jax/emoji", *words]) == 1
    assert message in capsys.readouterr().err


def test_gradients_of_nothing_but_rounding_count_by_what_is_usual() -> None:
    """A bias that softmax cancels has a gradient of rounding errors only, which do not count."""
    loud, quiet = np.ones((8, 8), np.float32), np.full(8, 1e-9, np.float32)
    update = lambda quiet: training.Update({"loss": np.float32(1), "grad_norm": np.float32(1)},
                                           {"a": loud, "b": quiet}, {"a": loud, "b": quiet})  # fmt: skip
    tolerance = TOLERANCES["float32"]
    assert compare_updates(update(-quiet), update(quiet), tolerance).ok
    assert not compare_updates(update(quiet + 1e-5), update(quiet), tolerance).ok


def test_a_parameter_that_pytorch_does_not_use_must_have_no_gradient() -> None:
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    values = {"loss": np.float32(1), "grad_norm": np.float32(1)}
    theirs = training.Update(values, {"a": one}, {"a": one})
    update = lambda b: training.Update(values, {"a": one, "b": b}, {"a": one, "b": one})
    assert compare_updates(update(zero), theirs, TOLERANCES["float32"]).ok
    assert first_different(compare_updates(update(one), theirs, TOLERANCES["float32"])) == "gradient b"
    with pytest.raises(ValueError, match="b and 0 more parameters are trained by PyTorch only"):
        compare_updates(theirs, update(one), TOLERANCES["float32"])


def test_other_families_are_refused_before_anything_is_opened(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "IFPipeline"}))
    with pytest.raises(ValueError, match="is a IFPipeline; this trainer supports .*StableDiffusionPipeline"):
        parity.compare_training(tmp_path, device="cpu")
