"""Does "make it noto style" give Noto's drawing? Held-out edits by the InstructPix2Pix model of the gallery.

    python -m benchmarks.emoji_edits --model runs/gallery/instruct-pix2pix --data_dir runs/emoji/edits

Takes edits whose result no training has seen (``make_edits.py``), one for each result, edits the image before them, and
compares with the true result. Edits are chosen with a fixed seed; edit *n* has seed *n*.

* ``rmse``: root mean square difference of the pixels (of 255), the mean over images.
* ``nearer``: the share of images that are nearer to the true result than the image before the edit is.

Intervals are the middle 95 % of 1000 bootstrap resamples of the edits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks import retrieval
from benchmarks.common import RESULTS, write
from benchmarks.controlnet_edges import SETTINGS, reconstructed
from diffuse_jax import DiffusionPipeline, StableDiffusionImg2ImgPipeline

ABOUT = (
    "Edits to a style whose drawing is held out, against that drawing; 25 steps, guidance 4, for edits image guidance"
    " {image_guidance:g}. `before` is the image without any edit; image to image begins from it with the prompt of the"
    " drawing. The last row compares the true drawings after the autoencoder, the most that a sample can reach."
    " `rmse` is of pixels from 0 to 255, `nearer` the share nearer to the true drawing than `before` is. In brackets:"
    " 95 % intervals of a bootstrap."
)
STRENGTHS = (0.3, 0.5, 0.7)


class Edit(NamedTuple):
    """Images float32 ``[64,64,3]`` in [0, 1] before and after, the instruction, and what they show."""

    before: np.ndarray
    after: np.ndarray
    instruction: str
    label: str


def main() -> None:
    args = parse_args()
    pipe, editor = DiffusionPipeline.from_pretrained("diffuse-jax/emoji"), DiffusionPipeline.from_pretrained(args.model)
    befores, afters, instructions, labels = zip(*held_out_edits(args.data_dir, args.num_samples))
    given = SETTINGS | {"image": list(befores), "seed": list(range(len(befores)))}
    image_guidance = {"image_guidance_scale": args.image_guidance_scale}
    prompts = [f"{label}, {style_of(instruction)} style" for label, instruction in zip(labels, instructions)]
    vary = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    samples = {"edited": editor(list(instructions), **image_guidance, **given).images, "before": befores}
    samples |= {f"image to image, {s:g}": vary(prompts, strength=s, **given).images for s in STRENGTHS}
    samples |= {"reconstructions": reconstructed(pipe, np.stack(afters))}
    rows = [{"images": name, **distances(befores, afters, found)} for name, found in samples.items()]
    about = ABOUT.format(image_guidance=args.image_guidance_scale)
    print(write("emoji_edits", "Edits to another style", about, rows, "jax", folder=Path(args.output_dir)))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/gallery/instruct-pix2pix", help="folder of the trained pipeline")
    parser.add_argument("--data_dir", default="runs/emoji/edits", help="folder that make_edits.py wrote")
    parser.add_argument("--num_samples", type=int, default=64, help="most edits (default 64)")
    parser.add_argument("--image_guidance_scale", type=float, default=1.5, help="of the edits (default 1.5)")
    parser.add_argument("--output_dir", default=RESULTS, help="folder of the result")
    return parser.parse_args()


def held_out_edits(data_dir: str | Path, count: int) -> list[Edit]:
    """Edits with different results, at most so many."""
    folder = Path(data_dir) / "heldout"
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen: dict[str, Any] = {}
    for i in np.random.default_rng(0).permutation(len(lines)):
        chosen.setdefault(lines[i]["file_name"], lines[i])
    pixels = lambda name: np.asarray(Image.open(folder / name).convert("RGB"), np.float32) / 255
    return [
        Edit(pixels(line["input_image_file_name"]), pixels(line["file_name"]), line["edit_prompt"], line["label"])
        for line in list(chosen.values())[:count]
    ]


def style_of(instruction: str) -> str:
    """The style that an instruction of ``make_edits.py`` names."""
    return instruction.removeprefix("make it ").removesuffix(" style")


def distances(befores: Any, afters: Any, samples: Any) -> dict[str, Any]:
    """How far samples ``[B,H,W,3]`` in [0, 1] are from the results, and how many are nearer than the images before."""
    distance = lambda a, b: 255 * np.sqrt(np.mean((np.asarray(a) - np.asarray(b)) ** 2, axis=(1, 2, 3)))
    found, unchanged = distance(samples, afters), distance(befores, afters)
    measured = {"rmse": found, "nearer": (found < unchanged).astype(float)}
    estimates = {name: retrieval.estimate(retrieval.mean(of), len(of)) for name, of in measured.items()}
    return estimates | {"count": len(found)}


if __name__ == "__main__":
    main()
