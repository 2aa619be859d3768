"""Resampling against PyTorch's, up and down, by both conventions."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.interpolation import weights
from diffuse_jax.models.resampling import bicubic, bicubic_antialiased, bilinear

torch = pytest.importorskip("torch")

SIZES = [(7, 5), (14, 10), (3, 9), (1, 1), (20, 2)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["bilinear", "corners", "bicubic"])
def test_equals_pytorch(mode: str, size: tuple[int, int], rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((2, 7, 5, 3)), jnp.float32)
    options: dict[str, Any] = {"mode": "bilinear", "align_corners": True} if mode == "corners" else {"mode": mode}
    expected = torch.nn.functional.interpolate(torch.tensor(np.asarray(x).transpose(0, 3, 1, 2)), size=size, **options)
    ours = bicubic(x, size) if mode == "bicubic" else bilinear(x, size, align_corners=mode == "corners")
    np.testing.assert_allclose(ours, expected.numpy().transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("size", [(7, 5), (14, 10), (3, 9), (20, 2)])
def test_smoothed_equals_pytorch(size: tuple[int, int], corners: bool, rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 7, 5, 3)).astype(np.float32)
    options: dict[str, Any] = {"mode": "bicubic", "antialias": True, "align_corners": corners}
    given = torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    expected = torch.nn.functional.interpolate(given, size=size, **options).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(bicubic_antialiased(jnp.asarray(x), size, align_corners=corners), expected, atol=1e-5)


@pytest.mark.parametrize("cubic", [False, True])
def test_a_constant_stays_constant(cubic: bool) -> None:
    for old, new in ((1, 4), (5, 3), (6, 13)):
        np.testing.assert_allclose(weights(old, new, cubic=cubic).sum(1), 1, atol=1e-6)
