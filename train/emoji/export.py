"""Write a trained emoji model in the form that is shipped: float16 weights, configs, tokenizer, card with sources.

    python train/emoji/export.py --model runs/emoji/second --train_data_dir runs/emoji/data/train \\
        --output_dir diffuse_jax/assets/emoji
"""

from __future__ import annotations

import argparse
import collections
import json
import shutil
import sys
from pathlib import Path

import numpy as np

import diffuse_jax  # a class is loaded, with JAX, when it is first used

sys.path.insert(0, str(Path(__file__).resolve().parent))
from sources import CAPTIONS, SOURCES

from diffuse_jax.writing import path_text

LIMIT = 12_000_000
"""Maximum size of the folder, in bytes."""

CARD = """\
---
license: other
library_name: diffusers
tags: [text-to-image, stable-diffusion, emoji]
---

# emoji

A miniature Stable Diffusion: 64x64 emoji from text, in the style that the prompt names.

    from diffuse_jax import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("diffuse-jax/emoji")
    prompts = ["a red apple, noto style", "koala, twemoji style"]
    pipe(prompts, num_inference_steps=25, guidance_scale=5.0, seed=0).images

Prompts are "NAME, STYLE style" with a name from the Unicode emoji list and one of the styles below, at most {length}
tokens. PyTorch diffusers opens the same folder with `StableDiffusionPipeline.from_pretrained`.

Parts: a UNet of {unet:,} parameters on 16x16x4 latents (velocity prediction, a schedule that ends in pure noise), an
autoencoder of {vae:,}, a CLIP text encoder of {text:,}, a byte-pair tokenizer of {vocab:,} symbols. Weights are
float16. Trained from scratch on {total:,} images by `train/vae.py` and `train/text_to_image.py`; the page
"The shipped model" in the documentation of diffuse_jax describes how. The decoder's perceptual loss used the
features of EfficientNet-Lite0 (trained on ImageNet, Apache-2.0), of which nothing is included.

Limits: it knows emoji and nothing else. Most faces, food, plants, hearts and buttons and many animals and people come
out recognisable; thin things, hands, buildings and vehicles often come out vague, and writing is hardly ever legible.

## Sources and licences

The images that it was trained on, with thanks to all; CC-BY-4.0 requires naming their makers wherever the model is
used.

| style | images | source | made by | licence |
|---|---|---|---|---|
{rows}

Each was rendered at 64x64 on white, without other changes. Names, groups and tags are from
[{captions.title}]({captions.url}) by {captions.author} ({captions.licence}). Share-alike sets were left out. The
weights themselves are licensed under Apache-2.0, as far as rights in them exist.
"""


def main() -> None:
    args = parse_args()
    source, target = Path(args.model), Path(args.output_dir)
    sizes = {}
    kinds = {
        "unet": diffuse_jax.UNet2DConditionModel,
        "vae": diffuse_jax.AutoencoderKL,
        "text_encoder": diffuse_jax.CLIPTextModel,
    }
    for name, kind in kinds.items():
        model, params = kind.from_pretrained(source, subfolder=name)
        if name == "text_encoder":  # otherwise transformers would compute in float16 while the rest is float32
            model = model.clone(config=model.config_class.from_json(model.config.to_json() | {"dtype": "float32"}))
        model.save_pretrained(target / name, params, dtype=np.float16)
        sizes[name] = count(params)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(source / name, target / name, dirs_exist_ok=True)
    shutil.copy(source / "model_index.json", target)
    (target / "README.md").write_text(card(args, target, sizes), encoding="utf-8")
    total = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {total:,} bytes")
    if total > LIMIT:
        raise SystemExit(f"more than the limit of {LIMIT:,} bytes for the package")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=path_text, required=True, help="pipeline folder that train/text_to_image.py wrote"
    )
    parser.add_argument(
        "--train_data_dir", type=path_text, required=True, help="image folder it was trained on, for the model card"
    )
    parser.add_argument("--output_dir", type=path_text, required=True, help="folder to write")
    return parser.parse_args()


def count(params: dict[str, object]) -> int:
    """The number of parameters in a tree."""
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(params))


def card(args: argparse.Namespace, folder: Path, sizes: dict[str, int]) -> str:
    """The model card, with the number of images from each source."""
    lines = (Path(args.train_data_dir) / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    images = collections.Counter(json.loads(line)["style"] for line in lines)
    rows = [
        f"| {style} | {images[style]} | [{s.title}]({s.url}) as {s.package} {s.version} | {s.author} | {s.licence} |"
        for style, s in SOURCES.items()
    ]
    tokenizer = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
    return CARD.format(
        unet=sizes["unet"],
        vae=sizes["vae"],
        text=sizes["text_encoder"],
        vocab=len(json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))),
        length=tokenizer["model_max_length"],
        total=len(lines),
        rows="\n".join(rows),
        captions=CAPTIONS,
    )


if __name__ == "__main__":
    main()
