"""The trainers of latent text-to-image models from their command line: tiny networks, twelve real images."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from diffuse_jax import DiffusionPipeline
from diffuse_jax.adapters import tokens
from diffuse_jax.control_images import canny
from diffuse_jax.models import AutoencoderKL, ControlNetModel, T2IAdapter, UNet2DConditionModel
from diffuse_jax.text import CLIPTextModel
from diffuse_jax.training.control import ADAPTER, CONTROLNET, with_network
from diffuse_jax.training.latent_model import copy_component
from tests.train.helpers import EMOJI, log, numbers, run
from tests.train.latent_models import MIDDLE, SIZE, save_sd, save_sdxl


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose last layers are not zero any more, as adapters need them."""
    make = tmp_path_factory.mktemp
    return {"sd": save_sd(make("sd"), fresh=False), "sdxl": save_sdxl(make("sdxl"), fresh=False)}


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("sdxl"))


def flags(model: Path, output: Path, **more: Any) -> dict[str, Any]:
    shared: dict[str, Any] = {
        "pretrained_model_name_or_path": model,
        "output_dir": output,
        "resolution": SIZE,
        "train_batch_size": 8,
        "learning_rate": 3e-3,
        "lr_warmup_steps": 0,
        "logging_steps": 1,
        "report_to": "none",
    }
    return shared | more


def fell(losses: list[float]) -> float:
    """The loss at the end as a share of what it was at first."""
    return float(np.mean(losses[-10:]) / np.mean(losses[:5]))


# XL's conditions are trained in the ordinary suite by the test of LoRA, and its gradients compared with PyTorch's.
@pytest.mark.parametrize("which", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_text_to_image_learns_twelve_images(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = request.getfixturevalue(which)
    options = {"train_data_dir": EMOJI, "max_train_steps": 60, "checkpointing_steps": 50, "cache_latents": True,
               "use_ema": True, "ema_decay": 0.9, "proportion_empty_prompts": 0.2, "snr_gamma": 5,
               "validation_prompt": "heart", "num_validation_images": 1, "validation_inference_steps": 2,
               "validation_steps": 60}  # fmt: skip
    run(monkeypatch, "text_to_image.py", devices=1, **flags(model, tmp_path, **options))
    assert fell(log(tmp_path)) < 0.75
    assert len(list((tmp_path / "validation").rglob("*.png"))) == 1
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipe) is type(DiffusionPipeline.from_pretrained(model))
    images = pipe("heart", num_inference_steps=2, seed=0, output_type="np").images
    assert images.shape == (1, SIZE, SIZE, 3)
    for part, kind in (("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        assert all(np.array_equal(a, b) for a, b in zip(numbers(tmp_path, kind, part), numbers(model, kind, part)))
    UNet2DConditionModel.from_pretrained(tmp_path / "checkpoint-50", subfolder="unet")


def test_text_to_image_resumes_bit_for_bit(sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one device: checkpoints of several are tested in tests/training/test_checkpoint.py."""
    options = {"train_data_dir": EMOJI, "train_text_encoder": True, "use_ema": True, "random_flip": True,
               "train_batch_size": 4,
               "proportion_empty_prompts": 0.5, "checkpointing_steps": 2, "max_train_steps": 3}  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(monkeypatch, "text_to_image.py", devices=1, **flags(sd, whole, **options))
    shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
    run(monkeypatch, "text_to_image.py", devices=1, **flags(sd, parts, resume_from_checkpoint="latest", **options))
    assert log(whole)[2:] == log(parts)
    for part, kind in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        end, again, before = (numbers(folder, kind, part) for folder in (whole, parts, sd))
        assert all(np.array_equal(a, b) for a, b in zip(end, again, strict=True))
        assert any(not np.array_equal(a, b) for a, b in zip(end, before, strict=True))
    assert json.loads((whole / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "v_prediction"


def test_a_variant_is_trained_in_place(sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the folder that it came from, with an autoencoder from there too: nothing is copied, or lost."""
    model = tmp_path / "model"
    shutil.copytree(sd, model)
    for file in model.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    options = {"train_data_dir": EMOJI, "max_train_steps": 1, "variant": "fp16",
               "pretrained_vae_model_name_or_path": model}  # fmt: skip
    run(monkeypatch, "text_to_image.py", devices=1, **flags(model, model, **options))
    before, after = DiffusionPipeline.from_pretrained(sd), DiffusionPipeline.from_pretrained(model)
    for name in ("vae", "text_encoder"):
        pairs = zip(jax.tree.leaves(before.params[name]), jax.tree.leaves(after.params[name]), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)


def test_components_are_copied_without_the_name_of_their_variant(sd: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "out" / "unet"
    model, params = UNet2DConditionModel.from_pretrained(sd, subfolder="unet")
    model.save_pretrained(source, params, variant="fp16", max_shard_size="20KB")
    assert len(list(source.glob("*.fp16-*.safetensors"))) > 1
    model.save_pretrained(target, jax.tree.map(np.zeros_like, params))  # of an earlier run
    (target / "kept").mkdir()
    copy_component(source, target, "fp16")
    assert not list(target.glob("*fp16*"))
    assert (target / "kept").is_dir()
    copied = UNet2DConditionModel.from_pretrained(target)[1]
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(copied), jax.tree.leaves(params), strict=True))


# The ordinary suite has pairs for SD in the test of DreamBooth below, and those of text encoders in XL.
@pytest.mark.parametrize("which", [pytest.param("sd", marks=pytest.mark.slow), "sdxl"])
def test_lora_learns_and_is_a_file_that_the_pipeline_takes(
    which: str, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained[which]
    options = {"train_data_dir": EMOJI, "max_train_steps": 40, "checkpointing_steps": 25, "rank": 4,
               "train_text_encoder": True, "learning_rate": 2e-2, "mixed_precision": "bf16"}  # fmt: skip
    run(monkeypatch, "text_to_image_lora.py", devices=1, **flags(model, tmp_path, **options))
    assert fell(log(tmp_path)) < 0.98
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    encoders = ("text_encoder",) if which == "sd" else ("text_encoder", "text_encoder_2")
    assert {key.split(".")[0] for key in tensors} == {"unet", *encoders}
    assert all("lora" in key for key in tensors)
    assert (tmp_path / "checkpoint-25" / "pytorch_lora_weights.safetensors").is_file()
    pipe = DiffusionPipeline.from_pretrained(model)
    draw = lambda p: p("heart", num_inference_steps=2, seed=0, output_type="np").images
    assert np.abs(draw(pipe.load_lora_weights(tmp_path)) - draw(pipe)).max() > 1e-4


@pytest.mark.parametrize("script", [pytest.param("dreambooth.py", marks=pytest.mark.slow), "dreambooth_lora.py"])
def test_dreambooth_generates_class_images_and_preserves_them(
    script: str, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sd, instance, others = trained["sd"], tmp_path / "instance", tmp_path / "class"
    instance.mkdir()
    for name in sorted(path.name for path in EMOJI.glob("*.png"))[:3]:
        shutil.copy(EMOJI / name, instance)
    others.mkdir()
    shutil.copy(next(EMOJI.glob("*.png")), others / "mine.png")
    options = {"instance_data_dir": instance, "instance_prompt": "sks cat", "with_prior_preservation": True,
               "class_data_dir": others, "class_prompt": "cat", "num_class_images": 6, "sample_batch_size": 4,
               "max_train_steps": 30, "learning_rate": 5e-3 if script == "dreambooth.py" else 5e-2}  # fmt: skip
    run(monkeypatch, script, devices=1, **flags(sd, tmp_path / "out", **options))
    images = sorted(others.glob("*.png"))
    assert len(images) == 6
    assert (others / "mine.png") in images
    assert all(Image.open(path).size == (SIZE, SIZE) for path in images if path.name != "mine.png")
    assert fell(log(tmp_path / "out")) < 0.95
    assert all(value > 0 for value in log(tmp_path / "out", "prior_loss"))
    if script == "dreambooth.py":
        DiffusionPipeline.from_pretrained(tmp_path / "out")
    else:
        DiffusionPipeline.from_pretrained(sd).load_lora_weights(tmp_path / "out")


def test_textual_inversion_changes_the_rows_of_the_new_word_only(
    trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sd, data = trained["sd"], tmp_path / "data"
    data.mkdir()
    for name in sorted(path.name for path in EMOJI.glob("*.png"))[:3]:
        shutil.copy(EMOJI / name, data)
    options = {"train_data_dir": data, "placeholder_token": "<cat>", "initializer_token": "a", "num_vectors": 2,
               "max_train_steps": 5, "checkpointing_steps": 4, "save_as_full_pipeline": True}  # fmt: skip
    run(monkeypatch, "textual_inversion.py", devices=1, **flags(sd, tmp_path / "out", **options))
    word, rows = tokens.load_rows(tmp_path / "out")
    assert (word, rows.shape) == ("<cat>", (2, 16))
    before = DiffusionPipeline.from_pretrained(sd)
    table = np.asarray(tokens.table_of(before.params["text_encoder"]))
    start = table[tokens.token_id(before.components["tokenizer"], "a")]
    assert np.abs(rows - start).max() > 1e-3
    assert not np.array_equal(rows[0], rows[1])
    whole = DiffusionPipeline.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(np.asarray(tokens.table_of(whole.params["text_encoder"]))[:-2], table)
    rest = lambda pipe: [np.asarray(x) for name in ("unet", "vae") for x in jax.tree.leaves(pipe.params[name])]
    assert all(np.array_equal(a, b) for a, b in zip(rest(before), rest(whole), strict=True))
    options = {"num_inference_steps": 2, "seed": 0, "output_type": "np"}
    taught = before.load_textual_inversion(tmp_path / "out")("a <cat>", **options).images
    np.testing.assert_allclose(taught, whole("a <cat>", **options).images, atol=1e-6)
    assert np.abs(taught - before("a <cat>", **options).images).max() > 1e-6
    assert tokens.load_rows(tmp_path / "out" / "checkpoint-4")[0] == "<cat>"


def edges_of(folder: Path, output: Path) -> Path:
    """An image folder with the same images and captions, and their edges as control images."""
    shutil.copytree(folder, output)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (output / "edges").mkdir()
    for line in lines:
        line["conditioning_image"] = f"edges/{line['file_name']}"
        Image.fromarray(canny(Image.open(output / line["file_name"]))).save(output / line["conditioning_image"])
    (output / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return output


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        pytest.param("controlnet.py", ControlNetModel, id="ControlNet"),
        pytest.param("t2i_adapter.py", T2IAdapter, id="T2I-Adapter", marks=pytest.mark.slow),
    ],
)
def test_what_reads_edges_learns_from_a_column_of_them_and_resumes_bit_for_bit(
    script: str, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = save_sd(tmp_path / "model", fresh=False, middle=MIDDLE), edges_of(EMOJI, tmp_path / "data")
    apple = data / "edges" / "red-apple.png"
    options = {"train_data_dir": data, "max_train_steps": 20, "checkpointing_steps": 15, "random_flip": True,
               "proportion_empty_prompts": 0.3, "learning_rate": 1e-2, "validation_prompt": ["heart", "cat"],
               "validation_image": apple, "num_validation_images": 1, "validation_inference_steps": 2}  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(monkeypatch, script, devices=1, **flags(model, whole, **options))
    assert fell(log(whole)) < 0.95
    assert len(list((whole / "validation").rglob("*.png"))) == 2 * 2, "the control images are shown too"

    shutil.copytree(whole / "checkpoint-15", parts / "checkpoint-15")
    run(monkeypatch, script, devices=1, **flags(model, parts, resume_from_checkpoint="latest", **options))
    assert log(whole)[15:] == log(parts)
    net, params = kind.from_pretrained(whole)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(kind.from_pretrained(parts)[1]), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)

    pipe = DiffusionPipeline.from_pretrained(model)
    component = CONTROLNET if kind is ControlNetModel else ADAPTER
    steered = with_network(component, pipe, **{component.component: (net, params)})
    shared = {"num_inference_steps": 2, "seed": 0, "output_type": "np", "height": SIZE, "width": SIZE}
    draw = lambda image: steered("heart", image=image, **shared).images
    edges = np.asarray(Image.open(apple).resize((SIZE, SIZE)))
    assert np.abs(draw(edges) - draw(edges[::-1])).max() > 1e-4


@pytest.mark.slow
def test_control_images_are_computed_and_cached_and_a_controlnet_is_trained_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For XL: the first step of a new ControlNet leaves the model as it is, so both ways give the same loss."""
    model = save_sdxl(tmp_path / "model", fresh=False, middle=MIDDLE)
    options = {"train_data_dir": EMOJI, "conditioning": "canny", "max_train_steps": 1}
    run(monkeypatch, "controlnet.py", devices=1, **flags(model, tmp_path / "plain", **options))
    options |= {"cache_latents": True, "cache_text_embeddings": True}
    run(monkeypatch, "controlnet.py", devices=1, **flags(model, tmp_path / "cached", **options))
    np.testing.assert_allclose(log(tmp_path / "plain"), log(tmp_path / "cached"), rtol=1e-5)
    options["controlnet_model_name_or_path"] = tmp_path / "plain"
    run(monkeypatch, "controlnet.py", devices=1, **flags(model, tmp_path / "further", **options))
    assert log(tmp_path / "further")[0] != log(tmp_path / "cached")[0]

    shutil.copytree(tmp_path / "plain", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"addition_embed_type": None}))
    options["controlnet_model_name_or_path"] = tmp_path / "other"
    with pytest.raises(ValueError):
        run(monkeypatch, "controlnet.py", devices=1, **flags(model, tmp_path / "wrong", **options))


@pytest.mark.parametrize(
    ("script", "wrong", "message"),
    [
        ("text_to_image.py", {"cache_latents": True, "random_flip": True}, "leave out --random_flip"),
        ("text_to_image.py", {"cache_text_embeddings": True, "train_text_encoder": True}, "text encoder is trained"),
        ("text_to_image.py", {"text_encoder_lr": 1e-5}, "--text_encoder_lr 1e-05 has no effect without"),
        ("text_to_image.py", {"resolution": 15}, "--resolution must be a multiple of 2 for this model, got 15"),
        ("text_to_image.py", {"train_data_dir": "nowhere"}, "nowhere: there is no such folder"),
        ("text_to_image.py", {"caption_column": "words"}, "no column 'words' (--caption_column)"),
        ("text_to_image.py", {"train_batch_size": 99}, "but the data set has 12; use a smaller batch"),
        ("text_to_image.py", {"timestep_bias_strategy": "range", "timestep_bias_begin": 2000}, "timestep_bias"),
        ("text_to_image.py", {"train_batch_size": 1, "lr_scheduler": "piecewise_constant", "lr_step_rules": "x"},
         "step_rules"),
        ("text_to_image.py", {"pretrained_model_name_or_path": "/no/where"}, "/no/where: no such folder"),
        ("text_to_image.py", {"pretrained_vae_model_name_or_path": "/no/where"}, "/no/where: no such folder"),
        ("text_to_image_lora.py", {"rank": 100_000}, "the LoRA rank must be at most 16 here, got 100000"),
        ("text_to_image_lora.py", {"lora_targets": "nothing"}, "no layer matches the LoRA targets 'nothing'"),
        ("dreambooth_lora.py", {"instance_data_dir": EMOJI, "instance_prompt": "x", "rank": 100_000}, "at most 16"),
        ("dreambooth.py", {"instance_data_dir": EMOJI, "instance_prompt": "x", "resolution": 15}, "multiple of 2"),
        ("controlnet.py", {"conditioning": "canny", "controlnet_model_name_or_path": "/no/where"}, "no such folder"),
        ("controlnet.py", {"conditioning": "canny", "validation_prompt": "a", "validation_image": "a.png"}, "a.png"),
        ("t2i_adapter.py", {"conditioning": "canny", "adapter_model_name_or_path": "/no/where"}, "no such folder"),
        ("t2i_adapter.py", {"conditioning": "canny", "validation_image": "a.png"}, "got 1 images and 0 prompts"),
        ("text_to_image.py", {"aspect_ratio_buckets": True, "bucket_step": 1}, "--bucket_step must be a multiple of 2"),
        ("text_to_image.py", {"train_batch_size": 1, "validation_prompt": "a", "validation_inference_steps": 1001},
         "num_inference_steps"),
        ("controlnet.py", {"conditioning": "canny", "conditioning_image_column": "edges"},
         "leave out --conditioning_image_column edges"),
        ("controlnet.py", {}, "no control image under 'conditioning_image' (--conditioning_image_column)"),
        ("controlnet.py", {"conditioning": "canny", "validation_prompt": ["a", "b", "c"],
                           "validation_image": ["a.png", "b.png"]}, "got 2 images and 3 prompts"),
        ("controlnet.py", {"conditioning": "canny", "validation_image": "a.png"}, "got 1 images and 0 prompts"),
        ("dreambooth.py", {"instance_data_dir": "nowhere", "instance_prompt": "x"}, "has no images"),
        ("dreambooth.py", {"instance_data_dir": EMOJI, "instance_prompt": "x", "with_prior_preservation": True},
         "needs --class_data_dir and --class_prompt"),
        ("dreambooth_lora.py", {"instance_data_dir": EMOJI, "instance_prompt": "x", "streaming": True},
         "cannot be used here"),
        ("dreambooth.py", {"instance_data_dir": EMOJI, "instance_prompt": "x", "max_train_samples": 3},
         "--max_train_samples cannot be used here; the images are those of --instance_data_dir"),
        ("textual_inversion.py", {"placeholder_token": "<c>", "initializer_token": "b", "dataset_name": "x"},
         "--dataset_name cannot be used here; the images are those of --train_data_dir"),
        ("textual_inversion.py", {"placeholder_token": "a", "initializer_token": "b"}, "already knows 'a'"),
        ("textual_inversion.py", {"placeholder_token": "<c>", "initializer_token": "b", "num_vectors": 100_000},
         "--num_vectors must be at most 14, got 100000"),
        ("dreambooth.py", {"instance_data_dir": EMOJI, "instance_prompt": "x", "with_prior_preservation": True,
                           "class_prompt": "y", "class_data_dir": EMOJI / "metadata.jsonl"}, "is a file; give"),
        ("textual_inversion.py", {"placeholder_token": "<c>", "initializer_token": "two"}, "single token"),
        ("textual_inversion.py", {"placeholder_token": "<c>", "initializer_token": "b", "caption_column": "text"},
         "every caption must contain {}"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_written(
    script: str,
    wrong: dict[str, Any],
    message: str,
    sd: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nor are weights read."""
    model = save_sd(tmp_path / "model", middle=MIDDLE) if script == "controlnet.py" else sd
    options = flags(model, tmp_path / "out", max_train_steps=1)
    if not script.startswith("dreambooth"):
        options["train_data_dir"] = EMOJI
    with pytest.raises((ValueError, OSError)) as caught:
        run(monkeypatch, script, **options | wrong)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert "loading" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["text_to_image.py", "text_to_image_lora.py"])
def test_loading_is_reported_and_another_resolution_than_the_models_is_warned_of(
    script: str, sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = flags(sd, tmp_path / "out", max_train_steps=1, train_data_dir=EMOJI)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none where they are the same
        loaded(monkeypatch, script, **options)
    said = capsys.readouterr().err
    for name in ("unet (UNet2DConditionModel)", "vae (AutoencoderKL)", "text_encoder (CLIPTextModel)"):
        assert f"loading {name} from {sd}" in said
    sizes = rf"--resolution {2 * SIZE} is not the size of this model's images, {SIZE} x {SIZE} pixels"
    with pytest.warns(UserWarning, match=sizes) as given:
        loaded(monkeypatch, script, **options | {"resolution": 2 * SIZE})
    assert len(given) == 1


@pytest.mark.parametrize("rate", ["0", "1e-400"])
def test_a_learning_rate_of_zero_is_warned_of(
    rate: str, sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = flags(sd, tmp_path / "out", max_train_steps=1, train_data_dir=EMOJI, learning_rate=rate)
    with pytest.warns(UserWarning, match="learning_rate is 0: .* will not change") as given:
        loaded(monkeypatch, "text_to_image.py", **options)
    assert len(given) == 1


def test_the_empty_prompt_is_one(sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in diffusers: it shows what the model draws without a prompt."""
    options = flags(sd, tmp_path / "out", max_train_steps=1, train_data_dir=EMOJI, validation_prompt="")
    assert loaded(monkeypatch, "text_to_image.py", **options)["validate"] is not None
    del options["validation_prompt"]
    assert loaded(monkeypatch, "text_to_image.py", **options)["validate"] is None


def loaded(monkeypatch: pytest.MonkeyPatch, path: str, **flags: Any) -> dict[str, Any]:
    """What a script would train, and how: the arguments of ``fit``."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("diffuse_jax.training.loop.fit", lambda *_, **options: given.update(options))
    run(monkeypatch, path, devices=1, **flags)
    return given


@pytest.mark.parametrize("other", ["rank", "steps", "damaged", "missing"])
def test_a_checkpoint_that_does_not_fit_is_refused_before_weights_are_read(
    other: str,
    trained: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path_factory.getbasetemp() / "of-rank-2"
    options = {"train_data_dir": EMOJI, "max_train_steps": 2, "checkpointing_steps": 2, "rank": 2}
    if not output.exists():
        run(monkeypatch, "text_to_image_lora.py", devices=1, **flags(trained["sd"], output, **options))
    saved = tmp_path / "checkpoint-2"
    shutil.copytree(output / "checkpoint-2", saved)
    options |= {"resume_from_checkpoint": saved, "output_dir": tmp_path / "out"}
    if other == "damaged":
        largest = max((path for path in (saved / "state").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    changes, message = {
        "rank": ({"rank": 4}, "of another shape"),
        "steps": ({"max_train_steps": 1}, "has completed 2 steps, more than --max_train_steps 1"),
        "damaged": ({}, "checkpoint-2 cannot be read"),
        "missing": ({"resume_from_checkpoint": tmp_path / "checkpoint-3"}, "no checkpoint checkpoint-3"),
    }[other]
    capsys.readouterr()
    with pytest.raises((ValueError, OSError), match=message):
        run(
            monkeypatch,
            "text_to_image_lora.py",
            devices=1,
            **flags(trained["sd"], tmp_path / "out", **options | changes),
        )
    assert "loading" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_inversion_is_for_one_text_encoder(sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"train_data_dir": EMOJI, "placeholder_token": "<c>", "initializer_token": "b", "max_train_steps": 1}
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline has two"):
        run(monkeypatch, "textual_inversion.py", **flags(sdxl, tmp_path, **options))


def test_a_missing_network_is_named(sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(sd, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "text_encoder")
    with pytest.raises(ValueError, match=r"text_encoder.config\.json: no such file"):
        run(monkeypatch, "text_to_image.py", **flags(tmp_path / "model", tmp_path / "out", train_data_dir=EMOJI))
    assert not (tmp_path / "out").exists()
