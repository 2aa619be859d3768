"""Würstchen's networks and pipelines against PyTorch diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from diffuse_jax import models

wuerstchen = pytest.importorskip("tests.oracle.wuerstchen", reason="needs PyTorch diffusers and transformers")
from tests.oracle.comparisons import channel_first, channel_last  # noqa: E402

torch = wuerstchen.torch

ACCURACY = 2e-5
"""Largest difference of a network's outputs, relative to their standard deviation."""


def same(ours: Any, wanted: np.ndarray) -> None:
    assert wanted.std() > 0.1
    assert np.abs(np.asarray(ours) - wanted).max() <= ACCURACY * wanted.std()


def test_the_prior(tmp_path: Path, rng: np.random.Generator) -> None:
    module = wuerstchen.network("WuerstchenPrior")
    module.save_pretrained(tmp_path)
    model, params = models.WuerstchenPrior.from_pretrained(tmp_path)
    x, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 5, 4), (2, 7, 32)))
    for times in (np.float32([0.3, 0.96]), np.float32([1.0, 1.0])):
        with torch.no_grad():
            wanted = channel_last(module(channel_first(x), torch.tensor(times), torch.tensor(c)))
        same(jax.jit(lambda p, t: model.apply({"params": p}, x, t, c))(params, times), wanted)


@pytest.mark.parametrize("size", [(16, 24), (24, 8)])
def test_the_decoder(size: tuple[int, int], tmp_path: Path, rng: np.random.Generator) -> None:
    """The map is enlarged for one level and made smaller for another."""
    module = wuerstchen.network("WuerstchenDiffNeXt")
    module.save_pretrained(tmp_path)
    model, params = models.WuerstchenDiffNeXt.from_pretrained(tmp_path)
    shapes = ((2, *size, 4), (2, 5, 3, 4), (2, 7, 32))
    x, effnet, c = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    times = np.float32([0.3, 0.96])
    with torch.no_grad():
        wanted = module(channel_first(x), torch.tensor(times), channel_first(effnet), torch.tensor(c))
    same(jax.jit(lambda p: model.apply({"params": p}, x, times, effnet, c))(params), channel_last(wanted))


@pytest.mark.parametrize("changes", [{}, {"levels": 3, "up_down_scale_factor": 1, "in_channels": 4}])
def test_the_autoencoder(changes: dict[str, Any], tmp_path: Path, rng: np.random.Generator) -> None:
    module = wuerstchen.vqgan(**changes)
    module.save_pretrained(tmp_path / "theirs")
    model, params = models.PaellaVQModel.from_pretrained(tmp_path / "theirs")
    images = rng.uniform(0, 1, (2, 12, 16, model.config.in_channels)).astype(np.float32)
    run = lambda name, *args, **options: model.apply({"params": params}, *args, method=name, **options)
    with torch.no_grad():
        z = module.encode(channel_first(images)).latents
        plain, quantized = (module.decode(z, force_not_quantize=keep).sample for keep in (True, False))
    latents = run("encode", images)
    same(latents, channel_last(z))
    same(run("decode", channel_last(z)), channel_last(plain))
    same(run("decode", channel_last(z), quantize=True), channel_last(quantized))
    assert np.abs(channel_last(plain - quantized)).max() > 0.1
    assert latents.shape == (2, 12 // model.config.scale, 16 // model.config.scale, 4)

    model.save_pretrained(tmp_path / "ours", params)
    again, found = type(module).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not found["missing_keys"], found
    for key, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_configurations_that_cannot_be_are_refused() -> None:
    decoder = models.WuerstchenDiffNeXtConfig.from_json(wuerstchen.DECODER)
    for config, changes, message in [
        (decoder, {"nhead": (-1, 2)}, "nhead has 2 entries for the 3 levels"),
        (decoder, {"level_config": ("CT", "CTX", "CTA")}, "unknown block 'X' in level_config; known: C, T, A"),
        (decoder, {"nhead": (-1, 3, 4)}, "16 channels cannot be split into nhead=3 heads"),
        (decoder, {"kernel_size": 2}, "kernel_size must be odd, got 2"),
        (decoder, {"c_out": 5}, "c_in and c_out must be equal, got 4 and 5"),
        (decoder, {"level_config": ("CT" * 200, "C", "C")}, "at most 192"),
        (models.WuerstchenPriorConfig(), {"nhead": 7}, "1280 channels cannot be split into nhead=7 heads"),
        (models.PaellaVQConfig(), {"embed_dim": 4, "levels": 4}, "embed_dim=4 cannot be halved for 4 levels"),
    ]:
        with pytest.raises(ValueError, match=message):
            config.replace(**changes)
    model = models.WuerstchenDiffNeXt(decoder)
    inputs = model.example_inputs() | {"sample": jax.ShapeDtypeStruct((1, 8, 12, 4), np.float32)}
    with pytest.raises(ValueError, match=r"multiples of 8, got \(8, 12\)"):
        jax.eval_shape(lambda p, i: model.apply({"params": p}, **i), model.shapes(), inputs)
