"""The consistency decoder's two steps."""

from __future__ import annotations

import numpy as np
import pytest

from diffuse_jax.schedulers import ConsistencyDecoderScheduler


def test_two_steps() -> None:
    table = ConsistencyDecoderScheduler().table(2)
    assert table.timesteps.tolist() == [1008, 512]
    np.testing.assert_allclose(table.levels, [*ConsistencyDecoderScheduler().train_levels()[[1008, 512]], (1, 0)])
    assert table.init_scale == table.levels[0, 1]
    # A row goes to the clean sample and back to the next level; the last one stays there.
    x0 = table.to_x0[1]
    np.testing.assert_allclose(table.rows[1, 0, [0, 2]], x0)
    assert (table.rows[0, 0, -1], table.rows[1, 0, -1]) == (table.levels[1, 1], 0)


def test_preconditioning() -> None:
    """Karras et al. 2022, table 1: without noise the network is not used; input and target have variance 1."""
    table = ConsistencyDecoderScheduler(sigma_data=0.7).table(timesteps=[1000, 600, 2])
    alpha, sigma = table.levels[:-1].T
    np.testing.assert_allclose((table.input_scale**2) * ((alpha * 0.7) ** 2 + sigma**2), 1)
    # x0 = c_skip x + c_out F with x0 of spread sigma_data: the variance that c_skip x leaves is that of c_out F.
    left = 0.7**2 * (1 - table.to_x0[:, 0] * alpha) ** 2 + (table.to_x0[:, 0] * sigma) ** 2
    np.testing.assert_allclose(table.to_x0[:, 1] ** 2, left)


@pytest.mark.parametrize(
    "scheduler", [ConsistencyDecoderScheduler(), ConsistencyDecoderScheduler(num_train_timesteps=9)]
)
def test_other_steps_are_given_outright(scheduler: ConsistencyDecoderScheduler) -> None:
    n = 2 if scheduler.num_train_timesteps == 9 else 3
    with pytest.raises(
        ValueError, match=f"two steps, timesteps 1008 and 512, got num_inference_steps={n} of .*timesteps="
    ):
        scheduler.table(n)
    assert scheduler.table(timesteps=[8, 4, 1]).timesteps.tolist() == [8, 4, 1]
