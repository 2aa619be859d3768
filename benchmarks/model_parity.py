"""Differences between the networks and those of PyTorch diffusers and transformers, and sizes of published networks.

    python benchmarks/model_parity.py
    python benchmarks/model_parity.py --missing    # only what the tables lack; their other rows stay as they are

Writes ``docs/results/model_parity.json`` (outputs of small networks with random weights, those of the tests) and
``docs/results/model_sizes.json`` (every preset at full size: parameter counts, names and shapes, from shapes alone).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Container, Iterator
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


def rows(known: Container[tuple[str, str]] = (), seed: int = 0) -> Iterator[dict[str, Any]]:
    """One row per twin of the oracle tests, except those of the pairs of network and family that are ``known``."""
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
        ("quantised autoencoder", twins.VQS, twins.vq_twin, comparisons.compare_vq),
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
            if (kind, name) in known:
                continue
            with tempfile.TemporaryDirectory() as folder:
                twin = build(name, Path(folder))
                differences = compare(twin, np.random.default_rng(seed))
            worst = max(differences, key=lambda key: differences[key])
            count = sum(leaf.size for leaf in jax.tree.leaves(twin[2]))
            row = {"network": kind, "family": name, "parameters": f"{count:,}"}
            yield row | {"outputs": len(differences), "largest_difference": differences[worst], "in": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missing", action="store_true", help="run what the tables lack, and keep their other rows")
    missing = parser.parse_args().missing
    old, old_sizes = (common.table(name) if missing else [] for name in ("model_parity", "model_sizes"))
    found = rows(common.keys(old, "network", "family"))
    print(common.extend("model_parity", "Networks against PyTorch", PARITY, old, found, *PACKAGES), flush=True)
    sizes = test_full_size.rows({row["preset"] for row in old_sizes})
    print(common.extend("model_sizes", "Sizes of the published networks", SIZES, old_sizes, sizes, *PACKAGES))


if __name__ == "__main__":
    main()
