"""Any configuration of any sampler, any number of steps: tables are finite and ordered, and runs end where they should.

A failure prints the configuration and the blob that repeats it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from diffuse_jax import schedulers
from diffuse_jax.schedulers.configuration import COMMON_CHOICES
from diffuse_jax.schedulers.table import Table
from tests.schedulers.samplers import NAMES, ONE_WAY, ascends, has

NUMBERS: dict[str, st.SearchStrategy[Any]] = {
    "num_train_timesteps": st.sampled_from([100, 1000, 2000]),
    "steps_offset": st.integers(0, 1),
    "clip_sample_range": st.floats(1.0, 5.0),
    "dynamic_thresholding_ratio": st.floats(0.5, 1.0),
    "sample_max_value": st.floats(1.0, 5.0),
    "flow_shift": st.floats(0.3, 6.0),
    "shift": st.floats(0.3, 6.0),
    "eta": st.floats(0.0, 1.0),
    "timestep_scaling": st.floats(1.0, 20.0),
    "sigma_data": st.floats(0.3, 1.0),
    "scaler": st.floats(0.5, 2.0),
    "s": st.floats(0.001, 0.02),
    "rho": st.floats(3.0, 9.0),
}
"""Numeric settings, and values that make sense."""


def values(cls: type[schedulers.Scheduler], field: dataclasses.Field[Any]) -> st.SearchStrategy[Any] | None:
    """Values to try for a setting, or None to leave it alone."""
    allowed = (COMMON_CHOICES | cls.choices).get(field.name)
    if allowed:
        return st.sampled_from(allowed)
    return st.booleans() if isinstance(field.default, bool) else NUMBERS.get(field.name)


@st.composite
def configurations(draw: st.DrawFn, name: str) -> schedulers.Scheduler | None:
    """A scheduler with some settings changed; None where they contradict each other."""
    cls = getattr(schedulers, name)
    changed = draw(st.sets(st.sampled_from([f.name for f in dataclasses.fields(cls) if has(name, f.name)]), max_size=5))
    config = {}
    for field in dataclasses.fields(cls):
        strategy = values(cls, field) if field.name in changed else None
        if strategy is not None:
            config[field.name] = draw(strategy)
    try:
        return cls(**config)
    except ValueError as error:
        event(f"refused: {str(error)[:60]}")
        return None


@pytest.mark.parametrize("name", [*NAMES, "ConsistencyDecoderScheduler"])
def test_any_configuration_and_any_number_of_steps(name: str) -> None:
    refused = []
    steps = st.integers(1, 60) if name in NAMES else st.just(2)

    @settings(max_examples=40)
    @given(data=st.data(), n=steps, strength=st.sampled_from([None, None, 0.3, 1.0]))
    def check(data: st.DataObject, n: int, strength: float | None) -> None:
        scheduler = data.draw(configurations(name))
        if scheduler is None:
            refused.append(True)
            return
        try:
            # By default these follow diffusers where it leaves what their networks say.
            options = {"as_published": True} if name in ("IPNDMScheduler", "LMSDiscreteScheduler") else {}
            table = scheduler.table(n, strength=strength, **options)
        except ValueError as error:
            event(f"impossible: {str(error)[:60]}")
            refused.append(True)
            return
        refused.append(False)
        check_table(name, table, clock=-1 if getattr(scheduler, "invert_sigmas", False) else 1)
        if ends_clean(scheduler, n):
            x0 = np.linspace(-1, 1, 5)[None]
            np.testing.assert_allclose(run_to(table, x0), x0, atol=1e-4)

    check()
    assert np.mean(refused) < 0.9, "hardly any configuration is possible"


def check_table(name: str, table: Table, clock: int) -> None:
    """``clock`` is the direction in which a network's time runs against the noise."""
    for field in ("timesteps", "input_scale", "to_x0", "levels", "rows", "log_variance", "init_scale"):
        assert np.isfinite(getattr(table, field)).all(), field
    assert table.init_scale > 0
    assert np.all(table.levels >= 0)
    assert np.all(table.input_scale > 0)
    if name in ONE_WAY:
        up = -1 if ascends(name) else 1
        with np.errstate(divide="ignore"):
            sigma = table.levels[:, 1] / table.levels[:, 0]
        starts = np.append(True, ~table.inner[:-1])  # evaluations within a step may get other timesteps
        assert np.all(clock * up * np.diff(table.timesteps[starts]) <= 1e-9)
        assert np.all(up * np.diff(np.arctan(sigma)) <= 1e-9), "noise levels go one way"


def ends_clean(scheduler: schedulers.Scheduler, n: int) -> bool:
    """Whether the last step goes to sigma 0, and exactly so."""
    if scheduler.class_name == "LCMScheduler":
        return False  # a little of the last sample stays in the result
    if scheduler.class_name == "ScoreSdeVpScheduler":
        return False  # Euler-Maruyama steps in time are exact only in the limit
    if scheduler.class_name == "PNDMScheduler":
        return False  # repeated and rounded half steps: averages of outputs that mean slightly different images
    if scheduler.class_name == "KarrasEDMScheduler" and (
        scheduler.prediction_type != "sample" or scheduler.corrects_x0
    ):
        return False  # what the output means is preconditioned once more
    if getattr(scheduler, "variance_type", None) in ("fixed_large", "fixed_large_log"):
        return False  # published samplers leave this noise in the result unless the last timestep is 0
    return not scheduler.ascends and bool(scheduler.grid(n, timesteps=None, sigmas=None).target[-1][1] == 0)


def run_to(table: Table, x0: np.ndarray) -> np.ndarray:
    """Run with a network that always sees the same image: wherever the path starts, it has to end there."""
    rng = np.random.default_rng(0)
    rows = iter(zip(table.to_x0, table.input_scale, strict=True))

    def model(x: np.ndarray, t: float) -> np.ndarray:
        (of_sample, of_output), scale = next(rows)
        out = (x0 - of_sample * x / scale) / of_output
        return np.concatenate([out, np.zeros_like(out)], -1) if table.learned_variance else out

    start = table.init_scale * rng.standard_normal(x0.shape)
    return table.run(model, start, list(rng.standard_normal((len(table), *x0.shape))))[-1]
