"""Draw what fine-tuning changed: prompts of the examples before and after, from the same seeds.

    python train/emoji/fine_tuning_sheet.py --examples runs/emoji/examples --lora runs/emoji/zib \\
        --dreambooth runs/emoji/zib-full --word runs/emoji/word --output docs/images/emoji_fine_tuning.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from sheets import Row, sheet

import diffuse_jax
from diffuse_jax.writing import path_text

COLUMNS = 6
CHARACTER = ("a zib robot", "a zib robot", "a zib robot, noto style", "a robot, noto style", "red apple, noto style",
             "cat face, noto style")  # fmt: skip
STYLED = ("red apple", "cat face", "sun", "red heart", "mushroom", "house")


def main() -> None:
    args = parse_args()
    pipe = diffuse_jax.DiffusionPipeline.from_pretrained(args.model)
    taught = pipe.load_textual_inversion(args.word)
    rows = [
        stored("images of the character", Path(args.examples) / "character"),
        sampled("before", pipe, CHARACTER),
        sampled("after DreamBooth with LoRA", pipe.load_lora_weights(args.lora), CHARACTER),
        sampled("after DreamBooth", diffuse_jax.DiffusionPipeline.from_pretrained(args.dreambooth), CHARACTER),
        stored("images of the style", Path(args.examples) / "style"),
        sampled("before: a word without meaning", pipe, [f"{name}, qvx style" for name in STYLED]),
        sampled("after textual inversion", taught, [f"{name}, <new> style" for name in STYLED]),
    ]
    sheet(rows).save(args.output, optimize=True)
    print(args.output)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=path_text, default="diffuse-jax/emoji", help="the model that was fine-tuned")
    parser.add_argument("--examples", type=path_text, required=True, help="folder that make_examples.py wrote")
    parser.add_argument("--lora", type=path_text, required=True, help="output of train/dreambooth_lora.py")
    parser.add_argument("--dreambooth", type=path_text, required=True, help="output of train/dreambooth.py")
    parser.add_argument("--word", type=path_text, required=True, help="output of train/textual_inversion.py")
    parser.add_argument(
        "--output", type=path_text, default="docs/images/emoji_fine_tuning.png", help="image file to write"
    )
    return parser.parse_args()


def stored(title: str, folder: Path) -> Row:
    """The first images of a folder, labelled with their file names."""
    paths = sorted(folder.glob("*.png"))[:COLUMNS]
    return Row([Image.open(path) for path in paths], [path.stem.replace("-", " ") for path in paths], title=title)


def sampled(title: str, pipe: diffuse_jax.DiffusionPipeline, prompts: Sequence[str]) -> Row:
    """Image n of the row has seed n."""
    seeds = list(range(len(prompts)))
    images = pipe(list(prompts), num_inference_steps=25, guidance_scale=3.0, seed=seeds).images  # type: ignore[operator]
    return Row(images, prompts, title=title)


if __name__ == "__main__":
    main()
