"""LCM: which timesteps of the distillation are chosen, by both published rules; what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffuse_jax.schedulers import LCMScheduler

# 1000 training timesteps, 50 of the distillation: (steps, strength) -> every k-th one, or evenly spread.
CHOSEN = {
    (1, 1.0): ([999], [999]),
    (2, 1.0): ([999, 499], [999, 499]),
    (3, 1.0): ([999, 679, 359], [999, 679, 339]),
    (4, 1.0): ([999, 759, 519, 279], [999, 759, 499, 259]),
    (5, 1.0): ([999, 799, 599, 399, 199], [999, 799, 599, 399, 199]),
    (8, 1.0): ([999, 879, 759, 639, 519, 399, 279, 159], [999, 879, 759, 639, 499, 379, 259, 139]),
    (4, 0.5): ([499, 379, 259, 139], [499, 379, 259, 139]),
}


@pytest.mark.parametrize(("n", "strength"), CHOSEN)
def test_timesteps(n: int, strength: float) -> None:
    strided, spread = CHOSEN[n, strength]
    assert LCMScheduler().table(n, grid_strength=strength, strided=True).timesteps.tolist() == strided
    assert LCMScheduler().table(n, grid_strength=strength).timesteps.tolist() == spread


def test_the_number_of_distilled_steps() -> None:
    assert LCMScheduler().table(4, original_inference_steps=100).timesteps[0] == 999
    by_option = LCMScheduler().table(30, original_inference_steps=100)
    by_setting = LCMScheduler(original_inference_steps=100).table(30)
    np.testing.assert_array_equal(by_option.rows, by_setting.rows)
    assert LCMScheduler(num_train_timesteps=500).table(4, strided=True).timesteps.tolist() == [499, 379, 259, 139]


def test_a_list_entered_late_still_ends_clean() -> None:
    for name in ("strength", "grid_strength"):
        table = LCMScheduler().table(timesteps=[999, 759, 499, 259], **{name: 0.5})
        assert table.timesteps.tolist() == [499, 259]
        assert table.rows[0, 0, -1] > 0
        assert table.rows[1, 0, -1] == 0


@pytest.mark.parametrize("strength", [0.0, 1.5, float("nan")])
def test_a_share_of_the_grid_is_a_share(strength: float) -> None:
    with pytest.raises(ValueError, match=r"grid_strength must (lie in \(0, 1\]|be a finite number)"):
        LCMScheduler().table(4, grid_strength=strength)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"num_inference_steps": 51}, "leave 50 timesteps, fewer than the 51 steps asked for; use at most 50 steps$"),
        (
            {"num_inference_steps": 4, "grid_strength": 0.05},
            "leave 2 .* use at most 2 steps, or a grid_strength of at .* 0.08",
        ),
        ({"num_inference_steps": 4, "grid_strength": 0.01}, "leave 0 timesteps"),
        ({"num_inference_steps": 4, "original_inference_steps": 2000}, "between 1 and 1000, got 2000"),
        ({"num_inference_steps": 4, "original_inference_steps": 0}, "between 1 and 1000, got 0"),
        ({"timesteps": [999, 499], "grid_strength": 0.4}, "strength=0.4 of 2 steps leaves none to run"),
        ({"sigmas": [2.0, 1.0, 0.0]}, "give timesteps= instead of sigmas="),
    ],
)
def test_impossible_requests(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LCMScheduler().table(**request_)
