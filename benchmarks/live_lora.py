"""One UNet step with live adapters, against the same step with the adapter merged into the kernels.

Stable Diffusion 1.5's UNet with random weights, and random pairs for the layers of its attention and feed-forward
blocks.
Each side has its own process and they take turns; see ``common.py``::

    python benchmarks/live_lora.py                        # 2 x 64 x 64 latents, ranks 8 and 64
    python benchmarks/live_lora.py --narrow 2 --size 32   # half the channels, 1.1 GB
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -m benchmarks.live_lora

from common import compete, write
from unet_step import Run, inputs, weights

TARGETS = r"to_[qkv]$|to_out_0$|ff/net_[02]"
"""Layers that trainers adapt besides convolutions: 160 in this network."""


def network(narrow: int) -> Any:
    """SD 1.5's UNet with its channels divided by ``narrow``."""
    from diffuse_jax.models import UNet2DConditionModel
    from diffuse_jax.models.presets import SD15_UNET

    return UNet2DConditionModel(
        SD15_UNET.replace(block_out_channels=[c // narrow for c in SD15_UNET.block_out_channels])
    )


def side(narrow: int, size: int, batch: int, rank: int, live: bool) -> Run:
    """A step with an adapter of a rank, live or merged."""
    import jax

    from diffuse_jax.adapters import lora
    from diffuse_jax.weights.names import unflatten

    model = network(narrow)
    params = unflatten({path: jax.device_put(array) for path, array in weights(model).items()})
    arrays = jax.device_put(inputs("sd15", size, batch))
    rng = np.random.default_rng(2)
    shapes = lora.init(model.shapes(), rank, jax.random.key(0), TARGETS)
    pairs: Any = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32) * (0.5 / x.shape[0]) ** 0.5, shapes)
    if not live:
        params, pairs = lora.merge(params, pairs), {}
    scale = np.ones(batch, np.float32)  # as in a call, one strength for each image

    def forward(params: Any, pairs: Any, scale: Any, arrays: dict[str, Any]) -> Any:
        with lora.live(pairs, scale):
            return model.apply({"params": params}, arrays["sample"], 500, arrays["text"])

    given = jax.device_put((params, pairs, scale, arrays))
    program = jax.jit(forward).lower(*given).compile()
    return lambda: np.asarray(program(*given), np.float32)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="height and width of the latents")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--narrow", type=int, default=1, help="divide the network's channels by this")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=10)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    task = (args.narrow, args.size, args.batch)
    builds: dict[str, tuple[Any, ...]] = {"merged": (side, *task, args.ranks[0], False)}
    builds |= {f"live, rank {rank}": (side, *task, rank, True) for rank in args.ranks}
    rows = compete(builds, args.rounds)
    channels = "" if args.narrow == 1 else f", channels divided by {args.narrow}"
    label = {"model": f"SD 1.5 UNet{channels}", "latents": f"{args.batch} x {args.size} x {args.size}"}
    merged = ("merged", f"live, rank {args.ranks[0]}")  # one adapter; that of another rank gives other results
    left = lambda name: {"setup_seconds", "peak_gib"} | ({"difference"} if name not in merged else set())
    rows = [label | {k: v for k, v in row.items() if k not in left(row["side"])} for row in rows]
    for row in rows:
        print(json.dumps(row), file=sys.stderr)
    about = (
        "One forward pass with an adapter of the attention and feed-forward layers (160 pairs), merged into the "
        "kernels or live beside them: seconds (fastest and median of interleaved runs, and CPU time of the fastest) "
        "with ratios to the merged one; float32."
    )
    print(write("live_lora", "Live and merged LoRA", about, rows, "jax", "jaxlib"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
