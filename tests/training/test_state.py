"""The compiled step, the running average and learning rates, on a two-parameter network."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffuse_jax.training.optimizer import DECAY_SHARE, OPTIMIZERS, learning_rate, make_optimizer, optimizer_from
from diffuse_jax.training.settings import Average, OptimizerSettings
from diffuse_jax.training.settings.run import SCHEDULES
from diffuse_jax.training.state import AVERAGE, TrainState, ema_rate, init_state, make_step

START = {"dense": {"kernel": np.full((2, 1), 0.5, np.float32), "bias": np.zeros((1,), np.float32)}}


def line_loss(trainable: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    noise = 0.1 * jax.random.normal(key, (batch.shape[0], 1))
    wanted = batch @ frozen["slope"] + noise
    error = batch @ trainable["dense"]["kernel"] + trainable["dense"]["bias"].reshape(1, 1) - wanted
    return jnp.square(error).mean(), {"worst": jnp.abs(error).max()}


def batches(n: int) -> np.ndarray:
    return np.random.default_rng([7, n]).standard_normal((8, 2)).astype(np.float32)


FROZEN = {"slope": np.array([[2.0], [-1.0]], np.float32)}


def leaves(state: TrainState) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def test_half_precision_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'w'.*float16.*float32"):
        init_state({"w": np.ones(2, np.float16)}, optax.sgd(1.0), use_ema=False)


def test_average_forgets_the_start_and_then_moves_slowly() -> None:
    rates = [float(ema_rate(jnp.int32(n), Average(decay=0.99))) for n in (1, 2, 3, 10, 10**6)]
    np.testing.assert_allclose(rates, [0, 2 / 11, 3 / 12, 10 / 19, 0.99], rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "piecewise_constant"])
def test_rates_rise_to_the_peak_and_end_as_named(name: str) -> None:
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
    peak = {"prodigy": 1.0, "muon": 0.1}.get(name, 0.02)  # Muon's steps in two numbers are a quarter of Adam's
    optimizer = make_optimizer(name, learning_rate("linear", peak, 0, 300), weight_decay=0.0)
    state, step = init_state(START, optimizer, use_ema=False), make_step(line_loss, optimizer, seed=0)
    for n in range(300):
        state, _ = step(state, FROZEN, batches(n)[None])
    np.testing.assert_allclose(state.params["dense"]["kernel"], FROZEN["slope"], atol=0.2)


def still_loss(trainable: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The line without noise, so that accumulated batches can be compared with the whole batch."""
    error = batch @ trainable["dense"]["kernel"] + trainable["dense"]["bias"].reshape(1, 1) - batch @ frozen["slope"]
    return jnp.square(error).mean(), {}


def test_gradient_accumulation_equals_the_whole_batch() -> None:
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


def test_average_without_a_ramp_has_its_decay_at_once() -> None:
    assert [float(ema_rate(jnp.int32(n), Average(decay=0.75, ramp=False))) for n in (1, 2, 9)] == [0.75] * 3


def test_a_loss_reads_the_average_before_the_step() -> None:
    def loss(trainable: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return (trainable["w"] * batch).sum(), {"seen": frozen[AVERAGE]["w"]}

    average = Average(decay=0.5, ramp=False)
    state = init_state({"w": jnp.float32(8.0)}, optax.sgd(1.0), use_ema=True)
    step = make_step(loss, optax.sgd(1.0), seed=0, average=average)
    seen = []
    for _ in range(3):
        state, metrics = step(state, {}, jnp.ones((1, 4)))  # w falls by 4
        seen.append(float(metrics["seen"]))
    assert seen == [8, (8 + 4) / 2, (6 + 0) / 2]


def test_muon_makes_the_momentum_of_kernels_orthogonal() -> None:
    shapes = {"conv": {"kernel": (3, 3, 4, 6), "bias": (6,)}, "table": {"embedding": (8, 4)}, "to_q": {"down": (8, 2)}}
    rng = np.random.default_rng(0)
    draw = lambda: jax.tree.map(lambda s: rng.standard_normal(s).astype(np.float32), shapes, is_leaf=_is_shape)
    params, gradients = draw(), [draw(), draw()]
    optimizer = make_optimizer("muon", lambda _: 0.1, max_grad_norm=None, weight_decay=0.0)
    adam = optax.nadamw(0.1, weight_decay=0.0)
    state, other = optimizer.init(params), adam.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        as_adam, other = adam.update(gradient, other, params)
    for network, name in (("conv", "kernel"), ("to_q", "down")):
        first, second = (np.float64(g[network][name]).reshape(-1, shapes[network][name][-1]) for g in gradients)
        average = (0.95 * 0.05 * first + 0.05 * second) / (1 - 0.95**3)
        wanted = -0.1 * 0.2 * max(first.shape) ** 0.5 * newton_schulz(0.95 * average + 0.05 * second / (1 - 0.95**2))
        np.testing.assert_allclose(updates[network][name].reshape(first.shape), wanted, atol=1e-5)
    for network, name in (("conv", "bias"), ("table", "embedding")):
        np.testing.assert_allclose(updates[network][name], as_adam[network][name], rtol=1e-5)


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """Five steps of the quintic iteration, by singular values: what Muon makes of a matrix."""
    u, s, v = np.linalg.svd(x, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return (u * s) @ v


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


@pytest.mark.parametrize("name", sorted({*OPTIMIZERS} - {"prodigy"}))  # whose rate is what it finds
def test_weights_decay_by_the_rate(name: str) -> None:
    optimizer = make_optimizer(name, lambda _: 0.1, weight_decay=0.01)
    weights = {"w": jnp.full((4, 4), 2.0)}
    updates, _ = optimizer.update({"w": jnp.zeros((4, 4))}, optimizer.init(weights), weights)
    np.testing.assert_allclose(updates["w"], -0.1 * 0.01 * 2.0, rtol=1e-5)


def test_some_parameters_may_have_a_separate_learning_rate() -> None:
    """Adam's first update has the size of the rate, whatever the gradient; clipping still uses all gradients."""
    rates = {"^text_encoder/": lambda _: 0.01, "attn2": lambda _: 0.001, "unet/.*/to_k": lambda _: 0.5}
    optimizer = make_optimizer("adamw", lambda _: 0.1, rates=rates, weight_decay=0.0)
    params = {"unet": {"w": jnp.ones(3), "attn2": {"to_k": jnp.ones(3)}}, "text_encoder": {"w": jnp.ones(3)}}
    updates, _ = optimizer.update(jax.tree.map(lambda x: 5 * x, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["unet"]["w"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["unet"]["attn2"]["to_k"], -0.001, rtol=1e-5)
    np.testing.assert_allclose(updates["text_encoder"]["w"], -0.01, rtol=1e-5)


def test_rules_of_a_run_give_learning_rates() -> None:
    params = {"unet": {"conv": jnp.ones(3), "attn2": jnp.ones(3)}, "text_encoder": {"w": jnp.ones(3)}}
    settings = OptimizerSettings(
        learning_rate=0.1, text_encoder_lr=0.01, lr_rules=("attn2=1e-3",), adam_weight_decay=0.0, max_grad_norm=None
    )
    optimizer, rate = optimizer_from(settings, 10, 1, params)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert float(rate(0)) == pytest.approx(0.1)
    for value, expected in zip(leaves(updates), (-0.01, -0.001, -0.1), strict=True):  # by name
        np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (("attn2",), r"'attn2' must be REGEX=RATE"),
        (("attn2=fast",), r"'attn2=fast' must be REGEX=RATE"),
        (("=1e-3",), r"'=1e-3' must be REGEX=RATE"),
        (("attn[=1e-3",), r"'attn\[=1e-3' must be REGEX=RATE"),
        (("attn2=-1",), r"'attn2=-1' must be REGEX=RATE"),
        (("attn2=nan",), r"'attn2=nan' must be REGEX=RATE"),
        (("attn2=1", "attn2=2"), r"two rates for 'attn2', 1 and 2"),
        (("attn3=1",), r"'attn3' applies to no parameter .* unet/attn2, unet/conv"),
        (("unet=1", "attn2=2"), r"'attn2' applies to no parameter \(the first rule"),
    ],
)
def test_rules_without_sense_are_refused(rules: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer_from(OptimizerSettings(lr_rules=rules), 10, 1, {"unet": {"conv": jnp.ones(3), "attn2": jnp.ones(3)}})


def test_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"adamw.*got 'sgdx'"):
        make_optimizer("sgdx", lambda _: 0.1)
