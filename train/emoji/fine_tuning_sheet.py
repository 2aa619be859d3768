"""Draw what fine-tuning changed: prompts of the examples before and after, from the same seeds.

    python train/emoji/fine_tuning_sheet.py --examples runs/emoji/examples --lora runs/emoji/zib \\
        --dreambooth runs/emoji/zib-full --word runs/emoji/word --output docs/images/emoji_fine_tuning.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from diffuse_jax import DiffusionPipeline

CELL, LINE, COLUMNS = 128, 16, 6
CHARACTER = ("a zib robot", "a zib robot", "a zib robot, noto style", "a robot, noto style", "red apple, noto style",
             "cat face, noto style")  # fmt: skip
STYLED = ("red apple", "cat face", "sun", "red heart", "mushroom", "house")


def main() -> None:
    args = parse_args()
    pipe = DiffusionPipeline.from_pretrained(args.model)
    taught = pipe.load_textual_inversion(args.word)
    shown = sorted((Path(args.examples) / "character").glob("*.png"))[:COLUMNS]
    style = sorted((Path(args.examples) / "style").glob("*.png"))[:COLUMNS]
    rows = [
        ("pictures of the character", [path.stem for path in shown], [Image.open(path) for path in shown]),
        sampled("before", pipe, CHARACTER),
        sampled("after DreamBooth with LoRA", pipe.load_lora_weights(args.lora), CHARACTER),
        sampled("after DreamBooth", DiffusionPipeline.from_pretrained(args.dreambooth), CHARACTER),
        ("pictures of the style", [path.stem for path in style], [Image.open(path) for path in style]),
        sampled("before: a word without meaning", pipe, [f"{name}, qvx style" for name in STYLED]),
        sampled("after textual inversion", taught, [f"{name}, <new> style" for name in STYLED]),
    ]
    sheet(rows).save(args.output, optimize=True)
    print(args.output)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="diffuse-jax/emoji", help="what was fine-tuned")
    parser.add_argument("--examples", required=True, help="folder that make_examples.py wrote")
    parser.add_argument("--lora", required=True, help="output of train/dreambooth_lora.py")
    parser.add_argument("--dreambooth", required=True, help="output of train/dreambooth.py")
    parser.add_argument("--word", required=True, help="output of train/textual_inversion.py")
    parser.add_argument("--output", default="docs/images/emoji_fine_tuning.png", help="picture to write")
    return parser.parse_args()


Row = tuple[str, Sequence[str], Sequence[Image.Image]]


def sampled(title: str, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Row:
    """Picture n of the row has seed n."""
    seeds = list(range(len(prompts)))
    images = pipe(list(prompts), num_inference_steps=25, guidance_scale=3.0, seed=seeds).images  # type: ignore[operator]
    return title, prompts, images


def sheet(rows: Sequence[Row]) -> Image.Image:
    """Rows of pictures with a title above and a caption below each."""
    height = CELL + 2 * LINE + 6
    page = Image.new("RGB", (COLUMNS * CELL, len(rows) * height), "white")
    pen = ImageDraw.Draw(page)
    for n, (title, captions, pictures) in enumerate(rows):
        pen.text((3, n * height + 2), title, fill="#1040a0")
        for i, (caption, picture) in enumerate(zip(captions, pictures, strict=True)):
            x, y = i * CELL, n * height + LINE
            page.paste(picture.convert("RGB").resize((CELL, CELL), Image.Resampling.BICUBIC), (x, y))
            pen.text((x + 3, y + CELL), caption[:21], fill="#202020")
    return page


if __name__ == "__main__":
    main()
