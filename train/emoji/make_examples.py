"""Generate the images of the fine-tuning examples: a character that no emoji shows, and a style without a name.

    OUTPUT/character/*.png           eight drawings of one small robot, from the parts below
    OUTPUT/style/metadata.jsonl      forty images of the style streamline; in the captions {} stands for its name

Needs ``resvg-py`` and the folder that make_dataset.py wrote. Example:

    python train/emoji/make_examples.py --data_dir runs/emoji/data --output_dir runs/emoji/examples
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from pathlib import Path

import numpy as np

from diffuse_jax.writing import path_text

STYLE, IMAGES = "streamline", 40

BODY = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64"><rect width="64" height="64" fill="#fff"/>
<path d="M32 14V6" stroke="#444" stroke-width="3"/><circle cx="32" cy="5" r="4" fill="#e8427c"/>
<rect x="12" y="13" width="40" height="34" rx="9" fill="#19a7a0" stroke="#0b5f5b" stroke-width="2"/>
<circle cx="32" cy="27" r="10" fill="#fff" stroke="#0b5f5b" stroke-width="2"/>
<circle cx="{eye}" cy="27" r="4.5" fill="#222"/>{mouth}{arms}
<rect x="18" y="47" width="9" height="11" rx="3" fill="#e8427c"/>
<rect x="37" y="47" width="9" height="11" rx="3" fill="#e8427c"/></svg>"""
EYES = (29, 35)
MOUTHS = (
    '<path d="M24 41h16" stroke="#0b5f5b" stroke-width="3"/>',
    '<path d="M24 39q8 8 16 0" stroke="#0b5f5b" stroke-width="3" fill="none"/>',
)
ARMS = (
    '<path d="M12 30L4 40M52 30L60 40" stroke="#0b5f5b" stroke-width="4" stroke-linecap="round"/>',
    '<path d="M12 30L4 20M52 30L60 20" stroke="#0b5f5b" stroke-width="4" stroke-linecap="round"/>',
)


def main() -> None:
    args = parse_args()
    output = Path(args.output_dir)
    draw_character(output / "character")
    count = copy_style(Path(args.data_dir) / "train", output / "style")
    print(f"{output}: {len(EYES) * len(MOUTHS) * len(ARMS)} drawings of a character, {count} images of a style")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=path_text, required=True, help="folder that make_dataset.py wrote")
    parser.add_argument("--output_dir", type=path_text, required=True, help="folder to write")
    return parser.parse_args()


def draw_character(folder: Path) -> None:
    """Every combination of eye, mouth and arms."""
    import resvg_py

    folder.mkdir(parents=True, exist_ok=True)
    for n, (eye, mouth, arms) in enumerate(itertools.product(EYES, MOUTHS, ARMS)):
        svg = BODY.format(eye=eye, mouth=mouth, arms=arms)
        (folder / f"{n}.png").write_bytes(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=64, height=64)))


def copy_style(source: Path, folder: Path) -> int:
    """A random selection of images of one style, with a fixed seed and captions that do not name the style."""
    lines = [json.loads(line) for line in (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line["style"] == STYLE]
    chosen = np.random.default_rng(0).choice(len(lines), IMAGES, replace=False)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for line in (lines[i] for i in chosen):
        name = Path(line["file_name"]).name
        shutil.copy(source / line["file_name"], folder / name)
        written.append(json.dumps({"file_name": name, "text": f"{line['label']}, {{}} style"}))
    (folder / "metadata.jsonl").write_text("\n".join(written) + "\n", encoding="utf-8")
    return len(written)


if __name__ == "__main__":
    main()
