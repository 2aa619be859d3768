"""Do samples of a ControlNet follow its edges? Held-out emoji, with and without the ControlNet.

    python -m benchmarks.controlnet_edges --controlnet runs/gallery/controlnet --data_dir runs/emoji/data

Takes held-out emoji of the kind that the ControlNet of the gallery was trained on, draws each again from its edges and
its name, and from its name alone with the same noise, and compares the edges of the samples with those of the emoji.
Images are chosen with a fixed seed; image *n* has seed *n*.

* ``precision``: the share of a sample's edge pixels that are at most one pixel from an edge of the emoji.
* ``recall``: the share of the emoji's edge pixels that are at most one pixel from an edge of the sample.
* ``F1``: their harmonic mean, for each image.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from benchmarks.common import RESULTS, ROOT, write
from diffuse_jax import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from diffuse_jax.control_images import canny

ABOUT = (
    "Edges of samples against those of held-out emoji (Canny, at most one pixel apart), with the ControlNet of the"
    " gallery and without it, from the same prompts and noise; 25 steps, guidance 4. The last row compares the emoji"
    " after the autoencoder, the most that a sample can reach."
)
SETTINGS: dict[str, Any] = {"num_inference_steps": 25, "guidance_scale": 4.0, "output_type": "np", "batch_size": 8}


def main() -> None:
    args = parse_args()
    pipe = DiffusionPipeline.from_pretrained("diffuse-jax/emoji")
    net = ControlNetModel.from_pretrained(args.controlnet)
    steered = StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=net)
    images, edges, prompts = zip(*edges_and_prompts(args.data_dir, args.num_samples))
    seeds = list(range(len(prompts)))
    samples = {
        "with the ControlNet": steered(list(prompts), image=list(edges), seed=seeds, **SETTINGS).images,
        "without": pipe(list(prompts), seed=seeds, **SETTINGS).images,
        "reconstructions": reconstructed(pipe, np.stack(images)),
    }
    rows = [{"samples": name, **agreement(edges, found)} for name, found in samples.items()]
    print(write("controlnet_edges", "Edges of samples", ABOUT, rows, "jax", folder=Path(args.output_dir)))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--controlnet", default="runs/gallery/controlnet", help="folder of the ControlNet")
    parser.add_argument("--data_dir", default="runs/emoji/data", help="folder that make_dataset.py wrote")
    parser.add_argument("--num_samples", type=int, default=64, help="number of emoji")
    parser.add_argument("--output_dir", default=RESULTS, help="folder of the result")
    return parser.parse_args()


def edges_and_prompts(data_dir: str | Path, count: int) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """Held-out emoji float32 ``[64,64,3]`` in [0, 1], their edges uint8 ``[64,64,3]``, and prompts."""
    sys.path.append(str(ROOT / "train" / "emoji"))
    from captions import is_common

    folder = Path(data_dir) / "heldout"
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if is_common(line)]
    found = []
    for i in np.random.default_rng(0).permutation(len(lines))[:count]:
        image = Image.open(folder / lines[i]["file_name"]).convert("RGB")
        pixels = np.asarray(image, np.float32) / 255
        found.append((pixels, canny(image), f"{lines[i]['label']}, {lines[i]['style']} style"))
    return found


def reconstructed(pipe: Any, images: np.ndarray) -> np.ndarray:
    """Images ``[B,H,W,3]`` in [0, 1] after the autoencoder."""
    vae, params = pipe.components["vae"], {"params": pipe.params["vae"]}
    latents = vae.apply(params, 2 * images - 1, method="encode").mean
    return np.clip(np.asarray(vae.apply(params, latents, method="decode")) / 2 + 0.5, 0, 1)


def agreement(edges: Any, samples: Any) -> dict[str, float]:
    """Mean precision, recall and F1 of the edges of samples ``[B,H,W,3]`` in [0, 1]."""
    scores = [compare(wanted[..., 0] > 0, canny(sample)[..., 0] > 0) for wanted, sample in zip(edges, samples)]
    means = [statistics.fmean(values) for values in zip(*scores)]
    return {**dict(zip(("precision", "recall", "F1"), means)), "images": len(scores)}


def compare(wanted: np.ndarray, found: np.ndarray) -> tuple[float, float, float]:
    """Precision, recall and F1 of edges ``[H,W]``; 0 where there are none."""
    near = lambda a: ndimage.binary_dilation(a, np.ones((3, 3)))
    share = lambda a, b: float((a & near(b)).sum() / max(a.sum(), 1))
    precision, recall = share(found, wanted), share(wanted, found)
    return precision, recall, 2 * precision * recall / max(precision + recall, 1e-9)


if __name__ == "__main__":
    main()
