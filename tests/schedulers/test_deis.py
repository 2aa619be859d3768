"""DEIS: order 1 is DDIM, the order of accuracy, how a run ends."""

from __future__ import annotations

import numpy as np
import pytest

from diffuse_jax.schedulers import DDIMScheduler, DEISMultistepScheduler
from diffuse_jax.schedulers.table import transfer
from tests.schedulers.test_multistep import gaussian_error

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_order_one_is_ddim() -> None:
    table = DEISMultistepScheduler(**SD, solver_order=1).table(7)
    ddim = DDIMScheduler(**SD, clip_sample=False).table(timesteps=table.timesteps)
    np.testing.assert_allclose(table.rows[:-1, 0], ddim.rows[:-1, 0], atol=1e-12)


def test_steps_carry_constant_noise_to_the_first_training_level() -> None:
    """If the network predicts the same noise everywhere, every order moves along the line that it means."""
    scheduler = DEISMultistepScheduler(**SD, solver_order=3)
    table = scheduler.table(20)
    x, eps = np.random.default_rng(0).standard_normal((2, 1, 5))
    end = table.run(lambda *_: eps, x)[-1]
    np.testing.assert_allclose(end, transfer(x, eps, table.levels[0], scheduler.train_levels()[0]), rtol=1e-9)


def test_orders() -> None:
    """Errors fall by the order's power of two when steps double; order 3 starts with steps of orders 1 and 2."""

    def error(order: int, n: int) -> float:
        scheduler = DEISMultistepScheduler(**SD, solver_order=order)
        sigmas = np.geomspace(14.6, 0.03, n + 1)
        end = sigmas[-1]
        return gaussian_error(scheduler.table(sigmas=sigmas), (1 / np.hypot(1, end), end / np.hypot(1, end)))

    for order in (1, 2):
        assert np.log2(error(order, 80) / error(order, 160)) == pytest.approx(order, abs=0.15)
    assert error(3, 80) < error(2, 80) / 5


def test_other_solvers_names_are_read() -> None:
    scheduler = DEISMultistepScheduler(algorithm_type="dpmsolver++", solver_type="bh2")
    assert (scheduler.algorithm_type, scheduler.solver_type) == ("deis", "logrho")
    with pytest.raises(ValueError, match=r"solver_order must be one of \[1, 2, 3\], got 4"):
        DEISMultistepScheduler(solver_order=4)
    with pytest.raises(ValueError, match=r"algorithm_type must be one of \['deis'\], got 'euler'"):
        DEISMultistepScheduler(algorithm_type="euler")
