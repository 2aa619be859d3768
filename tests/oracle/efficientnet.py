"""Würstchen's image encoder written with ``torch.nn``, with the names of the published file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

STAGES = ((True, 1, 24, 2, 1), (True, 4, 48, 4, 2), (True, 4, 64, 4, 2),
          (False, 4, 128, 6, 2), (False, 6, 160, 9, 1), (False, 6, 256, 15, 2))  # fmt: skip
"""Table 4 of Tan and Le 2021: fused, expansion, channels, layers, stride."""
TINY = tuple(
    (fused, grow, 4 + 2 * i, 2 if i % 2 == 0 else 1, step) for i, (fused, grow, _, _, step) in enumerate(STAGES)
)


def conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, active: bool = True) -> Any:
    layers = [nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)]
    layers += [nn.BatchNorm2d(outputs, eps=1e-3), *([nn.SiLU()] if active else [])]
    return nn.Sequential(*layers)


class Squeeze(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Any) -> Any:
        mean = nn.functional.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.fc2(nn.functional.silu(self.fc1(mean))))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, fused: bool) -> None:
        super().__init__()
        wide = inputs * expansion
        if fused and expansion == 1:
            parts = [conv(inputs, outputs, 3, stride)]
        elif fused:
            parts = [conv(inputs, wide, 3, stride), conv(wide, outputs, 1, active=False)]
        else:
            middle = conv(wide, wide, 3, stride, wide)
            parts = [conv(inputs, wide, 1), middle, Squeeze(wide, max(1, inputs // 4))]
            parts.append(conv(wide, outputs, 1, active=False))
        self.block, self.residual = nn.Sequential(*parts), stride == 1 and inputs == outputs

    def forward(self, x: Any) -> Any:
        return x + self.block(x) if self.residual else self.block(x)


class Encoder(nn.Module):
    def __init__(self, channels: int, stem: int, stages: Sequence[Any], last: int) -> None:
        super().__init__()
        layers, width = [conv(3, stem, 3, 2)], stem
        for fused, expansion, outputs, repeats, stride in stages:
            blocks = [Block(width, outputs, stride, expansion, fused)]
            blocks += [Block(outputs, outputs, 1, expansion, fused) for _ in range(repeats - 1)]
            layers.append(nn.Sequential(*blocks))
            width = outputs
        self.backbone = nn.Sequential(*layers, conv(width, last, 1))
        self.mapper = nn.Sequential(nn.Conv2d(last, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Any) -> Any:
        return self.mapper(self.backbone(x))


def lively(module: Any) -> Any:
    """With random statistics of the norms, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif name.endswith(("running_mean", "bias")):
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return module.eval()


def tiny(channels: int) -> Any:
    """A narrow one with a block or two in each stage."""
    torch.manual_seed(0)
    return lively(Encoder(channels, 4, TINY, 12))


def whole() -> Any:
    """The published one."""
    torch.manual_seed(0)
    return lively(Encoder(16, 24, STAGES, 1280))
