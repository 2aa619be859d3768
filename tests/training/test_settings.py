"""Settings: filled from flags by name, checked by themselves, and all that anything below the scripts takes."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import pkgutil
import typing
from pathlib import Path
from typing import Any

import pytest

import diffuse_jax
import diffuse_jax.training
from diffuse_jax import weights
from diffuse_jax.models.remat import POLICIES
from diffuse_jax.sharding import make_mesh
from diffuse_jax.training import optimizer
from diffuse_jax.training.arguments import make_parser
from diffuse_jax.training.batches import IndexedBatches
from diffuse_jax.training.data import DataSettings, ImageSettings, data_from
from diffuse_jax.training.data.settings import CacheSettings
from diffuse_jax.training.flags import Parser, settings_from
from diffuse_jax.training.latent_flags import latent_parser
from diffuse_jax.training.loop import fit
from diffuse_jax.training.networks import network_folder
from diffuse_jax.training.settings import (
    BatchSettings,
    ComputeSettings,
    CustomSettings,
    DreamBoothSettings,
    HubSettings,
    LoraSettings,
    NetworkSettings,
    OptimizerSettings,
    ProcessSettings,
    RunSettings,
    TrackerSettings,
    UploadSettings,
    ValidationSettings,
)
from diffuse_jax.training.settings.model import REMAT_POLICIES
from diffuse_jax.training.settings.run import OPTIMIZERS
from tests.test_docs_commands import parser_of
from tests.train.helpers import ROOT
from tests.training import line

PACKAGE = Path(diffuse_jax.__file__).parent
SCRIPTS = sorted(path.name for path in (ROOT / "train").glob("*.py"))

PARSED = {
    "cli.py": "a command",
    "batch_command.py": "the flags of a job",
    "image_flags.py": "the flags of images",
    "runs_command.py": "a command",
    "torch_backend/command.py": "a command",
    "torch_backend/training_command.py": "a command",
    "training/command.py": "reads the flags of a script before the rest of it is loaded",
    "training/flags.py": "makes settings of parsed flags",
    "training/pixel_flags.py": "refuses flags of an objective that was not chosen, by the names they were given under",
    "training/data/flags.py": "the same of those of the data, whose caches lie in the folder of the run",
    "weights_commands.py": "commands",
}
"""Files that take or return an ``argparse.Namespace``, and why."""

PARSERS = {
    f"training/{name}.py"
    for name in ("arguments", "configuration", "flags", "pixel_flags", "reward_flags", "data/flags")
}
"""Files of the trainers that know argparse: they define flags, or read them from files."""


def all_settings() -> set[type]:
    """Every settings class of the package."""
    found = set()
    for module in pkgutil.walk_packages(diffuse_jax.training.__path__, "diffuse_jax.training."):
        members = vars(importlib.import_module(module.name)).values()
        found |= {kind for kind in members if isinstance(kind, type) and kind.__name__.endswith("Settings")}
    return found


def fields_of(kind: type) -> dict[str, type]:
    """The fields of settings and of those within them, and the class that each belongs to."""
    names, types = {}, typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner = types[field.name]
        names |= fields_of(inner) if dataclasses.is_dataclass(inner) else {field.name: kind}
    return names


def test_parsed_flags_end_at_the_scripts() -> None:
    names = lambda path: {getattr(node, "id", None) or getattr(node, "attr", None) for node in nodes(path)}
    assert {where(path) for path in PACKAGE.rglob("*.py") if "Namespace" in names(path)} == set(PARSED)


def test_only_files_of_flags_know_argparse() -> None:
    imports = lambda path: {alias.name for node in nodes(path) if isinstance(node, ast.Import) for alias in node.names}
    assert {where(path) for path in (PACKAGE / "training").rglob("*.py") if "argparse" in imports(path)} == PARSERS


def where(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def test_settings_are_frozen_typed_and_documented() -> None:
    kinds = all_settings()
    assert {RunSettings, DataSettings, ImageSettings, ValidationSettings} <= kinds
    for kind in kinds:
        options = kind.__dataclass_params__  # type: ignore[attr-defined]
        assert options.frozen, kind
        for field in dataclasses.fields(kind):
            assert field.kw_only, kind
            assert field.name in (kind.__doc__ or ""), f"{kind.__name__} does not say what {field.name} is"


def test_settings_are_filled_from_flags_of_their_names() -> None:
    parser = latent_parser("about", output_dir="somewhere", lr_scheduler="cosine")
    words = "--pretrained_model_name_or_path m --validation_prompt a b --train_batch_size 3 --use_ema --optimizer Lion"
    args = parser.parse_args(words.split())
    run = settings_from(args, RunSettings)
    assert (run.output_dir, run.batch.train_batch_size, run.ema.use_ema) == ("somewhere", 3, True)
    assert (run.optimizer.optimizer, run.optimizer.lr_scheduler) == ("lion", "cosine")
    shown = settings_from(args, ValidationSettings)
    assert shown == ValidationSettings(validation_prompt=("a", "b"))
    assert hash(shown) != hash(ValidationSettings())
    assert hash(run) == hash(settings_from(args, RunSettings))


def test_a_default_is_defined_in_one_place() -> None:
    """Unless a script changes a default, omitting a flag is the same as omitting the setting."""
    args = make_parser("about", output_dir="here").parse_args([])
    where = TrackerSettings(tracker_project_name=args.tracker_project_name)  # the name of the script
    assert settings_from(args, RunSettings) == RunSettings(output_dir="here", trackers=where)
    assert settings_from(args, NetworkSettings) == NetworkSettings()
    parser = Parser()
    parser.group("model", NetworkSettings)("--model_config_name_or_path", default="mine")
    assert parser.parse_args([]).model_config_name_or_path == "mine"


def test_data_of_a_script() -> None:
    args = argparse.Namespace(output_dir="out", data_cache_dir=None, resolution=64, train_shards=["a.tar"])
    data = data_from(args)
    assert data.caches.data_cache_dir == Path("out") / "cache"
    assert data.caption_column is None, "the script has no flag for it"
    assert (data.images, data.train_shards) == (ImageSettings(resolution=64), ("a.tar",))
    args = argparse.Namespace(output_dir="out", data_cache_dir="there", caption_column="words")
    unnamed = data_from(args, named=False)
    assert unnamed == DataSettings(caches=CacheSettings(data_cache_dir="there"), caption_column="words")
    args = argparse.Namespace(output_dir="out", data_cache_dir=None, train_data_dir=None, dataset_name=None)
    with pytest.raises(ValueError, match="give exactly one of --train_data_dir, .*; got none"):
        data_from(args)  # before the script loads its model


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into one of the settings that the script makes, or by the script itself."""
    parser = parser_of(f"train/{script}", monkeypatch)
    text = (ROOT / "train" / script).read_text(encoding="utf-8")
    attributes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
    read = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "args"}
    made = {kind for kind in all_settings() if f"settings_from(args, {kind.__name__})" in text}
    made |= {DataSettings} if "data_from(args" in text else set()
    flags = {a.dest for a in parser._actions if a.default is not argparse.SUPPRESS} - {"config", "debug"}
    known = read | {name for kind in made for name in fields_of(kind)}
    assert flags - known == set(), "nothing reads these"


def test_every_setting_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that matches no script's flag would always keep its default."""
    flags = {action.dest for script in SCRIPTS for action in parser_of(f"train/{script}", monkeypatch)._actions}
    for kind in all_settings():
        assert set(fields_of(kind)) - flags == set(), kind


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (RunSettings, {"output_dir": "a", "num_train_epochs": 0}, "num_train_epochs must be a whole number.*, got 0"),
        (RunSettings, {"output_dir": "a", "max_train_steps": 10,
                       "optimizer": OptimizerSettings(lr_scheduler="cosine", lr_warmup_steps=10)},
         "lr_warmup_steps 10 must be from 0 to less than max_train_steps 10"),
        (OptimizerSettings, {"learning_rate": -1.0}, "learning_rate must be a finite number of at least 0, got -1"),
        (OptimizerSettings, {"learning_rate": float("nan")}, "must be a finite number of at least 0, got nan"),
        (OptimizerSettings, {"adam_beta2": 1.0}, "adam_beta2 must be a number of at least 0 and less than 1, got 1"),
        (OptimizerSettings, {"max_grad_norm": -1.0}, "max_grad_norm must be a finite number above 0, got -1"),
        (TrackerSettings, {"report_to": "mlflow"}, "report_to must be one of tensorboard, wandb, none, all, got"),
        (ProcessSettings, {"num_processes": 2}, r"needs? .*\['--coordinator_address', '--process_id'\] is missing"),
        (ImageSettings, {"image_interpolation_mode": "box"}, "must be one of bilinear, bicubic, lanczos, nearest"),
        (DataSettings, {"proportion_empty_prompts": -0.1}, "must be a number from 0 to 1, got -0.1"),
        (DataSettings, {"train_data_dir": ("a", "b"), "data_repeats": (2, 0)}, "data_repeats .* at least 1 .*, got 0"),
        (DataSettings, {"train_data_dir": ("a", "b"), "data_weights": (2.0, float("inf"))}, "data_weights .*, got inf"),
        (LoraSettings, {"lora_targets": "to_[q"}, r"must be a regular expression, got 'to_\[q': unterm"),
        (NetworkSettings, {"pretrained_model_name_or_path": "a", "model_config_name_or_path": "b"}, "leave out"),
        (DreamBoothSettings, {"instance_data_dir": "a", "instance_prompt": "b", "with_prior_preservation": True,
                              "class_prompt": "c"}, "needs --class_data_dir$"),
        (CustomSettings, {"instance_data_dir": "a"}, "give --instance_data_dir and --instance_prompt, or several conc"),
        (CustomSettings, {"instance_data_dir": "a", "instance_prompt": "b", "freeze_model": "all"},
         "freeze_model must be one of crossattn_kv, crossattn, got 'all'"),
        (CustomSettings, {"instance_data_dir": "a", "instance_prompt": "b", "modifier_token": "<a>+"}, "joined by +"),
        (ValidationSettings, {"num_validation_images": 0}, "must be a whole number of at least 1 .*, got 0"),
    ],
)  # fmt: skip
def test_settings_refuse_impossible_values(kind: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_choices_that_are_written_before_jax_is_loaded_are_those_there_are() -> None:
    assert set(OPTIMIZERS) == {*optimizer.OPTIMIZERS}
    assert REMAT_POLICIES == POLICIES


def test_precisions() -> None:
    for values, dtype, remat in (
        ({}, "float32", "none"),
        ({"mixed_precision": "bf16", "gradient_checkpointing": True}, "bfloat16", "blocks"),
        ({"remat_policy": "full", "gradient_checkpointing": True}, "float32", "full"),
    ):
        compute = ComputeSettings(**values)  # type: ignore[arg-type]
        assert (compute.dtype, compute.remat) == (dtype, remat)
    with pytest.raises(ValueError, match="mixed_precision.*bf16 has the range of float32"):
        ComputeSettings(mixed_precision="fp16")
    with pytest.raises(ValueError, match="remat_policy must be one of none, blocks, full, got 'all'"):
        ComputeSettings(remat_policy="all")


def test_a_network_is_requested_from_the_hub_with_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(weights, "resolve", lambda source, **options: asked.update(options) or tmp_path)
    hub = HubSettings(revision="v2", variant="fp16", cache_dir="there", hub_token="secret")
    assert network_folder(hub, "some/model", "unet") == tmp_path
    assert asked.pop("skip") >= {"vae", "text_encoder"}
    assert asked == {
        "revision": "v2",
        "variant": "fp16",
        "cache_dir": "there",
        "token": "secret",
        "only_small": False,
    }
    assert "secret" not in repr(hub)


def test_a_run_without_a_parser(tmp_path: Path) -> None:
    """Its ``training.yaml`` is one that ``--config`` reads."""
    settings = OptimizerSettings(learning_rate=0.05, lr_warmup_steps=0, max_grad_norm=0.5)
    run = RunSettings(output_dir=tmp_path, max_train_steps=3, logging_steps=1, optimizer=settings,
                      batch=BatchSettings(train_batch_size=1), upload=UploadSettings(hub_token="secret"))  # fmt: skip
    batches = IndexedBatches(lambda n: {"x": line.points(n, 8)})
    frozen = {"slope": line.SLOPE}
    fit(run, make_mesh(), trainable=line.start(), frozen=frozen, loss=line.line_loss, batches=batches)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    assert "secret" not in repr(run) + (tmp_path / "training.yaml").read_text()
    again = make_parser("about", output_dir="other").parse_args(["--config", str(tmp_path / "training.yaml")])
    counted = dataclasses.replace(run, output_dir=str(tmp_path), validation_steps=100, upload=UploadSettings())
    assert settings_from(again, RunSettings) == counted
