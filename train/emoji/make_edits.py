"""Pair drawings of the same thing in two styles, as examples of edits: "make it noto style".

    OUTPUT/train/metadata.jsonl      edits to training images: file_name (the image after), input_image, edit_prompt
    OUTPUT/heldout/metadata.jsonl    edits whose result is held out: no training saw that drawing

Inputs are training images in every other style; concepts are the common ones. Needs the folder that make_dataset.py
wrote, and must be on its file system. Example:

    python train/emoji/make_edits.py --data_dir runs/emoji/data --output_dir runs/emoji/edits --styles noto
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from captions import COMMON_STYLES, Record, is_common

from diffuse_jax.writing import path_text


def main() -> None:
    args = parse_args()
    data, output = Path(args.data_dir), Path(args.output_dir)
    inputs = read_lines(data / "train")
    for split in ("train", "heldout"):
        results = [line for line in read_lines(data / split) if is_common(line) and line["style"] in args.styles]
        edits = [pair for after in results for pair in edits_to(after, inputs)]
        write_edits(output / split, edits, data / "train", data / split)
        print(f"{output / split}: {len(edits)} edits to {len(results)} images")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=path_text, required=True, help="folder that make_dataset.py wrote")
    parser.add_argument("--output_dir", type=path_text, required=True, help="folder to write")
    known = sorted(COMMON_STYLES)
    parser.add_argument(
        "--styles", nargs="+", choices=known, default=known, help="styles after the edit (default: all)"
    )
    args = parser.parse_args()
    data, output = Path(args.data_dir).resolve(), Path(args.output_dir).resolve()
    for split in ("train", "heldout"):
        if not (data / split / "metadata.jsonl").is_file():
            parser.error(f"--data_dir {args.data_dir} has no {split}/metadata.jsonl; give a folder of make_dataset.py")
        if (output / split).is_relative_to(data / split) or (data / split).is_relative_to(output / split):
            parser.error(f"--output_dir {args.output_dir} would replace the images of --data_dir; give another folder")
    return args


def read_lines(folder: Path) -> list[Record]:
    """The lines of an image folder."""
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def edits_to(after: Record, inputs: list[Record]) -> list[tuple[Record, Record]]:
    """``(before, after)`` for every image of the same concept in another style."""
    return [
        (before, after) for before in inputs if before["label"] == after["label"] and before["style"] != after["style"]
    ]


def write_edits(folder: Path, edits: list[tuple[Record, Record]], inputs: Path, results: Path) -> None:
    """An image folder of edits, replacing an existing one; its images are not copied."""
    shutil.rmtree(folder, ignore_errors=True)
    lines = []
    for before, after in edits:
        for kind, source, record in (("before", inputs, before), ("after", results, after)):
            path = folder / kind / record["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                os.link(source / record["file_name"], path)
        names = {"file_name": f"after/{after['file_name']}", "input_image_file_name": f"before/{before['file_name']}"}
        lines.append(names | {"edit_prompt": f"make it {after['style']} style", "label": after["label"]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
