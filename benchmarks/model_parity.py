"""Differences between the networks and those of PyTorch diffusers and transformers, and sizes of published networks.

    python benchmarks/model_parity.py

Writes ``docs/results/model_parity.json`` (outputs of small networks with random weights, those of the tests) and
``docs/results/model_sizes.json`` (every preset at full size: parameter counts, names and shapes, from shapes alone).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common  # noqa: E402
from tests.oracle import comparisons, test_full_size, twins  # noqa: E402

PARITY = (
    "Small networks with random weights, saved by PyTorch and opened by both libraries, in float32 on the CPU: the"
    f" largest absolute difference of outputs scaled to unit variance. The tests' bound is {comparisons.TOLERANCE}."
)
SIZES = (
    "Every published network at full size, as a tree of shapes: its parameters, and whether each of its tensors has the"
    " name and the shape that PyTorch's network of the same configuration has."
)
PACKAGES = ("jax", "flax", "torch", "diffusers", "transformers")


def rows(seed: int = 0) -> Iterator[dict[str, Any]]:
    """One row per twin of the oracle tests."""
    kinds: list[tuple[str, Any, Callable[..., twins.Twin], Callable[[twins.Twin, Any], dict[str, float]]]] = [
        (
            "UNet",
            twins.UNETS,
            twins.unet_twin,
            lambda t, r: comparisons.compare_unet(t, comparisons.unet_inputs(t[1], r)),
        ),
        (
            "ControlNet",
            twins.CONTROLNETS,
            twins.controlnet_twin,
            lambda t, r: comparisons.compare_controlnet(t, comparisons.controlnet_inputs(t[1], r, (9, 13))),
        ),
        (
            "T2I-Adapter",
            twins.T2I_ADAPTERS,
            twins.t2i_adapter_twin,
            lambda t, r: comparisons.compare_t2i_adapter(t, comparisons.control_images(t[1].config, r)),
        ),
        (
            "UNet over pixels",
            twins.PIXEL_UNETS,
            twins.pixel_unet_twin,
            lambda t, r: comparisons.compare_unet(t, comparisons.unet_inputs(t[1], r)),
        ),
        ("autoencoder", twins.VAES, twins.vae_twin, comparisons.compare_vae),
        ("tiny autoencoder", twins.TINIES, twins.tiny_twin, comparisons.compare_tiny),
        ("asymmetric autoencoder", twins.ASYMMETRICS, twins.asymmetric_twin, comparisons.compare_asymmetric),
        (
            "consistency decoder",
            twins.CONSISTENCY_DECODERS,
            twins.consistency_decoder_twin,
            comparisons.compare_consistency_decoder,
        ),
        (
            "text encoder",
            twins.TEXTS,
            twins.text_twin,
            lambda t, r: comparisons.compare_text(t, comparisons.token_ids(t[1].config, r)),
        ),
        ("depth estimator", twins.DEPTHS, twins.depth_twin, comparisons.compare_depth),
        ("vision encoder", twins.VISIONS, twins.vision_twin, comparisons.compare_vision),
    ]
    for kind, names, build, compare in kinds:
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                twin = build(name, Path(folder))
                differences = compare(twin, np.random.default_rng(seed))
            worst = max(differences, key=lambda key: differences[key])
            count = sum(leaf.size for leaf in jax.tree.leaves(twin[2]))
            row = {"network": kind, "family": name, "parameters": f"{count:,}"}
            yield row | {"outputs": len(differences), "largest_difference": differences[worst], "in": worst}


if __name__ == "__main__":
    print(common.write("model_parity", "Networks against PyTorch", PARITY, list(rows()), *PACKAGES))
    sizes = list(test_full_size.rows())
    print(common.write("model_sizes", "Sizes of the published networks", SIZES, sizes, *PACKAGES))
