"""VQ-Diffusion: the chain against matrices written out, laws of the posterior, the run on a device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.schedulers import Scheduler, VQDiffusionScheduler
from diffuse_jax.schedulers.categorical_table import log_posterior

CLASSES = 5
SCHEDULER = VQDiffusionScheduler(num_vec_classes=CLASSES + 1, num_train_timesteps=20)


def matrix(abc: np.ndarray) -> np.ndarray:
    """Eq. 7: entry [j, k] is the probability of going from class k to class j, the mask last."""
    a, b, c = abc
    out = np.full((CLASSES + 1, CLASSES + 1), b) + a * np.eye(CLASSES + 1)
    out[-1], out[:, -1] = c, 0.0
    out[-1, -1] = 1.0
    return out


def predictions(rng: np.random.Generator, *shape: int) -> np.ndarray:
    logits = 2 * rng.standard_normal((*shape, CLASSES))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_pieces_of_the_chain(n: int) -> None:
    assert SCHEDULER.table(n).timesteps.tolist() == list(range(n))[::-1]
    table = SCHEDULER.table(n, as_published=True)
    assert len(table) == n
    assert table.timesteps[0] == 19
    for here, there, between in np.exp(table.log_abc):
        for abc in (here, there, between):
            np.testing.assert_allclose(matrix(abc).sum(0), 1)
        np.testing.assert_allclose(matrix(between) @ matrix(there), matrix(here), atol=1e-12)
    np.testing.assert_allclose(np.exp(table.log_abc[-1, 1]), [1, 0, 0], atol=1e-29)
    one_by_one = SCHEDULER.table(20).log_abc
    product = np.linalg.multi_dot([matrix(row[2]) for row in np.exp(one_by_one)])
    np.testing.assert_allclose(product, matrix(np.exp(one_by_one[0, 0])), atol=1e-12)


def test_posterior_is_bayes_rule(rng: np.random.Generator) -> None:
    x = np.arange(CLASSES + 1)[None]
    log_p_x0 = predictions(rng, *x.shape)
    for log_abc in SCHEDULER.table(6).log_abc:
        q_here, q_there, q_between = (matrix(abc) for abc in np.exp(log_abc))
        want = np.zeros((1, CLASSES + 1, CLASSES + 1))
        for pixel, now in enumerate(x[0]):
            for x0 in range(CLASSES):
                share = q_between[now] * q_there[:, x0] / q_here[now, x0]
                want[0, pixel] += np.exp(log_p_x0[0, pixel, x0]) * share
        got = np.exp(log_posterior(log_abc, x, log_p_x0))
        np.testing.assert_allclose(got, want, atol=1e-12)
        np.testing.assert_allclose(got.sum(-1), 1)
        assert np.all(got[:, :-1, -1] == 0), "a class never becomes a mask on the way back"
    np.testing.assert_allclose(got[..., :-1], np.exp(log_p_x0), atol=1e-12), "the last step draws from the prediction"


def test_a_run_on_the_device(rng: np.random.Generator) -> None:
    traces = []

    @jax.jit
    def sample(plan, keys, log_p_x0):
        traces.append(1)

        def body(i, x):
            return plan.step(x, i, log_p_x0, keys)

        return jax.lax.fori_loop(0, plan.num_evaluations, body, plan.init(*log_p_x0.shape[:2]))

    image = rng.integers(0, CLASSES, (3, 40))
    certain = jnp.log(jnp.eye(CLASSES)[image] * 0.999 + 0.0002)
    keys = jax.random.split(jax.random.key(0), 3)
    for n in (1, 5, 20):
        x = sample(SCHEDULER.plan(n), keys, certain)
        assert x.dtype == jnp.int32
        assert np.mean(x == image) > 0.97
        alone = sample(SCHEDULER.plan(n), keys[1:2], certain[1:2])
        np.testing.assert_array_equal(alone[0], x[1])
    assert len(traces) == 2, "one for each batch size"


def test_draws_have_the_probabilities_of_the_posterior() -> None:
    plan, i = SCHEDULER.plan(6), 2
    x = jnp.full((1, 20000), CLASSES).at[:, :10000].set(1)
    log_p_x0 = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.2, 0.15, 0.1, 0.05])), (1, 20000, CLASSES))
    drawn = np.asarray(plan.step(x, i, log_p_x0, jax.random.key(0)))[0]
    want = np.exp(np.asarray(plan.log_posterior(x, i, log_p_x0)))[0]
    for half in (slice(0, 10000), slice(10000, None)):
        shares = np.bincount(drawn[half], minlength=CLASSES + 1) / 10000
        np.testing.assert_allclose(shares, want[half][0], atol=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VQDiffusionScheduler(num_vec_classes=1), "counts the mask and at least one class, got 1"),
        (lambda: VQDiffusionScheduler(num_vec_classes=9, alpha_cum_end=0.5), "alpha_cum_end=0.5 .* sum at most 1"),
        (lambda: SCHEDULER.table(21), "from 1 to 20"),
        (lambda: SCHEDULER.table(timesteps=[3, 5]), "timesteps must descend"),
        (lambda: SCHEDULER.plan(5).step(jnp.zeros((1, 4), int), 0, jnp.zeros((1, 4, 6))), r"expected \(1, 4, 5\)"),
        (lambda: SCHEDULER.plan(5).step(jnp.zeros((1, 4), int), 0, jnp.zeros((1, 4, 5))), "needs a key"),
    ],
)
def test_errors(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_configuration() -> None:
    again = Scheduler.from_config(SCHEDULER.to_json())
    assert again == SCHEDULER
    assert again.plan(timesteps=[12, 4]).num_evaluations == 2
