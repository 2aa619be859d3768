"""The commands ``convert-lora``, ``extract-lora`` and ``merge``. Building their parsers imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from diffuse_jax.bounds import COUNT, FINITE, PORTION, number
from diffuse_jax.writing import path_text

LAYOUTS = ("diffusers", "peft", "kohya")
METHODS = ("weighted", "add-difference")


def convert_lora(args: argparse.Namespace) -> None:
    """Convert a LoRA file and print the path of the result."""
    from diffuse_jax.lora_conversion import convert_lora as convert

    print(convert(args.src, args.dst, args.to, model=args.model, dtype=args.dtype))


def extract_lora(args: argparse.Namespace) -> None:
    """Extract a LoRA from two checkpoints and print its path."""
    from diffuse_jax.lora_conversion import extract_lora as extract

    rank = 16 if args.rank is None and args.energy is None else args.rank
    print(extract(args.base, args.tuned, args.dst, rank=rank, energy=args.energy, to=args.to, dtype=args.dtype))


def merge(args: argparse.Namespace) -> None:
    """Merge checkpoints and print the path of the result."""
    from diffuse_jax.merging import merge as merge_checkpoints

    print(merge_checkpoints(args.src, args.output, weights=args.weights, method=args.method, dtype=args.dtype))


def add_commands(commands: Any, add_command: Callable[..., argparse.ArgumentParser], dtypes: Sequence[str]) -> None:
    """Add the commands to a parser's."""
    path: dict[str, Any] = {"type": path_text}

    example = "diffuse-jax convert-lora style.safetensors style-diffusers.safetensors --to diffusers"
    purpose = "convert a LoRA file to another layout and verify the result"
    add = add_command(commands, "convert-lora", convert_lora, purpose, example).add_argument
    add("src", **path, metavar="SRC", help="LoRA file in any layout, or its folder")
    add("dst", **path, metavar="DST", help=".safetensors file to write")
    add("--to", choices=LAYOUTS, default="diffusers", help="layout to write (default: %(default)s)")
    about = "pipeline that it is for (default: Stable Diffusion 1, 2 or XL, as the file shows)"
    add("--model", **path, metavar="SOURCE", help=about)
    add("--dtype", choices=dtypes, help="cast the tensors (default: unchanged)")

    example = "diffuse-jax extract-lora base-folder tuned-folder style.safetensors --rank 32"
    purpose = "write the difference of two checkpoints as a LoRA"
    add = add_command(commands, "extract-lora", extract_lora, purpose, example).add_argument
    add("base", **path, metavar="BASE", help="checkpoint that the LoRA is for: folder, Hub id or single file")
    add("tuned", **path, metavar="TUNED", help="checkpoint that it leads to")
    add("dst", **path, metavar="DST", help=".safetensors file to write")
    add("--rank", type=number(COUNT), metavar="N", help="rank of every layer (default: 16, or no bound with --energy)")
    add("--energy", type=number(PORTION), metavar="X", help="share of each layer's squared difference to keep")
    add("--to", choices=LAYOUTS, default="diffusers", help="layout to write (default: %(default)s)")
    add("--dtype", choices=dtypes, help="dtype of the pairs (default: float32)")

    example = "diffuse-jax merge a-folder b-folder --weights 0.7 0.3 --output merged-folder"
    add = add_command(commands, "merge", merge, "merge checkpoints of one architecture", example).add_argument
    add("src", **path, nargs="+", metavar="SRC", help="folders, Hub ids or single files; all else is that of the first")
    about = "one per checkpoint, with a sum of 1 (default: equal); for add-difference, the factor (default: 1)"
    add("--weights", type=number(FINITE), nargs="+", metavar="X", help=about)
    about = "weighted: the weighted sum; add-difference: A + weight * (B - C) (default: %(default)s)"
    add("--method", choices=METHODS, default="weighted", help=about)
    add("--output", **path, required=True, metavar="DIR", help="folder to write, in the layout of diffusers")
    add("--dtype", choices=dtypes, help="cast floating-point tensors (default: that of the first)")
