"""The trainer of Custom Diffusion from its command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from diffuse_jax import DiffusionPipeline
from diffuse_jax.adapters import custom_diffusion as custom_file
from diffuse_jax.adapters import tokens
from diffuse_jax.training.custom import Listed
from diffuse_jax.weights.names import flatten
from tests.train.helpers import EMOJI, log, run
from tests.train.latent_models import SIZE, save_sd, save_sdxl

SCRIPT = "custom_diffusion.py"


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd(tmp_path_factory.mktemp("sd"), fresh=False)


def images(folder: Path, first: int, last: int) -> Path:
    folder.mkdir(parents=True)
    for path in sorted(EMOJI.glob("*.png"))[first:last]:
        shutil.copy(path, folder)
    return folder


def flags(model: Path, output: Path, **more: Any) -> dict[str, Any]:
    shared: dict[str, Any] = {
        "pretrained_model_name_or_path": model,
        "output_dir": output,
        "resolution": SIZE,
        "train_batch_size": 4,
        "logging_steps": 1,
        "report_to": "none",
        "modifier_token": "<c>",
        "initializer_token": "a+b",
    }
    return shared | more


@pytest.mark.slow
def test_two_concepts_with_classes_are_learned_and_resumed_bit_for_bit(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    concepts = [
        {
            "instance_data_dir": str(images(tmp_path / f"instance{n}", 3 * n, 3 * n + 3)),
            "instance_prompt": f"a {word}",
            "class_data_dir": str(images(tmp_path / f"class{n}", 6 + 3 * n, 9 + 3 * n)),
            "class_prompt": "a",
        }
        for n, word in enumerate(("<c>", "<h>"))
    ]
    (tmp_path / "concepts.json").write_text(json.dumps(concepts))
    options = {"concepts_list": tmp_path / "concepts.json", "modifier_token": "<c>+<h>", "hflip": True,
               "with_prior_preservation": True, "num_class_images": 3, "learning_rate": 2e-2,
               "max_train_steps": 24, "checkpointing_steps": 20, "no_safe_serialization": True}  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(monkeypatch, SCRIPT, devices=1, **flags(sd, whole, **options))
    assert all(value > 0 for value in log(whole, "prior_loss"))
    assert np.mean(log(whole)[-8:]) < 0.97 * np.mean(log(whole)[:4])
    shutil.copytree(whole / "checkpoint-20", parts / "checkpoint-20")
    run(monkeypatch, SCRIPT, devices=1, **flags(sd, parts, resume_from_checkpoint="latest", **options))
    assert log(whole)[20:] == log(parts)
    files = ["<c>.bin", "<h>.bin", custom_file.OLD_FILE]
    assert all((folder / file).is_file() for folder in (whole, whole / "checkpoint-20") for file in files)
    assert all((whole / file).read_bytes() == (parts / file).read_bytes() for file in files)

    before = DiffusionPipeline.from_pretrained(sd)
    table = np.asarray(tokens.table_of(before.params["text_encoder"]))
    starts = [table[tokens.token_id(before.components["tokenizer"], word)] for word in "ab"]
    for file, start in zip(files, starts):
        word, rows = tokens.load_rows(whole / file)
        assert (f"{word}.bin", rows.shape) == (file, (1, 16))
        assert np.abs(rows[0] - start).max() > 1e-3, "the last word is trained too"
    leaves = flatten(custom_file.read_leaves(whole, before.components["unet"].shapes()))
    old = flatten(before.params["unet"])
    assert {path[-2] for path in leaves} == {"to_k", "to_v"}
    assert all(np.abs(leaf - old[path]).max() > 1e-3 for path, leaf in leaves.items())


def test_one_concept_with_sizes_kept_and_the_pictures_of_its_validation(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything of cross-attention, and cached latents."""
    data, others, out = images(tmp_path / "data", 0, 3), images(tmp_path / "class", 3, 5), tmp_path / "out"
    options = {"instance_data_dir": data, "instance_prompt": "a <c>", "freeze_model": "crossattn", "noaug": True,
               "with_prior_preservation": True, "class_data_dir": others, "class_prompt": "a", "num_class_images": 2,
               "cache_latents": True, "max_train_steps": 2, "mixed_precision": "bf16", "validation_prompt": "a <c>",
               "validation_steps": 2, "num_validation_images": 1, "validation_inference_steps": 2}  # fmt: skip
    run(monkeypatch, SCRIPT, devices=1, **flags(sd, out, **options))
    assert len(list((out / "validation").rglob("*.png"))) == 1
    keys = {key.split(".")[-2] for key in load_file(out / custom_file.FILE) if "custom_diffusion" in key}
    assert keys == {f"to_{name}_custom_diffusion" for name in "qkv"} | {"0"}
    plain = DiffusionPipeline.from_pretrained(sd)
    pipe = plain.load_attn_procs(out).load_textual_inversion(out / "<c>.safetensors")
    before, after = flatten(plain.params["unet"]), flatten(pipe.params["unet"])
    moved = {path[-3:-1] for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {("attn2", name) for name in ("to_q", "to_k", "to_v", "to_out_0")}
    assert len(tokens.table_of(pipe.params["text_encoder"])) == len(tokens.table_of(plain.params["text_encoder"])) + 1


def test_photographs_of_the_class_have_captions(tmp_path: Path) -> None:
    """In the files of diffusers' script for retrieving them."""
    folder = images(tmp_path / "class" / "images", 0, 2).parent
    names = sorted(path.name for path in folder.glob("images/*.png"))
    (folder / "images.txt").write_text("".join(f"elsewhere/images/{name}\n" for name in names))
    (folder / "caption.txt").write_text("first\n\nsecond\n")
    listed = Listed(folder)
    assert [listed[n].captions for n in range(len(listed))] == [("first",), ("second",)]
    assert [Path(str(listed[n].image)).name for n in range(2)] == names
    (folder / "caption.txt").write_text("first\n")
    with pytest.raises(ValueError, match=r"2 lines in images.txt and 1 in caption.txt"):
        Listed(folder)
    (folder / "caption.txt").write_text("first\nsecond\n")
    (folder / "images" / names[0]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"images.txt names .*{names[0]}"):
        Listed(folder)


PRIOR = {"with_prior_preservation": True, "class_data_dir": "none", "class_prompt": "a", "num_class_images": 7}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"instance_data_dir": "none"}, "--instance_data_dir none has no images"),
        ({"modifier_token": "<c>+<h>+<x>"}, "needs a word for each of the 3 of --modifier_token, got 2: 'a+b'"),
        ({"modifier_token": "<c>+<h>"}, "--modifier_token <h> is in no instance prompt"),
        ({"modifier_token": "<c>+<c>"}, "has a word twice"),
        ({"modifier_token": "a/b"}, "words joined by +, which name files, got 'a/b'"),
        ({"modifier_token": "a"}, "the tokenizer already knows 'a'; choose another modifier_token"),
        ({"initializer_token": "ktn"}, "'ktn' is 'k', 't', 'n</w>'; choose another word with --initializer_token"),
        ({"with_prior_preservation": True}, "needs --class_data_dir and --class_prompt"),
        ({"real_prior": True}, "--real_prior is about class images"),
        (PRIOR | {"real_prior": True}, "none has 0 of 7 images, and none are retrieved from the network; put as many"),
        ({"cache_latents": True}, "--cache_latents needs images and prompts that stay the same; add --noaug"),
        ({"concepts_list": "list.json"}, "has all concepts; leave out --instance_data_dir, --instance_prompt"),
        ({"concepts_list": [{"instance_data_dir": "a"}]}, "concept 1 lacks instance_prompt"),
        ({"concepts_list": [{"instance_data_dir": "a", "instance_prompt": "b", "name": "c"}]}, "concept 1 has 'name'"),
        ({"concepts_list": {}}, "must be a JSON list of concepts"),
        ({"train_data_dir": EMOJI}, "--train_data_dir cannot be used here"),
        ({"model": "xl"}, "Custom Diffusion supports one text encoder; StableDiffusionXLPipeline has two: give"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused_before_weights_are_read_or_anything_is_written(
    wrong: dict[str, Any],
    message: str,
    sd: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_sdxl(tmp_path / "xl") if "model" in wrong else sd
    options = flags(model, tmp_path / "out", max_train_steps=1, instance_data_dir=EMOJI, instance_prompt="a <c>")
    options |= {name: value for name, value in wrong.items() if name != "model"}
    if wrong.get("modifier_token") == "a":
        options["instance_prompt"] = "a"
    if "concepts_list" in wrong and wrong["concepts_list"] != "list.json":
        (tmp_path / "list.json").write_text(json.dumps(wrong["concepts_list"]))
        options = {name: value for name, value in options.items() if not name.startswith("instance")}
        options["concepts_list"] = "list.json"
    with pytest.raises((ValueError, OSError)) as caught:
        run(monkeypatch, SCRIPT, **options)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert "loading" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
