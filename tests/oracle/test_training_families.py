"""One training step of DeepFloyd IF, Kandinsky 2.2 and Würstchen against PyTorch: the loss, every gradient, the update,
and that PyTorch diffusers opens what is saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffuse_jax.torch_backend.training_report import verdict

cases = pytest.importorskip("tests.oracle.family_cases", reason="needs PyTorch diffusers and transformers")
from tests.oracle.training_steps import LOSS, PARAMETERS  # noqa: E402

QUICK = ("DeepFloyd IF I, DreamBooth", "Inpainting, DreamBooth and masks", "Kandinsky 2.2 prior", "Würstchen prior")
"""In the ordinary suite. It has the decoder's kind of UNet in the first of them, and its parts in the tests of the
scripts."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in cases.CASES]
)
def test_one_step(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    compared, loss, parameters = cases.CASES[name](tmp_path, rng)
    assert compared.ok, verdict(compared)
    assert loss < LOSS, f"the loss differs by {loss:.1e}"
    assert parameters < PARAMETERS, f"the parameters differ by {parameters:.1e}"


def test_a_decoder_needs_an_image_encoder(tmp_path: Path) -> None:
    decoder = cases.folders.kandinsky_decoder(tmp_path, **cases.ONE_LEVEL)
    with pytest.raises(ValueError, match="KandinskyV22Pipeline, which has no image_encoder; give --pretrained_prior"):
        cases.steps.opened(decoder, ("unet",))
