"""Draw the sheet of samples in the documentation: 8x8 images for captions that were not selected by hand.

Three rows of common concepts (``common/`` of the data), two of any training image (blue), three of pairs of concept
and style that were held out of training (red). Captions are chosen with a fixed random seed, and image n has seed n.
Example:

    python train/emoji/sample_sheet.py --data_dir runs/emoji/data --output docs/images/emoji_sheet.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from sheets import Row, sheet

import diffuse_jax
from diffuse_jax.bounds import COUNT, NONNEGATIVE, number
from diffuse_jax.writing import path_text

EDGE = 8  # images along an edge
BANDS = {"common": (3, "#202020"), "train": (2, "#1040a0"), "heldout": (3, "#b00020")}  # rows and colour of captions


def main() -> None:
    args = parse_args()
    chosen = {name: choose(Path(args.data_dir) / name, rows * EDGE) for name, (rows, _) in BANDS.items()}
    captions = [text for texts in chosen.values() for text in texts]
    colours = [BANDS[name][1] for name, texts in chosen.items() for _ in texts]
    pipe = diffuse_jax.DiffusionPipeline.from_pretrained(args.model)
    images = pipe(
        captions,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        seed=list(range(len(captions))),
    ).images
    rows = [Row(images[i : i + EDGE], captions[i : i + EDGE], colours[i]) for i in range(0, len(captions), EDGE)]
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows).save(output, optimize=True)
    print(output)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=path_text, default="diffuse-jax/emoji", help="pipeline folder (default: the shipped model)"
    )
    parser.add_argument("--data_dir", type=path_text, required=True, help="folder that make_dataset.py wrote")
    parser.add_argument("--output", type=path_text, default="docs/images/emoji_sheet.png", help="image file to write")
    parser.add_argument("--num_inference_steps", type=number(COUNT), default=25, help="sampling steps (default 25)")
    parser.add_argument("--guidance_scale", type=number(NONNEGATIVE), default=5.0, help="guidance scale (default 5)")
    return parser.parse_args()


def choose(folder: Path, count: int) -> list[str]:
    """The main captions of ``count`` different images of an image folder, always the same ones."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = np.random.default_rng(0).choice(len(lines), count, replace=False)
    return [json.loads(lines[i])["text"][0] for i in chosen]


if __name__ == "__main__":
    main()
