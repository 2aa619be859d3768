"""A third-party trained network: converted, compared with its own ONNX graph, and sampled.

The consistency UNet in the PyPI package ``adaptive-terrain-diffusion`` (MIT, Youwei Yu) generates height maps of 128 by
128 for a difficulty from 1 to 100. This script fetches the package once, saves the network as an ordinary folder,
compares ``ADMUNet`` with onnxruntime and draws samples. Needs the ``dev`` extra (onnx, onnxruntime)::

    python -m benchmarks.terrain
"""

from __future__ import annotations

import argparse
import json
import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
from PIL import Image, ImageDraw, ImageFont
from safetensors.numpy import save_file

from benchmarks.common import ROOT, fetch_wheel
from diffuse_jax.models import ADMUNet, ADMUNetConfig, consistency_denoiser

CACHE = ROOT / ".cache" / "terrain"
PACKAGE = "adaptive-terrain-diffusion==0.4.2"
WHEEL = "adaptive_terrain_diffusion-0.4.2-py3-none-any.whl"
SHA256 = "dd803be2c98d764e4e64db18c631eef46c210282b398c4dd080f4cda3fa7c84d"
GRAPH = "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"

CONFIG = ADMUNetConfig(
    image_size=128,
    in_channels=1,
    out_channels=1,
    model_channels=32,
    channel_mult=(1, 1, 2, 3, 4),
    num_res_blocks=4,
    attention_resolutions=(4, 8, 16),
    num_head_channels=32,
    use_scale_shift_norm=True,
    resblock_updown=True,
    use_new_attention_order=True,
    attention_dims=2,
    label_channels=1,
)
SIZE, SIGMA_MIN, SIGMA_MAX = 128, 0.002, 80.0
SIGMAS = (80.0, 5.0, 0.5, 0.05)
NORM_BEFORE = {"in_layers.2": "in_layers.0", "out_layers.3": "out_layers.0", "qkv": "norm", "out.2": "out.0"}
"""Layer -> the group norm whose output it reads; the graph names the layer but not the norm."""

Denoiser = Callable[..., jax.Array]


def fetch(cache: Path = CACHE) -> bytes:
    """The ONNX file of the package, from ``cache`` or through pip.

    Raises:
      RuntimeError: pip cannot fetch the package, or it is not the expected file.
    """
    with zipfile.ZipFile(fetch_wheel(cache, PACKAGE, WHEEL, SHA256)) as archive:
        return archive.read(GRAPH)


def tensors(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """The network's parameters under their PyTorch names.

    The exporter kept the names of convolutions and dense layers. A group norm became an InstanceNormalization followed
    by a Mul and an Add for the affine; it gets its name from the next named layer.
    """
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    named = {name.removeprefix("network."): a for name, a in arrays.items() if name.startswith("network.")}
    affine: list[np.ndarray] = []
    inside = False  # between an InstanceNormalization and the Add that ends the norm
    for node in graph.node:
        constants = [arrays[name] for name in node.input if name in arrays]
        if node.op_type == "InstanceNormalization":
            inside = True
        elif inside and node.op_type in ("Mul", "Add"):
            affine += [constant.reshape(-1) for constant in constants]
            inside = node.op_type == "Mul"
        elif affine and node.op_type == "Conv":
            layer = node.input[1].removeprefix("network.").removesuffix(".weight")
            stem, kind = next((layer.removesuffix(kind), kind) for kind in NORM_BEFORE if layer.endswith(kind))
            scale, bias = affine
            named |= {f"{stem}{NORM_BEFORE[kind]}.weight": scale, f"{stem}{NORM_BEFORE[kind]}.bias": bias}
            affine = []
    return named


def convert(onnx_file: bytes, folder: Path) -> None:
    """Write an ordinary folder: ``config.json``, and safetensors under the original names."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: np.ascontiguousarray(a) for name, a in tensors(onnx.load_from_string(onnx_file).graph).items()}
    save_file(weights, folder / f"{ADMUNet.weights_name}.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG.to_json(), indent=2) + "\n", encoding="utf-8")


def load_denoiser(folder: Path) -> Denoiser:
    """``denoise(x [B,128,128,1], sigma, difficulty [B,1] in [0, 1])`` -> height maps in [-1, 1], compiled."""
    model, params = ADMUNet.from_pretrained(folder)

    @jax.jit
    def denoise(params: dict, x: jax.Array, sigma: jax.Array, difficulty: jax.Array) -> jax.Array:
        network = lambda *inputs: model.apply({"params": params}, *inputs)
        return jnp.clip(consistency_denoiser(network, sigma_min=SIGMA_MIN)(x, sigma, difficulty), -1, 1)

    return lambda x, sigma, difficulty: denoise(params, x, sigma, difficulty)


def onnx_denoiser(onnx_file: bytes) -> Callable[..., np.ndarray]:
    """The same function with onnxruntime."""
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])

    def denoise(x: np.ndarray, sigma: float, difficulty: np.ndarray) -> np.ndarray:
        sigmas = np.full(len(x), sigma, np.float32)
        feeds = {"noisy": x.transpose(0, 3, 1, 2), "sigma": sigmas, "difficulty": difficulty[:, 0]}
        return session.run(["denoised"], feeds)[0].transpose(0, 2, 3, 1)

    return denoise


def compare(ours: Denoiser, theirs: Callable[..., np.ndarray], sigmas: Sequence[float] = SIGMAS) -> list[dict]:
    """One row per noise level: both networks on the same noisy height maps (difficulties 10 and 90)."""
    rng = np.random.default_rng(0)
    difficulty = labels([10, 90])
    draw_noise = lambda: rng.standard_normal((2, SIZE, SIZE, 1), dtype=np.float32)
    clean = theirs(SIGMA_MAX * draw_noise(), SIGMA_MAX, difficulty)
    rows = []
    for sigma in sigmas:
        noise = draw_noise()
        noisy = clean + np.float32(sigma) * noise
        expected = theirs(noisy, sigma, difficulty)
        error = np.abs(np.asarray(ours(noisy, sigma, difficulty)) - expected)
        rows.append(
            {
                "sigma": sigma,
                "largest_difference": float(error.max()),
                "mean_difference": float(error.mean()),
                "deviation_of_the_output": float(expected.std()),
                "share_of_noise_left": float(((expected - clean) * noise).mean() / sigma),
            }
        )
    return rows


def labels(difficulties: Sequence[int]) -> np.ndarray:
    """Difficulties from 1 to 100 in the network's range [0, 1], ``[B,1]``."""
    return (np.asarray(difficulties, np.float32)[:, None] - 1) / 99


def sample(denoise: Denoiser, key: jax.Array, difficulties: Sequence[int], sigmas: Sequence[float]) -> jax.Array:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1); ``sigmas`` decrease, one network call each."""
    noise = lambda i: jax.random.normal(jax.random.fold_in(key, i), (len(difficulties), SIZE, SIZE, 1))
    x = denoise(sigmas[0] * noise(0), sigmas[0], labels(difficulties))
    for i, sigma in enumerate(sigmas[1:], start=1):
        x = denoise(x + math.sqrt(sigma**2 - SIGMA_MIN**2) * noise(i), sigma, labels(difficulties))
    return x


def relief(sample: np.ndarray) -> np.ndarray:
    """A sample ``[H,W]`` in [-1, 1] as a shaded map, uint8 ``[H,W,3]``, lit from the upper left.

    Heights are those of the package: ``0.1 sinh(u asinh(22.17 / 0.1))`` metres for ``u`` from 0 to 1, pixels of 0.1 m.
    """
    height = 0.1 * np.sinh((sample + 1) / 2 * np.arcsinh(22.16864 / 0.1))
    dy, dx = np.gradient(height, 0.1)
    shade = (1 + 0.6 * (dx + dy)) / np.sqrt(1 + dx**2 + dy**2) / math.sqrt(1 + 2 * 0.36)
    low, high = np.array([86, 108, 92.0]), np.array([238, 226, 205.0])
    tint = low + (high - low) * ((height - height.min()) / max(np.ptp(height), 1e-6))[..., None]
    return np.clip(tint * (0.45 + 0.75 * np.clip(shade, 0, 1))[..., None], 0, 255).astype(np.uint8)


DIFFICULTIES = (1, 20, 40, 60, 80, 100)
ROWS = (
    ("1 step\nseed 0", 0, (SIGMA_MAX,)),
    ("1 step\nseed 1", 1, (SIGMA_MAX,)),
    ("1 step\nseed 2", 2, (SIGMA_MAX,)),
    ("3 steps\nsigma 80, 40, 20\nseed 2", 2, (SIGMA_MAX, 40.0, 20.0)),
    ("2 steps\nsigma 80, 1\nseed 2", 2, (SIGMA_MAX, 1.0)),
)
"""Rows of the figure: label, seed and noise levels."""
LEFT, TOP, STEP, FONT = 130, 34, 132, 16
"""In pixels: the width of the labels, the height of the heading, from one map to the next, and the font size."""


def draw(denoise: Denoiser, path: Path) -> None:
    """The figure: ``ROWS`` from top to bottom, ``DIFFICULTIES`` from left to right, each with its label."""
    page = Image.new("RGB", (LEFT + STEP * len(DIFFICULTIES), TOP + STEP * len(ROWS)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(FONT)
    for column, difficulty in enumerate(DIFFICULTIES):
        label = f"{'' if column else 'difficulty '}{difficulty}"
        pen.text((LEFT + column * STEP + SIZE // 2, TOP // 2), label, "#202020", font, anchor="mm")
    for row, (label, seed, sigmas) in enumerate(ROWS):
        top = TOP + row * STEP
        pen.multiline_text((4, top + SIZE // 2), label, "#202020", font, anchor="lm", spacing=6)
        maps = np.asarray(sample(denoise, jax.random.key(seed), DIFFICULTIES, sigmas))[..., 0]
        for column, heights in enumerate(maps):
            page.paste(Image.fromarray(relief(heights)), (LEFT + column * STEP, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.quantize(256).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where to keep the package and the folder")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results/terrain.json", help="the comparison")
    parser.add_argument("--image", type=Path, default=ROOT / "docs/images/terrain.png", help="the samples")
    options = parser.parse_args()

    onnx_file = fetch(options.cache)
    folder = options.cache / "adm_unet"
    convert(onnx_file, folder)
    denoise = load_denoiser(folder)
    result = {
        "title": "A third-party network: terrain",
        "about": "`ADMUNet` (float32) against onnxruntime running the published graph, both on the same two noisy "
        "height maps at each noise level; outputs lie in [-1, 1]. The bound is 1e-4.",
        "machine": {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
        "rows": compare(denoise, onnx_denoiser(onnx_file)),
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["rows"], indent=2))
    draw(denoise, options.image)
    print(options.image)


if __name__ == "__main__":
    main()
