"""The network that judges samples, against MobileNetV2 written with ``torch.nn``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from benchmarks import mobilenet_v2 as ours
from diffuse_jax.weights.torch_file import read_torch


def conv_norm(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        parts: list[nn.Module] = [conv_norm(inputs, hidden, 1)] if expansion != 1 else []
        parts += [conv_norm(hidden, hidden, 3, stride, hidden), nn.Conv2d(hidden, outputs, 1, bias=False)]
        self.conv = nn.Sequential(*parts, nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def mobilenet() -> nn.Sequential:
    """Figure 4d and table 2 of Sandler et al. 2018, with the names of torchvision's file."""
    layers: list[nn.Module] = [conv_norm(3, 32, 3, stride=2), InvertedResidual(32, 16, 1, 1)]
    for inputs, outputs, count, stride in (
        (16, 24, 2, 2), (24, 32, 3, 2), (32, 64, 4, 2), (64, 96, 3, 1), (96, 160, 3, 2), (160, 320, 1, 1)
    ):  # fmt: skip
        layers.append(InvertedResidual(inputs, outputs, stride, 6))
        layers += [InvertedResidual(outputs, outputs, 1, 6) for _ in range(count - 1)]
    return nn.Sequential(*layers, conv_norm(320, 1280, 1))


def theirs(state: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Features of normalised images ``[B,H,W,3]``; every tensor of ``state`` must be used."""
    net = mobilenet().eval()
    net.load_state_dict({name.removeprefix("features."): torch.tensor(array) for name, array in state.items()})
    with torch.no_grad():
        return net(torch.tensor(x.transpose(0, 3, 1, 2))).mean((2, 3)).numpy()


def random_state(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Weights and statistics of norms that keep activations in the range where ReLU6 cuts on both sides."""
    return {f"features.{name}": value for name, value in random_numbers(mobilenet(), rng).items()}


def random_numbers(net: nn.Module, rng: np.random.Generator) -> dict[str, np.ndarray]:
    state = {}
    for name, tensor in net.state_dict().items():
        shape, kind = tuple(tensor.shape), name.rsplit(".", 1)[1]
        if kind == "num_batches_tracked":
            value = np.zeros(shape, np.int64)
        elif len(shape) == 4:
            value = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        else:
            value = rng.uniform(0.5, 1.5, shape) if kind in ("weight", "running_var") else rng.normal(0, 0.5, shape)
        state[name] = value if kind == "num_batches_tracked" else value.astype(np.float32)
    return state


@pytest.mark.parametrize("size", [64, 33])
def test_equals_torch_with_random_weights(size: int, rng: np.random.Generator) -> None:
    state = random_state(rng)
    x = rng.standard_normal((2, size, size, 3), np.float32)
    wanted = theirs(state, x)
    assert wanted.std() > 0.1, "features that are all alike would prove nothing"
    np.testing.assert_allclose(ours.apply(ours.fold_norms(state), x), wanted, atol=2e-4 * wanted.std(), rtol=1e-4)


def test_equals_torch_with_trained_weights(rng: np.random.Generator) -> None:
    try:
        params = ours.load()
    except RuntimeError as error:
        pytest.skip(str(error))
    state = read_torch(ours.CACHE / Path(ours.WEIGHTS).name)
    images = np.repeat(np.repeat(rng.integers(0, 256, (2, 8, 8, 3), np.uint8), 8, 1), 8, 2)
    x = np.asarray(ours.preprocess(images))
    assert x.shape == (2, 160, 160, 3)
    wanted = theirs({name: array for name, array in state.items() if name.startswith("features.")}, x)
    np.testing.assert_allclose(ours.features(params, images, batch=2), wanted, atol=2e-4, rtol=1e-4)


def test_images_are_enlarged_as_pillow_does(rng: np.random.Generator) -> None:
    from PIL import Image

    image = np.repeat(np.repeat(rng.integers(0, 256, (8, 8, 3), np.uint8), 8, 0), 8, 1)
    planes = [Image.fromarray(plane) for plane in image.astype(np.float32).transpose(2, 0, 1) / 255]
    wanted = np.stack([np.asarray(plane.resize((160, 160), Image.Resampling.BICUBIC)) for plane in planes], -1)
    found = np.asarray(ours.preprocess(image[None])[0]) * np.array(ours.DEVIATION) + np.array(ours.MEAN)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
