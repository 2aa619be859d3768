"""Configurations: reading, writing, building one scheduler from another, refusing impossible settings."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffuse_jax import schedulers
from diffuse_jax.schedulers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    RePaintScheduler,
    Scheduler,
    UniPCMultistepScheduler,
)
from tests.schedulers.samplers import EVERY, NAMES, REQUIRED, takes

SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def test_dpm_solver_from_the_configuration_of_pndm(caplog: pytest.LogCaptureFixture) -> None:
    pndm = Scheduler.from_config(SD15)
    assert isinstance(pndm, PNDMScheduler)
    with caplog.at_level(logging.WARNING):
        dpm = DPMSolverMultistepScheduler.from_config(pndm.config)
    assert not caplog.text, "nothing that is left out makes a difference"
    assert (dpm.beta_start, dpm.steps_offset) == (0.00085, 1)
    assert dpm.timestep_spacing == "linspace", "a default of PNDM is not a setting"
    assert dpm.ignored == {"skip_prk_steps": True, "set_alpha_to_one": False, "clip_sample": False}
    assert pickle.loads(pickle.dumps(dpm)).settings() == dpm.settings()
    assert np.isfinite(dpm.table(20).rows).all()
    back = PNDMScheduler.from_config(dpm)
    assert back.skip_prk_steps
    assert back.table(20).timesteps.tolist() == pndm.table(20).timesteps.tolist()


@pytest.mark.parametrize(
    ("target", "config", "reported"),
    [
        # Clipping, zero terminal SNR, spacings and ranges of noise levels are about images and networks.
        ("EulerDiscreteScheduler", {"clip_sample": True, "clip_sample_range": 2.0}, "clip_sample clip_sample_range"),
        ("EulerDiscreteScheduler", {"clip_sample": False, "clip_sample_range": 2.0}, ""),
        ("PNDMScheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ("PNDMScheduler", {"thresholding": True, "sample_max_value": 1.0}, "thresholding"),
        ("DDIMScheduler", {"use_karras_sigmas": True, "sigma_min": 0.1}, "sigma_min use_karras_sigmas"),
        ("DDIMScheduler", {"use_karras_sigmas": None, "interpolation_type": "linear", "sigma_max": None}, ""),
        ("DDIMScheduler", {"interpolation_type": "log_linear"}, "interpolation_type"),
        ("UnCLIPScheduler", {"beta_start": 0.00085, "beta_end": 0.02}, "beta_start"),
        # How another method works inside is not.
        ("DDPMScheduler", {"set_alpha_to_one": False, "skip_prk_steps": True, "solver_order": 3}, ""),
        ("DDIMScheduler", {"variance_type": "fixed_large", "algorithm_type": "sde-dpmsolver++"}, ""),
        ("DDIMScheduler", {"tensor_format": "pt", "timesteps": 1000, "timestep_values": None}, ""),
        # Settings of a later release may be important.
        ("DDIMScheduler", {"_class_name": "DDIMScheduler", "use_better_noise": True}, "use_better_noise"),
    ],
)
def test_what_is_reported(target: str, config: dict[str, Any], reported: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        scheduler = getattr(schedulers, target).from_config(config)
    lost = {name: config[name] for name in reported.split()}
    assert [record.getMessage() for record in caplog.records] == (
        [f"{target} built from {config.get('_class_name', 'a dict')} ignores: {lost}"] if lost else []
    )
    assert {k: v for k, v in scheduler.to_json().items() if k in config} == config, "all of it is kept"


def test_settings_given_on_purpose_are_inherited() -> None:
    explicit = PNDMScheduler.from_config(SD15 | {"timestep_spacing": "leading"})
    assert DPMSolverMultistepScheduler.from_config(explicit).timestep_spacing == "leading"
    replaced = PNDMScheduler().replace(timestep_spacing="leading")
    assert EulerDiscreteScheduler.from_config(replaced).timestep_spacing == "leading"
    changed = EulerDiscreteScheduler.from_config(PNDMScheduler(), timestep_spacing="trailing")
    assert changed.timestep_spacing == "trailing"


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_every_scheduler_from_every_other(source: str, target: str) -> None:
    shared = {"num_train_timesteps": 600, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    shared = {k: v for k, v in shared.items() if all(takes(name, k, v) for name in (source, target))}
    built = getattr(schedulers, target).from_config(getattr(schedulers, source)(**shared))
    assert {k: getattr(built, k) for k in shared} == shared
    assert len(built.table(8)) >= 8


@pytest.mark.parametrize("name", EVERY)
def test_saving_and_reading(name: str, tmp_path: Path) -> None:
    common = {k: v for k, v in SD15.items() if k[0] == "_" or takes(name, k, v)}
    common |= REQUIRED.get(name, {}) | {"_class_name": name, "from_the_future": {"a": [1, 2]}}
    scheduler = getattr(schedulers, name).from_config(common)
    path = scheduler.save_pretrained(tmp_path / "scheduler")
    assert path.name == "scheduler_config.json"
    data = json.loads(path.read_text())
    assert data["_class_name"] == name
    assert data["from_the_future"] == {"a": [1, 2]}
    again = Scheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert type(again) is type(scheduler)
    assert again.to_json() == scheduler.to_json()
    assert hash(again) == hash(again.replace())
    assert [p.name for p in path.parent.iterdir()] == ["scheduler_config.json"]


def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    path = EulerDiscreteScheduler().save_pretrained(tmp_path)
    before = path.read_text()
    with pytest.raises(TypeError, match="set is not JSON serializable"):
        EulerDiscreteScheduler.from_config({"from_the_future": {1, 2}}).save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == before


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_the_settings_and_their_defaults(name: str) -> None:
    cls = getattr(schedulers, name)
    shown = {key: p.default for key, p in inspect.signature(cls).parameters.items() if key != "extra"}
    has = {f.name: f.default for f in dataclasses.fields(cls) if f.init and f.name not in ("extra", *cls.absent)}
    assert {k: v for k, v in shown.items() if v is not inspect.Parameter.empty} == {
        k: v for k, v in has.items() if v is not dataclasses.MISSING
    }
    assert shown.keys() == has.keys()


def test_old_names_of_settings() -> None:
    assert isinstance(Scheduler.from_config({"_class_name": "FlaxPNDMScheduler"}), PNDMScheduler)
    assert DDPMScheduler.from_config({"predict_epsilon": False}).prediction_type == "sample"
    assert EulerDiscreteScheduler(prediction_type="original_sample").prediction_type == "sample"
    assert DPMSolverMultistepScheduler(solver_type="bh2", algorithm_type="deis").solver_type == "midpoint"
    assert UniPCMultistepScheduler(solver_type="midpoint").solver_type == "bh2"
    assert not DDIMInverseScheduler.from_config({"set_alpha_to_zero": False}).set_alpha_to_one
    shown = {"beta_end": 0.5, "beta_start": 0.1, "_use_default_values": ["beta_end", "steps_offset"]}
    assert (DDIMScheduler.from_config(shown).beta_end, DDIMScheduler.from_config(shown).beta_start) == (0.02, 0.1)
    betas = np.linspace(1e-4, 0.02, 100)
    trained = DDPMScheduler.from_config({"trained_betas": betas, "num_train_timesteps": 100})
    assert trained.alpha_bar[-1] == pytest.approx(np.prod(1 - betas))


def test_reading_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no scheduler_config\.json in .*nowhere"):
        DDIMScheduler.from_pretrained(tmp_path / "nowhere")
    path = tmp_path / "scheduler_config.json"
    for text, message in {
        "{": "Expecting",
        "[]": "expected a JSON object, got list",
        '{"beta_schedule": "cubic"}': "beta_schedule must be one of",
        '{"trained_betas": [0.1]}': "trained_betas has 1 entries but num_train_timesteps is 1000",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"scheduler_config\.json: .*{message}"):
            DDIMScheduler.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"unknown scheduler class 'Nope'; known: .*DDIMScheduler"):
        Scheduler.from_config({"_class_name": "Nope"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed(DDIMScheduler):
    """An algorithm that fixes two common settings."""

    beta_schedule: str = "squaredcos_cap_v2"
    absent = ("beta_start", "beta_schedule")


def test_settings_that_an_algorithm_fixes() -> None:
    fixed = Fixed.from_config(SD15 | {"prediction_type": "sample"})
    assert fixed.beta_schedule == "squaredcos_cap_v2"
    assert (fixed.ignored["beta_start"], fixed.ignored["beta_schedule"]) == (0.00085, "scaled_linear")
    assert not {"beta_start", "beta_schedule"} & set(Fixed().to_json())
    assert fixed.replace(beta_end=0.03).beta_end == 0.03
    back = DDIMScheduler.from_config(fixed)
    assert (back.beta_start, back.beta_schedule, back.prediction_type) == (0.00085, "scaled_linear", "sample")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIMScheduler(prediction_type="noise"), r"prediction_type must be one of \['epsilon'.* got 'noise'"),
        (lambda: DDIMScheduler(timestep_spacing="odd"), r"timestep_spacing must be one of \['leading'"),
        (lambda: DPMSolverMultistepScheduler(solver_order=4), r"solver_order must be one of \[1, 2, 3\], got 4"),
        (lambda: DPMSolverMultistepScheduler(algorithm_type="dpmsolver"), "set final_sigmas_type='sigma_min'"),
        (
            lambda: DPMSolverMultistepScheduler(
                algorithm_type="sde-dpmsolver", solver_order=3, final_sigmas_type="sigma_min"
            ),
            "orders 1 and 2, got solver_order=3",
        ),
        (
            lambda: EulerDiscreteScheduler(use_karras_sigmas=True, use_beta_sigmas=True),
            r"only one of .* can be set, got \['use_karras_sigmas', 'use_beta_sigmas'\]",
        ),
        (lambda: UniPCMultistepScheduler(lower_order_final=False), "set lower_order_final=True"),
        (lambda: UniPCMultistepScheduler(predict_x0=False), "set final_sigmas_type='sigma_min'"),
        (lambda: DDPMScheduler(variance_type="both"), "variance_type must be one of .*'learned', 'learned_range'"),
        (lambda: Fixed(beta_start=0.1), "Fixed has no setting beta_start; it has num_train_timesteps, beta_end"),
        (lambda: Scheduler.from_config({"_class_name": "VQDiffusionScheduler"}), "needs the setting num_vec_classes"),
        (lambda: DDIMScheduler.from_config({}, solver_order=2), "DDIMScheduler has no setting solver_order; it has"),
    ],
)
def test_impossible_configurations(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


ZERO_SNR = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")


@pytest.mark.parametrize(
    ("scheduler", "request_", "message"),
    [
        (DDIMScheduler(), {}, "exactly one of num_inference_steps, timesteps, sigmas; got none"),
        (DDIMScheduler(), {"num_inference_steps": 5, "timesteps": [1]}, "num_inference_steps=5, but timesteps give 1"),
        (DDIMScheduler(), {"num_inference_steps": 1001}, r"from 1 to 1000 \(num_train_timesteps\), got 1001"),
        (DDIMScheduler(), {"num_inference_steps": 0}, "from 1 to 1000 .* got 0"),
        (DDIMScheduler(), {"num_inference_steps": 2.5}, "must be an integer .* got 2.5"),
        (DDIMScheduler(), {"timesteps": [10, 20]}, "timesteps must descend, but entry 1 is 20 after 10"),
        (DDIMScheduler(), {"timesteps": [20, 20]}, "timesteps must descend, but entry 1 is 20 after 20"),
        (DDIMScheduler(), {"timesteps": [1000, 20]}, "timesteps must lie between 0 and 999, got 1000"),
        (DDIMScheduler(), {"timesteps": []}, "non-empty flat list"),
        (DDIMScheduler(), {"sigmas": [2.0, 1.0, 0.0]}, "give timesteps= instead of sigmas="),
        (EulerDiscreteScheduler(), {"sigmas": [1.0, 2.0, 0.0]}, "sigmas must descend, but entry 1 is 2 after 1"),
        (EulerDiscreteScheduler(), {"sigmas": [1.0]}, "one entry per step and the final one"),
        (EulerDiscreteScheduler(use_karras_sigmas=True), {"timesteps": [5, 1]}, "cannot take timesteps="),
        (
            DDIMScheduler(),
            {"num_inference_steps": 5, "strength": 0.1},
            "leaves none to run; use a strength of at least 0.2",
        ),
        (DDIMScheduler(), {"num_inference_steps": 5, "strength": 1.1}, r"strength must lie in \(0, 1\], got 1.1"),
        (DDIMScheduler(), {"num_inference_steps": 5, "s_churn": 1}, "no option s_churn; its options: .*eta"),
        (DDIMScheduler(), {"num_inference_steps": 5, "eta": 1.5}, "eta must lie between 0 .* and 1 .*, got 1.5"),
        (DDIMScheduler(), {"num_inference_steps": 5, "eta": -0.1}, "eta must lie between 0 .* and 1 .*, got -0.1"),
        (RePaintScheduler(eta=2.0), {"num_inference_steps": 20}, "eta must lie between 0 .* and 1 .*, got 2"),
        (DDIMScheduler(beta_end=2.0), {"num_inference_steps": 5}, "betas .* beta_end=2.0 run from 0.0001 to 2$"),
        (
            EulerDiscreteScheduler(trained_betas=(-0.5, 0.1), num_train_timesteps=2),
            {"num_inference_steps": 2},
            "betas must lie between 0 and 1; those of trained_betas run from -0.5 to 0.1",
        ),
        (DDIMScheduler(), {"num_inference_steps": 5, "denoising_end": 1.2}, "strictly between 0 and 1, got 1.2"),
        (
            DDIMScheduler(),
            {"num_inference_steps": 5, "denoising_end": 0.01},
            "leaves no step: the first timestep is 800",
        ),
        (DDIMScheduler(), {"num_inference_steps": 5, "denoising_start": 0.5, "strength": 0.5}, "not both"),
        (DDIMScheduler(steps_offset=1), {"num_inference_steps": 1000}, "need timestep 1000, but the last one is 999"),
        (ZERO_SNR, {"num_inference_steps": 5}, r"timestep 999 is pure noise \(zero terminal SNR\).*'v_prediction'"),
        (PNDMScheduler(), {"num_inference_steps": 3}, "needs at least 4 steps to start, 3 are to be run"),
        (DPMSolverMultistepScheduler(timestep_spacing="leading"), {"num_inference_steps": 1000}, "use fewer steps"),
        (LCMScheduler(), {"num_inference_steps": 51}, "leave 50 timesteps, fewer than the 51 steps"),
        (
            LCMScheduler(),
            {"num_inference_steps": 4, "grid_strength": 0.05},
            "leave 2 .* grid_strength of at",
        ),
        (LCMScheduler(), {"num_inference_steps": 4, "original_inference_steps": 2000}, "between 1 and 1000, got 2000"),
        (Scheduler(), {"num_inference_steps": 4}, "does not sample; use one of"),
    ],
)
def test_impossible_requests(scheduler: Scheduler, request_: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        scheduler.table(**request_)
