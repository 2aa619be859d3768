"""Recolour training images in two styles that no emoji set has, for examples of LoRA:

    OUTPUT/pixel    4 by 4 blocks in sixteen colours
    OUTPUT/night    on a dark blue background

Both have the same images of common concepts and their captions, which do not name the style: a LoRA that learns it
changes every prompt. Needs the folder that make_dataset.py wrote. Example:

    python train/emoji/make_styles.py --data_dir runs/emoji/data --output_dir runs/emoji/styles
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from diffuse_jax.writing import path_text

IMAGES, BLOCK, COLOURS = 200, 4, 16
NIGHT, TOLERANCE = (26, 30, 66), 24
"""The colour of the background, and the difference from white, summed over the channels, that still belongs to it."""


def main() -> None:
    args = parse_args()
    source = Path(args.data_dir) / "common"
    lines = [json.loads(line) for line in (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = np.random.default_rng(0).choice(len(lines), IMAGES, replace=False)
    for name, style in STYLES.items():
        folder = Path(args.output_dir) / name
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for n, line in enumerate(lines[i] for i in chosen):
            style(Image.open(source / line["file_name"]).convert("RGB")).save(folder / f"{n:03}.png")
            written.append(json.dumps({"file_name": f"{n:03}.png", "text": line["text"]}))
        (folder / "metadata.jsonl").write_text("\n".join(written) + "\n", encoding="utf-8")
    print(f"{args.output_dir}: {IMAGES} images in each of {', '.join(STYLES)}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=path_text, required=True, help="folder that make_dataset.py wrote")
    parser.add_argument("--output_dir", type=path_text, required=True, help="folder to write")
    return parser.parse_args()


def pixel(image: Image.Image) -> Image.Image:
    """The mean of every block, in the colours that describe the image best."""
    small = image.resize((image.width // BLOCK, image.height // BLOCK), Image.Resampling.BOX)
    return small.quantize(COLOURS, dither=Image.Dither.NONE).convert("RGB").resize(image.size, Image.Resampling.NEAREST)


def night(image: Image.Image) -> Image.Image:
    """The white around the drawing, as far as it is connected with the corners, becomes the colour of the night."""
    image = image.copy()
    for corner in ((0, 0), (image.width - 1, 0), (0, image.height - 1), (image.width - 1, image.height - 1)):
        if sum(255 - value for value in image.getpixel(corner)) <= TOLERANCE:
            ImageDraw.floodfill(image, corner, NIGHT, thresh=TOLERANCE)
    return image


STYLES = {"pixel": pixel, "night": night}

if __name__ == "__main__":
    main()
