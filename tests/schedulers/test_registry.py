"""The class that a configuration names: the package's, one from outside, one of two with the same name."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from diffuse_jax import schedulers
from diffuse_jax.schedulers import DDIMScheduler, EulerDiscreteScheduler, Scheduler, scheduler_class
from diffuse_jax.schedulers.configuration import SCHEDULERS
from diffuse_jax.schedulers.flow_match import FlowMatchScheduler
from tests.schedulers.samplers import EVERY

Define = Callable[[str, str], type[Scheduler]]

SOURCE = """
import dataclasses

from diffuse_jax.schedulers import DDIMScheduler


@dataclasses.dataclass(frozen=True, kw_only=True)
class {name}(DDIMScheduler):
    flavour: str = "plain"
"""


@pytest.fixture
def define(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Define:
    """Import a new module that defines a scheduler; what it registers is forgotten after the test."""
    kept = {name: dict(found) for name, found in SCHEDULERS._classes.items()}
    monkeypatch.setattr(SCHEDULERS, "_classes", kept)
    monkeypatch.syspath_prepend(tmp_path)

    def write_and_import(module: str, name: str) -> type[Scheduler]:
        (tmp_path / f"{module}.py").write_text(SOURCE.format(name=name))
        importlib.invalidate_caches()
        sys.modules.pop(module, None)
        return getattr(importlib.import_module(module), name)

    return write_and_import


@pytest.mark.parametrize("name", EVERY)
def test_every_name_of_the_package_is_found(name: str) -> None:
    assert scheduler_class(name) is getattr(schedulers, name)


def test_a_class_from_outside_opens_again_from_a_folder(define: Define, tmp_path: Path) -> None:
    own = define("first_samplers", "FlavouredScheduler")
    path = own(flavour="sweet", beta_end=0.5).save_pretrained(tmp_path / "scheduler")
    assert json.loads(path.read_text())["_class_name"] == "FlavouredScheduler"
    again = Scheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert type(again) is own is scheduler_class("FlavouredScheduler")
    assert again.to_json() == own(flavour="sweet", beta_end=0.5).to_json()


@pytest.mark.parametrize("name", ["NowhereScheduler", "Scheduler", "FlowMatchScheduler"])
def test_an_unknown_name_says_what_to_import(name: str) -> None:
    """Abstract bases are not samplers, so they are not registered."""
    message = rf"unknown scheduler class '{name}'; known: .*DDIMScheduler.*, import the module that defines it first$"
    with pytest.raises(ValueError, match=message):
        scheduler_class(name)


def test_a_module_that_runs_again_replaces_its_class(define: Define) -> None:
    first = define("first_samplers", "FlavouredScheduler")
    again = importlib.reload(importlib.import_module("first_samplers")).FlavouredScheduler
    assert first is not again
    assert scheduler_class("FlavouredScheduler") is again


def test_one_name_in_two_modules_is_refused_by_name_only(define: Define, tmp_path: Path) -> None:
    first, second = define("first_samplers", "TwiceScheduler"), define("second_samplers", "TwiceScheduler")
    folder = first(flavour="sweet").save_pretrained(tmp_path / "scheduler").parent
    message = "'TwiceScheduler' is defined in first_samplers and in second_samplers, .* rename one, or call"
    with pytest.raises(ValueError, match=message):
        scheduler_class("TwiceScheduler")
    with pytest.raises(ValueError, match=rf"scheduler_config\.json: .*{message}"):
        Scheduler.from_pretrained(folder)
    assert type(first.from_pretrained(folder)) is first
    assert type(second.from_pretrained(folder)) is second


def test_names_of_the_package_cannot_be_taken(define: Define) -> None:
    with pytest.raises(ValueError, match=r"^first_samplers\.DDIMScheduler .* diffuse_jax\.schedulers\.ddim\.DDIMSch"):
        define("first_samplers", "DDIMScheduler")
    assert scheduler_class("DDIMScheduler") is DDIMScheduler


def test_an_abstract_base_builds_the_class_that_is_named_if_it_is_of_its_kind() -> None:
    flow = schedulers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert type(FlowMatchScheduler.from_config(flow.to_json())) is type(flow)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler is not a FlowMatchScheduler; use Euler"):
        FlowMatchScheduler.from_config(EulerDiscreteScheduler())
