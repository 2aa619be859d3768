"""Flags: groups, files, names of other libraries, and messages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffuse_jax.training.arguments import make_parser
from diffuse_jax.training.configuration import write_config
from diffuse_jax.training.data.flags import add_data
from diffuse_jax.training.devices import mesh_from
from diffuse_jax.training.flags import Parser, settings_from
from diffuse_jax.training.latent_flags import (
    NOT_OF_DISTILLATION,
    OF_OTHERS,
    add_lora,
    consistency_parser,
    latent_parser,
)
from diffuse_jax.training.optimizer import optimizer_from
from diffuse_jax.training.settings import BatchSettings, DeviceSettings, OptimizerSettings


@pytest.fixture
def parser() -> Parser:
    parser = make_parser("about", output_dir="somewhere", lr_scheduler="cosine")
    parser.group("model")("--pretrained_model_name_or_path", required=True)
    parser.group("monitoring")("--validation_prompt", nargs="+")
    return parser


MODEL = ["--pretrained_model_name_or_path", "model"]


def config(tmp_path: Path, values: Any) -> list[str]:
    path = tmp_path / "flags.yaml"
    path.write_text(yaml.safe_dump(values))
    return ["--config", str(path)]


def refused(parser: Parser, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parser.parse_args([*MODEL, *words])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_command_line_wins_over_file_wins_over_defaults(parser: Parser, tmp_path: Path) -> None:
    values = {
        "pretrained_model_name_or_path": "other",
        "learning_rate": 3e-5,
        "max_grad_norm": 0.5,
        "use_ema": True,
        "scale_lr": False,
        "adam_beta1": None,
        "validation_prompt": ["-a red house", "b"],
        "ema_max_decay": 0.5,  # another name of ema_decay
    }
    args = parser.parse_args([*config(tmp_path, values), "--learning_rate", "2e-5"])
    assert (args.learning_rate, args.max_grad_norm, args.lr_power) == (2e-5, 0.5, 1.0)
    assert args.pretrained_model_name_or_path == "other"
    assert (args.use_ema, args.scale_lr, args.adam_beta1) == (True, False, None)
    assert args.ema_decay == 0.5
    assert args.validation_prompt == ["-a red house", "b"]
    assert args.lr_scheduler == "cosine"
    assert args.output_dir == "somewhere"


def test_a_switch_of_the_file_can_be_turned_off(parser: Parser, tmp_path: Path) -> None:
    given = config(tmp_path, {"use_ema": True, "scale_lr": True, "distributed": True})
    args = parser.parse_args([*MODEL, *given, "--no-use_ema", "--no-distributed"])
    assert (args.use_ema, args.scale_lr, args.distributed) == (False, True, False)


def test_a_switch_that_is_on_by_default_can_be_turned_off(parser: Parser) -> None:
    parser.set_defaults(use_ema=True)
    assert parser.parse_args(MODEL).use_ema
    assert not parser.parse_args([*MODEL, "--no-use_ema"]).use_ema
    assert not vars(parser.parse_args([*MODEL, "--no-allow_tf32"])).get("allow_tf32")


def test_json_files_and_the_file_written_by_a_run(parser: Parser, tmp_path: Path) -> None:
    (tmp_path / "flags.json").write_text(json.dumps({"seed": 7, "learning_rate": 1e-3, "hub_token": "secret"}))
    words = ["--config", str(tmp_path / "flags.json"), "--validation_prompt", "a b", "c", "--adam_beta1=0.5"]
    args = parser.parse_args([*MODEL, *words])
    write_config(tmp_path / "run", vars(args))
    assert "secret" not in (tmp_path / "run" / "training.yaml").read_text()
    again = parser.parse_args(["--config", str(tmp_path / "run" / "training.yaml")])
    different = {name for name, value in vars(args).items() if vars(again)[name] != value}
    assert different == {"config", "hub_token"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lerning_rate": 1}, "lerning_rate is not a flag; did you mean learning_rate?"),
        ({"process_id": 1}, "process_id cannot be set in a file; use --process_id on the command line"),
        ({"use_ema": "yes"}, "use_ema must be true or false, got 'yes'"),
        ({"seed": "x"}, "argument --seed: must be a whole number of at least 0 and less than 2^32, got x"),
        ({"optimizer": "sgd"}, "invalid choice: 'sgd'"),
        ({"use_8bit_adam": True}, "--optimizer lion or adafactor needs less memory"),
        ({"save_steps": 5}, "--save_steps: every checkpoint contains the model"),
        ({"learning_rate": [1e-4, 1e-5]}, "learning_rate takes one value, got [0.0001, 1e-05]"),
        ({"lr_rules": {"attn2": 1e-5}}, "lr_rules takes a list of values, got {'attn2': 1e-05}"),
        (["seed"], "must map names of flags to values"),
    ],
)
def test_bad_files_are_explained(
    parser: Parser, tmp_path: Path, capsys: pytest.CaptureFixture[str], values: Any, message: str
) -> None:
    assert message in refused(parser, capsys, *config(tmp_path, values))


def test_a_missing_or_broken_file(parser: Parser, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config nowhere.yaml does not exist" in refused(parser, capsys, "--config", "nowhere.yaml")
    bomb = "a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(60))
    for name, text, message in (
        ("bomb.yaml", bomb, "uses aliases"),
        ("deep.yaml", "a: " + "[" * 3000, "nested more than 16 deep"),
        ("blocks.yaml", "- " * 3000 + "a", "nested more than 16 deep"),
        ("date.yaml", "a: 2026-99-99", "cannot be read"),
        ("long.yaml", "# " + "a" * (1 << 16), "has more than 65536 bytes"),
        ("deep.json", '{"a":' + "[" * 3000 + "]" * 3000 + "}", "nested more than"),
    ):
        (tmp_path / name).write_text(text)
        error = refused(parser, capsys, "--config", str(tmp_path / name))
        assert name in error
        assert message in error
    (tmp_path / "broken.yaml").write_text("a: [1")
    assert "cannot be read" in refused(parser, capsys, "--config", str(tmp_path / "broken.yaml"))
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG")
    assert len(refused(parser, capsys, "--config", str(tmp_path / "image.yaml")).splitlines()) == 2


def test_unknown_flags_suggest_the_closest_one(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--learning_rat=3; did you mean --learning_rate?" in refused(parser, capsys, "--learning_rat=3")
    assert "unrecognized arguments: --no-such" in refused(parser, capsys, "--no-such")
    assert "did you mean" not in refused(parser, capsys, "--use_8bit_adams"), "what is refused is not suggested"


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["--use_8bit_adam"], "lion or adafactor"),
        (["--save_steps", "5"], "--checkpointing_steps"),
        (["--save_steps=5"], "--checkpointing_steps"),
        (["--save_model_epochs", "5"], "--checkpointing_steps"),
        (["--no_safe_serialization"], "safetensors"),
        (["--non_ema_revision", "main"], "--revision"),
        (["--mixed_precision", "fp16"], "bf16"),
        (["--mixed_precision", "fp8"], "choose from no, bf16"),
    ],
)
def test_unsupported_flags_say_what_to_do(
    parser: Parser, capsys: pytest.CaptureFixture[str], words: list[str], advice: str
) -> None:
    assert advice in refused(parser, capsys, *words)


@pytest.mark.parametrize(("name", "advice"), OF_OTHERS.items())
def test_flags_of_other_libraries_scripts_say_what_to_do(
    capsys: pytest.CaptureFixture[str], name: str, advice: str
) -> None:
    parser = latent_parser("about", output_dir="somewhere")
    add_data(parser, caches=True)
    add_lora(parser)
    assert f"--{name}: {advice}" in refused(parser, capsys, f"--{name}", "5")
    assert all(flag in parser._option_string_actions for flag in re.findall(r"--\w+", advice))


@pytest.mark.parametrize(("name", "advice"), NOT_OF_DISTILLATION.items())
def test_flags_that_distillation_does_not_have_say_what_to_do(
    capsys: pytest.CaptureFixture[str], name: str, advice: str
) -> None:
    parser = consistency_parser("about", output_dir="somewhere")
    add_lora(parser, "--lora_rank")
    assert f"--{name}: {advice}" in refused(parser, capsys, f"--{name}", "5")
    assert all(flag in parser._option_string_actions for flag in re.findall(r"--\w+", advice))


def test_distillation_knows_the_names_of_diffusers_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    parser = consistency_parser("about", output_dir="somewhere")
    add_lora(parser, "--lora_rank", rank=64)
    args = parser.parse_args(["--pretrained_teacher_model", "m", "--cast_teacher_unet", "--vae_encode_batch_size", "8"])
    assert (args.pretrained_model_name_or_path, args.rank) == ("m", 64)
    notes = capsys.readouterr().err.splitlines()
    assert [note.split()[1] for note in notes] == ["--cast_teacher_unet", "--vae_encode_batch_size"]
    assert parser.parse_args(["--pretrained_model_name_or_path", "m", "--lora_rank", "8"]).rank == 8


@pytest.mark.parametrize(
    "words",
    [
        ["--allow_tf32"],
        ["--enable_npu_flash_attention"],
        ["--set_grads_to_none"],
        ["--enable_xformers_memory_efficient_attention"],
        ["--local_rank", "0"],
        ["--from_pt"],
        ["--use_auth_token"],
    ],
)
def test_flags_that_change_nothing_are_noted(
    parser: Parser, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    before = parser.parse_args(MODEL)
    assert parser.parse_args([*MODEL, *words]) == before
    assert capsys.readouterr().err.startswith(f"note: {words[0]} has no effect: ")


def test_old_names_still_work(parser: Parser) -> None:
    words = ["--num_epochs", "3", "--ema_max_decay", "0.9", "--logger", "none", "--save_images_epochs", "2"]
    args = parser.parse_args([*MODEL, *words])
    assert (args.num_train_epochs, args.ema_decay, args.report_to, args.validation_epochs) == (3, 0.9, "none", 2)


def test_help_is_grouped(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    titles = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["most used", "model", "output", "optimisation", "precision and memory",
                      "running average of the weights", "devices", "checkpoints", "monitoring", "hub",
                      "options"]  # fmt: skip
    first = text[text.index("most used") : text.index("\nmodel:")]
    assert re.findall(r"^  (--\w+)", first, re.MULTILINE) == [
        "--pretrained_model_name_or_path", "--output_dir", "--max_train_steps", "--train_batch_size",
        "--learning_rate", "--mixed_precision", "--validation_prompt"]  # fmt: skip
    assert text.count("  --learning_rate ") == 1
    assert "(default: 500)" in text
    assert "use_8bit_adam" not in text, "what is refused is not offered"


def test_images_per_training_step(parser: Parser) -> None:
    words = ["--train_batch_size", "3", "--gradient_accumulation_steps", "2", "--mesh_fsdp", "2", "--mesh_tensor", "2"]
    args = parser.parse_args([*MODEL, *words, "--max_train_steps", "9", "--lr_warmup_steps", "0", "--scale_lr"])
    images = settings_from(args, BatchSettings).images_per_step(mesh_from(settings_from(args, DeviceSettings)))
    assert images == 3 * 2 * (2 * 2)
    _, rate = optimizer_from(settings_from(args, OptimizerSettings), args.max_train_steps, images)
    assert float(rate(0)) == pytest.approx(1e-4 * 24)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--coordinator_address", "host:1"], r"--num_processes.*is missing"),
        (["--coordinator_address", "host:1", "--num_processes", "2", "--process_id", "2"], "from 0 to 1, got 2"),
        (["--mesh_fsdp", "3"], "does not fit 8 devices"),
    ],
)
def test_impossible_processes_and_meshes_are_refused(parser: Parser, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mesh_from(settings_from(parser.parse_args([*MODEL, *words]), DeviceSettings))
