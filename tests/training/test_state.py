"""The compiled step, the running average, learning rates and checkpoints, on a two-parameter network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffuse_jax.sharding import make_mesh, param_shardings
from diffuse_jax.training.checkpoint import checkpoints, find_checkpoint, load_checkpoint, save_checkpoint
from diffuse_jax.training.loop import place, resume, train
from diffuse_jax.training.optimizer import DECAY_SHARE, OPTIMIZERS, SCHEDULES, learning_rate, make_optimizer
from diffuse_jax.training.state import Average, TrainState, ema_rate, init_state, make_step

START = {"dense": {"kernel": np.full((2, 1), 0.5, np.float32), "bias": np.zeros((1,), np.float32)}}


def line_loss(trainable: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    noise = 0.1 * jax.random.normal(key, (batch.shape[0], 1))
    wanted = batch @ frozen["slope"] + noise
    error = batch @ trainable["dense"]["kernel"] + trainable["dense"]["bias"].reshape(1, 1) - wanted
    return jnp.square(error).mean(), {"worst": jnp.abs(error).max()}


def batches(n: int) -> np.ndarray:
    return np.random.default_rng([7, n]).standard_normal((8, 2)).astype(np.float32)


FROZEN = {"slope": np.array([[2.0], [-1.0]], np.float32)}


def run(folder: Path, steps: int, resume_from: str | None = None, **options: Any) -> TrainState:
    rate = learning_rate("constant", 0.05, 0, 1000)
    optimizer = make_optimizer("adamw", rate)
    mesh = make_mesh(fsdp=2)
    state = resume(folder, resume_from, place(init_state(START, optimizer, use_ema=True), mesh))
    step = make_step(line_loss, optimizer, 3, Average(decay=0.9), param_shardings(state, mesh))
    options = {"logging_steps": 5, "checkpointing_steps": 4, "mesh": mesh} | options
    return train(state, step, FROZEN, batches, output_dir=folder, max_train_steps=steps, rate=rate, **options)


def leaves(state: TrainState) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def test_training_learns_the_line_and_logs_it(tmp_path: Path) -> None:
    state = run(tmp_path, 200, checkpointing_steps=1000)
    np.testing.assert_allclose(state.params["dense"]["kernel"], FROZEN["slope"], atol=0.1)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(5, 201, 5))
    assert {"loss", "worst", "grad_norm", "learning_rate", "steps_per_second"} <= records[0].keys()
    assert records[-1]["loss"] < 0.1 * records[0]["loss"]
    assert checkpoints(tmp_path) == {}


def test_resumed_run_equals_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 11)
    run(tmp_path / "parts", 9)
    parts = run(tmp_path / "parts", 11, "latest")
    assert int(parts.step) == 11
    for a, b in zip(leaves(whole), leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)


def test_oldest_checkpoints_go_first(tmp_path: Path) -> None:
    run(tmp_path, 13, checkpointing_steps=3, checkpoints_total_limit=2)
    assert list(checkpoints(tmp_path)) == [9, 12]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-12"
    assert find_checkpoint(tmp_path, "anything/checkpoint-9") == tmp_path / "checkpoint-9"
    assert find_checkpoint(tmp_path / "another run", str(tmp_path / "checkpoint-9")) == tmp_path / "checkpoint-9"
    with pytest.raises(FileNotFoundError, match="checkpoint-7.*checkpoint-9, checkpoint-12"):
        find_checkpoint(tmp_path, "checkpoint-7")


def test_latest_without_a_checkpoint_starts_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert int(run(tmp_path, 2, "latest").step) == 2
    assert "starting from step 0" in capsys.readouterr().err


def test_checkpoint_keeps_every_bit(tmp_path: Path) -> None:
    state = init_state(
        {"w": np.array([np.pi, 1e-38, -0.0], np.float32)}, make_optimizer("adamw", lambda _: 0.1), use_ema=False
    )
    assert state.ema is None
    back = load_checkpoint(save_checkpoint(tmp_path, state), state)
    for a, b in zip(leaves(state), leaves(back), strict=True):
        np.testing.assert_array_equal(np.frombuffer(a.tobytes(), np.uint8), np.frombuffer(b.tobytes(), np.uint8))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    broken = lambda params, frozen, batch, key: (jnp.sum(params["w"]) * jnp.nan, {})
    optimizer = optax.sgd(1.0)
    step = make_step(broken, optimizer, seed=0)
    state = init_state({"w": np.ones(2, np.float32)}, optimizer, use_ema=False)
    with pytest.raises(FloatingPointError, match="step 5"):
        train(state, step, {}, batches, mesh=make_mesh(), output_dir=tmp_path, max_train_steps=9,
              rate=lambda _: 1.0, logging_steps=5, checkpointing_steps=99)  # fmt: skip


def test_half_precision_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'w'.*float16.*float32"):
        init_state({"w": np.ones(2, np.float16)}, optax.sgd(1.0), use_ema=False)


def test_average_forgets_the_start_and_then_moves_slowly() -> None:
    rates = [float(ema_rate(jnp.int32(n), Average(decay=0.99))) for n in (1, 2, 3, 10, 10**6)]
    np.testing.assert_allclose(rates, [0, 2 / 11, 3 / 12, 10 / 19, 0.99], rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "piecewise_constant"])
def test_rates_rise_to_the_peak_and_end_where_their_name_says(name: str) -> None:
    rate = learning_rate(name, 2.0, 10, 110)
    assert float(rate(10)) == pytest.approx(2.0)
    assert max(float(rate(s)) for s in range(120)) == pytest.approx(2.0)
    falls = name not in ("constant", "constant_with_warmup")
    assert float(rate(110)) == pytest.approx(0.0 if falls else 2.0, abs=1e-6)
    assert float(rate(5)) == pytest.approx(2.0 if name == "constant" else 1.0)


def test_rates_halfway() -> None:
    halves = {"constant": 1, "constant_with_warmup": 1, "linear": 0.5, "cosine": 0.5, "warmup_stable_decay": 1}
    for name, half in halves.items():
        assert float(learning_rate(name, 1.0, 0, 100)(50)) == pytest.approx(half)
    late = learning_rate("warmup_stable_decay", 1.0, 0, 100)
    assert float(late(100 - 50 * DECAY_SHARE)) == pytest.approx(0.5)


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="cosine"):
        learning_rate("sine", 1.0, 0, 10)
    with pytest.raises(ValueError, match="less than max_train_steps"):
        learning_rate("linear", 1.0, 10, 10)
    for rules in ("1:10,x:20,0.1", "", "1:20,0.5:10,0.1"):
        with pytest.raises(ValueError, match="lr_step_rules"):
            learning_rate("piecewise_constant", 1.0, 0, 10, rules=rules)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_learns_the_line(name: str) -> None:
    optimizer = make_optimizer(name, learning_rate("linear", 0.02, 0, 300), weight_decay=0.0)
    state, step = init_state(START, optimizer, use_ema=False), make_step(line_loss, optimizer, seed=0)
    for n in range(300):
        state, _ = step(state, FROZEN, batches(n)[None])
    np.testing.assert_allclose(state.params["dense"]["kernel"], FROZEN["slope"], atol=0.2)


def still_loss(trainable: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The line without noise, so that parts of a batch can be compared with the whole."""
    error = batch @ trainable["dense"]["kernel"] + trainable["dense"]["bias"].reshape(1, 1) - batch @ frozen["slope"]
    return jnp.square(error).mean(), {}


def test_accumulated_parts_make_the_update_of_the_whole_batch() -> None:
    optimizer = make_optimizer("adamw", lambda _: 0.1)
    whole, parts = (init_state(START, optimizer, use_ema=True) for _ in range(2))
    step = make_step(still_loss, optimizer, seed=0)
    for n in range(3):
        whole, one = step(whole, FROZEN, batches(n)[None])
        parts, four = step(parts, FROZEN, batches(n).reshape(4, 2, 2))
        assert float(one["loss"]) == pytest.approx(float(four["loss"]), rel=1e-6)
    for a, b in zip(leaves(whole), leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_average_begins_late_and_keeps_its_limits() -> None:
    late = Average(decay=0.9, min_decay=0.2, update_after_step=5)
    rates = [float(ema_rate(jnp.int32(n), late)) for n in (1, 6, 7, 10**6)]
    np.testing.assert_allclose(rates, [0, 0, 0.2, 0.9], rtol=1e-6)
    warm = Average(decay=0.9999, inv_gamma=1.0, power=0.75)
    assert float(ema_rate(jnp.int32(11), warm)) == pytest.approx(1 - 11**-0.75)
    with pytest.raises(ValueError, match="decay"):
        Average(decay=1.5)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_weights_decay_by_the_rate(name: str) -> None:
    optimizer = make_optimizer(name, lambda _: 0.1, weight_decay=0.01)
    weights = {"w": jnp.full((4, 4), 2.0)}
    updates, _ = optimizer.update({"w": jnp.zeros((4, 4))}, optimizer.init(weights), weights)
    np.testing.assert_allclose(updates["w"], -0.1 * 0.01 * 2.0, rtol=1e-5)


def test_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"adamw.*got 'sgdx'"):
        make_optimizer("sgdx", lambda _: 0.1)
