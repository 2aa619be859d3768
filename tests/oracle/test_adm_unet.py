"""The ADM UNet against a twin in plain torch operations, which learns the structure from the names of the tensors."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.models import ADMUNet, ADMUNetConfig
from diffuse_jax.weights.names import flatten, to_torch, torch_key
from tests.models.filling import random_params

torch = pytest.importorskip("torch")
F = torch.nn.functional


class Twin:
    """Runs a state dict; ``resized`` names the residual blocks that change resolution, which no tensor tells."""

    def __init__(self, state: dict[str, Any], config: ADMUNetConfig, resized: dict[str, str]) -> None:
        self.state, self.config, self.resized = state, config, resized

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.state

    def linear(self, name: str, x: Any) -> Any:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def conv(self, name: str, x: Any, stride: int = 1) -> Any:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state[f"{name}.bias"], stride=stride, padding=weight.shape[-1] // 2)

    def norm(self, name: str, x: Any) -> Any:
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-5)

    def mlp(self, name: str, x: Any) -> Any:
        return self.linear(f"{name}.2", F.silu(self.linear(f"{name}.0", x)))

    def residual(self, name: str, x: Any, emb: Any) -> Any:
        size = {"down": lambda y: F.avg_pool2d(y, 2), "up": lambda y: F.interpolate(y, scale_factor=2)}.get(
            self.resized.get(name, ""), lambda y: y
        )
        h = self.conv(f"{name}.in_layers.2", size(F.silu(self.norm(f"{name}.in_layers.0", x))))
        e = self.linear(f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None]
        if self.config.use_scale_shift_norm:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + e)
        h = self.conv(f"{name}.out_layers.3", F.silu(h))
        x = size(x)
        return h + (self.conv(f"{name}.skip_connection", x) if self.has(f"{name}.skip_connection") else x)

    def attention(self, name: str, x: Any) -> Any:
        B, C, H, W = x.shape
        weight = lambda part: self.state[f"{name}.{part}.weight"].flatten(1)
        qkv = F.linear(self.norm(f"{name}.norm", x).flatten(2).mT, weight("qkv"), self.state[f"{name}.qkv.bias"])
        heads = C // self.config.num_head_channels if self.config.num_head_channels > 0 else self.config.num_heads
        if self.config.use_new_attention_order:  # [all queries, all keys, all values]
            q, k, v = (part.unflatten(2, (heads, -1)) for part in qkv.chunk(3, dim=2))
        else:  # one head after another, each with its query, key and value
            q, k, v = qkv.unflatten(2, (heads, -1)).chunk(3, dim=3)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        out = out.transpose(1, 2).reshape(B, H * W, C)
        return x + F.linear(out, weight("proj_out"), self.state[f"{name}.proj_out.bias"]).mT.unflatten(2, (H, W))

    def block(self, block: str, x: Any, emb: Any) -> Any:
        for name in (f"{block}.{i}" for i in range(3)):
            if self.has(name):
                x = self.conv(name, x)
            elif self.has(f"{name}.in_layers.2"):
                x = self.residual(name, x, emb)
            elif self.has(f"{name}.qkv"):
                x = self.attention(name, x)
            elif self.has(f"{name}.op"):
                x = self.conv(f"{name}.op", x, stride=2)
            elif self.has(f"{name}.conv"):
                x = self.conv(f"{name}.conv", F.interpolate(x, scale_factor=2))
            elif name in self.resized:  # a resize without parameters
                x = F.avg_pool2d(x, 2) if self.resized[name] == "down" else F.interpolate(x, scale_factor=2)
        return x

    def __call__(self, x: Any, t: Any, labels: Any = None) -> Any:
        half = self.config.model_channels // 2
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        emb = self.mlp("time_embed", torch.cat([angles.cos(), angles.sin()], dim=1))
        if self.has("label_emb"):
            emb = emb + self.state["label_emb.weight"][labels]
        elif labels is not None:
            emb = emb + self.mlp("label_emb", labels)
        skips = []
        for i in range(4):
            x = self.block(f"input_blocks.{i}", x, emb)
            skips.append(x)
        x = self.block("middle_block", x, emb)
        for i in range(4):
            x = self.block(f"output_blocks.{i}", torch.cat([x, skips.pop()], dim=1), emb)
        return self.conv("out.2", F.silu(self.norm("out.0", x)))


BASE = ADMUNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), num_heads=2)
CASES = {
    "improved diffusion": (BASE, {}),
    "guided diffusion, classes": (
        BASE.replace(resblock_updown=True, use_scale_shift_norm=True, num_classes=5, out_channels=6),
        {"input_blocks.2.0": "down", "output_blocks.1.2": "up"},
    ),
    "consistency model, real labels": (
        BASE.replace(
            use_new_attention_order=True, attention_dims=2, num_head_channels=16, label_channels=3, conv_resample=False
        ),
        {"input_blocks.2.0": "down", "output_blocks.1.2": "up"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_twin(case: str, rng: np.random.Generator) -> None:
    config, resized = CASES[case]
    model = ADMUNet(config)
    params = random_params(model.shapes(), rng)
    state = {
        torch_key(path): torch.from_numpy(np.array(to_torch(path, np.asarray(leaf))))
        for path, leaf in flatten(params).items()
    }
    x = rng.standard_normal((2, 8, 6, config.in_channels)).astype(np.float32)
    t = np.array([3.5, -700.25], np.float32)
    labels = None
    if case == "improved diffusion":
        t[:] = 12.25  # the same for all: given as a scalar below
    elif config.num_classes is not None:
        labels = np.array([1, 4])
    else:
        labels = rng.standard_normal((2, config.label_channels)).astype(np.float32)

    given = [None if a is None else torch.from_numpy(a) for a in (x.transpose(0, 3, 1, 2), t, labels)]
    expected = Twin(state, config, resized)(*given).numpy().transpose(0, 2, 3, 1)
    time = t[0] if case == "improved diffusion" else t
    arrays = [None if a is None else jnp.asarray(a) for a in (x, time, labels)]
    ours = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs))(*arrays)
    assert np.abs(np.asarray(ours) - expected).max() < 1e-4 * expected.std()
