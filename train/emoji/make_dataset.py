"""Build the captioned emoji set, 64x64 on white, from public npm packages.

The result is an ordinary image folder that the scripts beside it read with ``--train_data_dir``:

    OUTPUT/train/metadata.jsonl     a line per image: file_name, text (a list of captions), label, style, licence ...
    OUTPUT/train/noto/red-apple.png
    OUTPUT/heldout/...              a tenth of the (concept, style) pairs, never trained on
    OUTPUT/common/metadata.jsonl    the lines of train/ with common concepts
    OUTPUT/mixed/metadata.jsonl     all lines of train/, those with common concepts seven times: 57 % of them

Needs ``npm`` (to fetch the packages) and ``resvg-py`` (to draw the SVG files; ``pip install '.[train]'`` has it); takes
about two minutes. Example:

    python train/emoji/make_dataset.py --output_dir runs/emoji/data
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from captions import Record, captions, held_out, is_common
from sources import CAPTIONS, SOURCES, Source

from diffuse_jax.bounds import COUNT, number
from diffuse_jax.writing import path_text

LEFT_OUT_GROUPS = {"component", "flags"}
REPEATS = 6
"""Number of additional times that ``mixed/`` lists an image of a common concept."""


def main() -> None:
    args = parse_args()
    if importlib.util.find_spec("resvg_py") is None:
        raise SystemExit("resvg-py is needed to draw the SVG files; install it with: pip install '.[train]'")
    output = Path(args.output_dir)
    emoji = emoji_table(package_files(CAPTIONS, args.package_dir))
    pairs = list(draw_all(emoji, args.resolution, args.package_dir))
    records = [record for record, _ in pairs]
    for split, wanted in (("train", False), ("heldout", True)):
        chosen = [pair for pair, out in zip(pairs, held_out(records), strict=True) if out == wanted]
        lines = write_folder(output / split, chosen)
        print(f"{output / split}: {len(lines)} images of {len({line['label'] for line in lines})} concepts")
        if split == "train":
            common = [line for line in lines if is_common(line)]
            link_folder(output / "common", output / split, common)
            link_folder(output / "mixed", output / split, lines + REPEATS * common)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "folder to write; train/, heldout/, common/ and mixed/ inside are replaced"
    parser.add_argument("--output_dir", type=path_text, required=True, help=text)
    parser.add_argument("--resolution", type=number(COUNT), default=64, help="size of the images (default 64)")
    parser.add_argument(
        "--package_dir", type=path_text, default="runs/npm", help="folder for downloaded packages (default runs/npm)"
    )
    return parser.parse_args()


def package_files(source: Source, folder: str) -> dict[str, Any]:
    """The English or icon JSON files of an npm package by file name; fetched with ``npm pack`` on first use."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    name = f"{source.package}@{source.version}"
    archive = target / f"{source.package.removeprefix('@').replace('/', '-')}-{source.version}.tgz"
    if not archive.exists():
        if shutil.which("npm") is None:
            raise SystemExit(f"npm is needed to fetch {name}; install it or put {archive.name} into {target}")
        subprocess.run(["npm", "pack", "--silent", name], cwd=target, check=True, stdout=subprocess.DEVNULL)
    wanted = {"package/icons.json", "package/en/data.json", "package/en/messages.json"}
    with tarfile.open(archive) as tar:
        return {Path(m.name).name: json.load(tar.extractfile(m)) for m in tar if m.name in wanted}


def emoji_table(files: dict[str, Any]) -> dict[str, Record]:
    """Slug of the label -> label, group, subgroup, tags, hexcode, in the order of the code points' names."""
    messages = files["messages.json"]
    groups, subgroups = ({g["order"]: g for g in messages[key]} for key in ("groups", "subgroups"))
    table = {}
    for entry in sorted(files["data.json"], key=lambda e: e["label"]):
        group = groups.get(entry.get("group"))
        if group is None or group["key"] in LEFT_OUT_GROUPS or entry["label"].startswith("keycap"):
            continue
        table[slug(entry["label"])] = {
            "label": entry["label"].replace("’", "'"),
            "group": group["message"],
            "subgroup": subgroups[entry["subgroup"]]["message"],
            "tags": entry.get("tags", []),
            "hexcode": entry["hexcode"],
        }
    return table


def slug(label: str) -> str:
    """ "Piñata: a test" -> "pinata-a-test", the way icon names are made."""
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain.replace("'", "")).strip("-")


def draw_all(emoji: dict[str, Record], resolution: int, package_dir: str) -> Iterator[tuple[Record, Image.Image]]:
    """Every existing (concept, style) pair, as its record and its image."""
    for style, source in SOURCES.items():
        icons = package_files(source, package_dir)["icons.json"]
        found = {name: svg(icons, name) for name in emoji}
        for name, drawing in tqdm([f for f in found.items() if f[1]], desc=style, file=sys.stderr):
            head = {"style": style, "license": source.licence, "source": f"{source.package}@{source.version}"}
            yield emoji[name] | head, draw(drawing, resolution)


def svg(icons: dict[str, Any], name: str) -> str | None:
    """The SVG source of an icon; None if the set does not have it under this name (aliases are left out)."""
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head = f'<svg {names} width="{width}" height="{height}"'
    return f'{head} viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'


def draw(source: str, resolution: int) -> Image.Image:
    """Rasterise an SVG to an RGB square, centred on white."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=source, width=resolution, height=resolution, background="#ffffff")
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    square = Image.new("RGB", (resolution, resolution), "white")
    square.paste(image, ((resolution - image.width) // 2, (resolution - image.height) // 2))
    return square


def write_folder(folder: Path, pairs: list[tuple[Record, Image.Image]]) -> list[Record]:
    """Write images and ``metadata.jsonl``, replacing existing ones; returns the lines."""
    shutil.rmtree(folder, ignore_errors=True)
    lines = []
    for record, image in pairs:
        path = folder / slug(record["style"]) / f"{slug(record['label'])}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        lines.append({"file_name": str(path.relative_to(folder)), "text": captions(record)} | record)
    write_lines(folder, lines)
    return lines


def link_folder(folder: Path, source: Path, lines: list[Record]) -> None:
    """Write an image folder with some lines of ``source``, replacing an existing one; its images are not copied."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in {line["file_name"] for line in lines}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(source / name, folder / name)
    write_lines(folder, lines)


def write_lines(folder: Path, lines: list[Record]) -> None:
    """Write ``metadata.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
