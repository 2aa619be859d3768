"""Perceptual distance of two images: their distance in the features of a frozen network (Zhang et al. 2018, eq. 1).

With ``f_l`` the features of layer l divided by their norm over channels, and ``w_l >= 0`` a weight per channel,

    d(x, y) = sum over l of the mean over space of the sum over channels of w_l (f_l(x) - f_l(y))^2

This is the paper's LPIPS for a VGG16 with the weights that its authors fitted to human judgements, if the file has them
(``lin0.model.1.weight`` ... ``lin4``). Without them, every ``w_l`` is 1, which is the paper's baseline. No weights were
fitted for MobileNetV2 and EfficientNet-Lite0, so they always give such a baseline.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.kernels import conv2d
from diffuse_jax.models import Params
from diffuse_jax.training import efficientnet_lite, mobilenet_v2
from diffuse_jax.weights import WeightsError, read_checkpoint

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's images in [0, 1], by channel."""

VGG16 = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Indices of the 3x3 convolutions in torchvision's ``features``, by resolution; 2x2 max pooling separates them."""

MOBILENET_LAYERS, EFFICIENTNET_LAYERS = (1, 3, 6, 13, 18), (1, 3, 5, 11, 17)
"""The last layer of each resolution."""

NORM_EPSILON = 1e-10

LPIPS_NAME = re.compile(r"^net\.slice\d\.")
"""Prefix in LPIPS's own files that stands for ``features.``."""


class Features(NamedTuple):
    """A feature network: a key of :data:`NETWORKS`, and its parameters ``{"layers": ..., "weights": ...}``."""

    network: str
    params: Params


def read_features(path: str | Path) -> Features:
    """Read the feature network from a file with torchvision's VGG16 or MobileNetV2, with LPIPS's VGG16, or with
    EfficientNet-Lite0.

    Args:
      path: ``.pth`` or ``.safetensors`` file; the classifier and other tensors in it are ignored.

    Raises:
      WeightsError: the file cannot be read, or contains none of these networks.
    """
    tensors = {LPIPS_NAME.sub("features.", k): v for k, v in read_checkpoint([Path(path)]).tensors.items()}
    layers = {name: array for name, array in tensors.items() if name.startswith("features.")}
    try:
        if "_conv_stem.weight" in tensors:
            return Features("efficientnet_lite0", {"layers": efficientnet_lite.fold(tensors), "weights": {}})
        if "features.0.0.weight" in layers:
            return Features("mobilenet_v2", {"layers": mobilenet_v2.fold_norms(layers), "weights": {}})
        names = [f"features.{place}" for places in VGG16 for place in places]
        convolutions = {name: (_kernel(layers[f"{name}.weight"]), _float32(layers[f"{name}.bias"])) for name in names}
        weights = {}
        if "lin0.model.1.weight" in tensors:
            weights = {f"lin{i}": _float32(tensors[f"lin{i}.model.1.weight"]).reshape(-1) for i in range(len(VGG16))}
    except KeyError as error:
        raise WeightsError(
            f"{path}: not torchvision's VGG16 or MobileNetV2, nor EfficientNet-Lite0: it has no {error}; "
            f"its tensors are {', '.join(sorted(tensors)[:5])} ..."
        ) from error
    return Features("vgg16", {"layers": convolutions, "weights": weights})


def _kernel(weight: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(_float32(weight).transpose(2, 3, 1, 0))


def _float32(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float32)


def vgg16_maps(layers: Mapping[str, tuple[jax.Array, jax.Array]], x: jax.Array) -> list[jax.Array]:
    """The last activations at each of the five resolutions, for ``x [B,H,W,3]`` (Simonyan and Zisserman 2015, model
    D)."""
    found: list[jax.Array] = []
    for places in VGG16:
        if found:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for place in places:
            kernel, bias = layers[f"features.{place}"]
            x = jnp.maximum(conv2d(x, kernel, padding=1) + bias.reshape(1, 1, 1, -1), 0)
        found.append(x)
    return found


def mobilenet_maps(layers: mobilenet_v2.Params, x: jax.Array) -> list[jax.Array]:
    """Five feature maps of MobileNetV2 for ``x [B,H,W,3]``; all but the last come from linear layers and are signed."""
    found = mobilenet_v2.maps(layers, x)
    return [found[i] for i in MOBILENET_LAYERS]


def efficientnet_maps(layers: mobilenet_v2.Params, x: jax.Array) -> list[jax.Array]:
    """Five feature maps of EfficientNet-Lite0 for ``x [B,H,W,3]``; all but the last are signed."""
    found = efficientnet_lite.maps(layers, x)
    return [found[i] for i in EFFICIENTNET_LAYERS]


NETWORKS: dict[str, tuple[Callable[..., list[jax.Array]], int]] = {
    "vgg16": (vgg16_maps, 16),
    "mobilenet_v2": (mobilenet_maps, 1),
    "efficientnet_lite0": (efficientnet_maps, 1),
}
"""Network -> its feature maps, and the smallest side of an image that it supports."""


def perceptual_distance(network: str, params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """The distance defined at the top of this module, float32 ``[B]``, nonnegative.

    Args:
      network: the network of :class:`Features`.
      params: the parameters of :class:`Features`.
      x, y: images float32 ``[B,H,W,3]`` in [-1, 1].
    """
    maps, _ = NETWORKS[network]
    total = jnp.zeros(x.shape[0], jnp.float32)
    features = (maps(params["layers"], _normalised(image)) for image in (x, y))
    for i, (f, g) in enumerate(zip(*features, strict=True)):
        squares = jnp.square(_unit(f) - _unit(g))
        if params["weights"]:
            squares = squares * params["weights"][f"lin{i}"].reshape(1, 1, 1, -1)
        total = total + squares.sum(-1).mean((1, 2))
    return total


def _normalised(x: jax.Array) -> jax.Array:
    """Pixels in [-1, 1], normalised for networks trained on ImageNet."""
    mean, deviation = (jnp.array(v, jnp.float32).reshape(1, 1, 1, 3) for v in (MEAN, DEVIATION))
    return ((x + 1) / 2 - mean) / deviation


def _unit(f: jax.Array) -> jax.Array:
    """``f`` divided by its norm over channels; the epsilon is inside the root, for a finite gradient at zero."""
    return f * jax.lax.rsqrt(jnp.square(f).sum(-1, keepdims=True) + NORM_EPSILON)
