"""The comparison of choices for the shipped model's training, with tiny networks."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import emoji_choices, emoji_loss
from benchmarks.emoji_choices import CHOICES, MODEL, Choice, velocity_errors
from benchmarks.emoji_judge import Data
from diffuse_jax import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffuse_jax.models import UNet2DConditionModel
from diffuse_jax.sharding import make_mesh
from diffuse_jax.training.latent import open_pipeline
from diffuse_jax.training.objective import target
from diffuse_jax.training.times import LogitNormalTimes
from diffuse_jax.weights import resolve
from tests.train.latent_models import SIZE, save_sd

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def data(rng: np.random.Generator) -> Data:
    """A hundred concepts in four styles, each a colour; a quarter is held out."""
    styles = ("noto", "blob", "fluent", "twemoji")
    records = [
        {"label": f"thing {n // 4}", "style": styles[n % 4], "text": [f"a thing {n // 4}", f"thing, {styles[n % 4]}"]}
        for n in range(400)
    ]
    images = np.broadcast_to(rng.integers(0, 256, (400, 1, 1, 3), np.uint8), (400, SIZE, SIZE, 3))
    return Data(records, images, np.arange(400) // 4 % 4 == np.arange(400) % 4)


@pytest.mark.parametrize("name", ["flow", pytest.param("shipped", marks=pytest.mark.slow)])
def test_a_choice_is_trained_for_its_time_and_judged(
    name: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command, by a clock that counts the times it is read: once at the start and once a step."""
    save_sd(tmp_path / "model", fresh=False)
    ticks = itertools.count()
    clock = SimpleNamespace(process_time=lambda: float(next(ticks)), perf_counter=lambda: 0.0)
    trained = {}
    evaluated = emoji_choices.evaluated

    def keep(model: object, params: dict[str, object], *args: object) -> dict[str, float]:
        untrained = evaluated(model, {part: model.params[part] for part in params}, *args)  # type: ignore[attr-defined, arg-type]
        trained.update(params=params, untrained=untrained)
        return evaluated(model, params, *args)  # type: ignore[arg-type]

    stand_ins = {"load_data": lambda _: data, "MODEL": tmp_path / "model", "IMAGES": 64, "time": clock}
    for attribute, value in (stand_ins | {"evaluated": keep}).items():
        monkeypatch.setattr(emoji_choices, attribute, value)
    monkeypatch.setattr(sys, "argv", ["emoji_choices", name, "--seconds", "60", "--output_folder", str(tmp_path)])
    other = {"choice": name, "seed": 1, "budget": 60}
    (tmp_path / "emoji_choices.json").write_text(json.dumps({"rows": [other]}))
    emoji_choices.main()

    before, row = json.loads((tmp_path / "emoji_choices.json").read_text())["rows"]
    assert before == other, "rows of other seeds stay"
    assert (row["choice"], row["seed"], row["steps"], row["cpu_seconds"]) == (name, 0, 60, 60.0)
    bands = [row[band] for band in emoji_choices.BANDS]
    assert min(bands) < row["held-out"] < max(bands)
    for split in ("training", "held-out"):
        assert row[split] < 0.9 * trained["untrained"][split]
    if name == "shipped":  # the other command judges it too
        pipe = open_pipeline(tmp_path / "model", trainable=(), mesh=make_mesh())
        chosen = data.choose(True, 64, 0)
        untrained = emoji_loss.losses(pipe, data, chosen, 0)["mse"]
        pipe = pipe.replace(params={**pipe.params, **trained["params"]})
        assert emoji_loss.losses(pipe, data, chosen, 0)["mse"] < 0.9 * untrained


def test_choices_of_training_are_judged_by_the_same_error() -> None:
    """The same error of the clean sample, a hundredth, is the same error of the velocity for networks of both kinds."""
    shipped = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    clean = jax.random.normal(jax.random.key(1), (64, 2, 2, 1))

    class Wrong:
        """Predicts what the noisy sample would have as target if its clean sample were larger by a hundredth."""

        encoded = staticmethod(lambda models, params, batch: batch)
        begin = staticmethod(lambda models, params, batch, key: (clean, batch))

        def __init__(self, flow: bool) -> None:
            self.flow = flow

        def predict(self, models: object, params: object, batch: object, x: jax.Array, t: jax.Array) -> jax.Array:
            scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0) if self.flow else shipped
            signal = 1 - t / 1000 if self.flow else jnp.sqrt(jnp.asarray(shipped.alpha_bar)[t])
            noise = t / 1000 if self.flow else jnp.sqrt(1 - signal**2)
            x0 = clean + 0.01
            return target(scheduler, x0, (x - signal[:, None, None, None] * x0) / noise[:, None, None, None], t)

    found = []
    for flow in (False, True):
        choice = Choice(about="", times=LogitNormalTimes() if flow else None)
        judged = velocity_errors(Wrong(flow), {}, shipped, choice, {}, {}, jax.random.key(0))  # type: ignore[arg-type]
        t, errors = map(np.asarray, judged)
        np.testing.assert_allclose(errors, 1e-4 / (1 - shipped.alpha_bar[t]), rtol=2e-2)
        found.append(t)
    np.testing.assert_array_equal(*found)


def test_choices_of_training_are_networks() -> None:
    """Each that names a shape has another one than the shipped UNet; bad arguments are refused before any training."""
    unet = UNet2DConditionModel.from_config(resolve(MODEL) / "unet")
    for choice in CHOICES.values():
        shapes = UNet2DConditionModel(unet.config.replace(**choice.unet)).shapes()
        assert (jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, unet.shapes())) == (not choice.unet)
    for flags, said in ((["--seconds", "3"], "at least 30"), (["narrower"], "unknown choices ['narrower']")):
        command = [sys.executable, "-m", "benchmarks.emoji_choices", *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
