"""Image to image, ControlNet and a live LoRA from end to end: this library against PyTorch diffusers.

Both sides open one folder with random weights (``tiny``, ``50m``, ``sd15``), the same ControlNet and LoRA file, and
draw the same noise (``noise="torch"``), so that their images can be compared. Float32 on a CPU; each side has its own
process and they take turns::

    python benchmarks/image_tasks.py                  # SD 1.5 at 512 pixels; 13 GB of memory, 10 GB of disk
    python benchmarks/image_tasks.py --folder tiny    # to try it
    python benchmarks/image_tasks.py --apart          # one side in memory at a time, twice in turn
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -m benchmarks.image_tasks

from common import ROOT, compete, write
from folders import make_folder
from unet_step import Run, weights

TASKS = ("image to image", "ControlNet", "live LoRA")
PROMPT = "a red apple, noto style"
RANK = 16

ABOUT = (
    "Seconds from prompt and images to pixels, with the ratio to PyTorch diffusers: fastest and median of interleaved "
    "runs, and CPU time of the fastest. One image, classifier-free guidance, DDIM. `network steps` counts the UNet's "
    "evaluations (two images each, with and without the prompt); with few of them the autoencoder weighs more than in "
    "an ordinary run. The LoRA has rank 16 on attention and feed-forward layers; PyTorch runs it through PEFT, "
    "unmerged as here. `difference` is the largest one of any pixel over the standard deviation of PyTorch's image."
)


def controlnet_folder(folder: Path) -> Path:
    """A ControlNet of the folder's UNet with random weights, so that its residuals are not zero."""
    path = folder.with_name(f"{folder.name}-controlnet")
    if not path.exists():
        import jax

        from diffuse_jax import ControlNetModel, UNet2DConditionModel
        from diffuse_jax.weights.names import unflatten

        unet = UNet2DConditionModel.from_config(json.loads((folder / "unet" / "config.json").read_text()))
        scale = 2 ** (len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"]) - 1)
        embedding = (16, 32, 96, 256)[: scale.bit_length()]
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), unet.shapes())
        model, _ = ControlNetModel.from_unet(unet, zeros, conditioning_embedding_out_channels=embedding)
        model.save_pretrained(path, unflatten(weights(model)))
    return path


def lora_file(folder: Path) -> Path:
    """A LoRA with random pairs for the UNet's attention and feed-forward layers, in diffusers' layout."""
    path = folder.with_name(f"{folder.name}-lora") / "pytorch_lora_weights.safetensors"
    if not path.exists():
        import safetensors.numpy
        from live_lora import TARGETS

        from diffuse_jax import UNet2DConditionModel
        from diffuse_jax.adapters import lora
        from diffuse_jax.weights.names import torch_key

        unet = UNet2DConditionModel.from_config(json.loads((folder / "unet" / "config.json").read_text()))
        rng = np.random.default_rng(3)
        tensors = {}
        for layer, kernel in lora.adaptable(unet.shapes()).items():
            if len(kernel) != 2 or not re.search(TARGETS, "/".join(layer)):
                continue
            inputs, outputs = kernel
            name = "unet." + torch_key((*layer, "kernel")).removesuffix(".weight")
            tensors[f"{name}.lora_A.weight"] = rng.standard_normal((RANK, inputs), np.float32) * inputs**-0.5
            tensors[f"{name}.lora_B.weight"] = rng.standard_normal((outputs, RANK), np.float32) * 0.3 * RANK**-0.5
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(tensors, path)
    return path


def arguments(task: str, steps: int, side: int) -> dict[str, Any]:
    """The call's arguments that both libraries take alike; ``side`` is the image's edge in pixels."""
    from PIL import Image

    small = np.random.default_rng(4).integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
    common = {"prompt": PROMPT, "guidance_scale": 7.5, "num_inference_steps": steps}
    if task == "image to image":
        return common | {"image": image, "strength": 0.5, "num_inference_steps": 2 * steps}
    return common | ({"image": image} if task == "ControlNet" else {})


def ours(folder: Path, task: str, steps: int, side: int) -> Run:
    """This library: one compiled program."""
    import diffuse_jax as dj

    cls: Any = {"image to image": dj.StableDiffusionImg2ImgPipeline, "ControlNet": dj.StableDiffusionControlNetPipeline}
    given = (
        {"controlnet": dj.ControlNetModel.from_pretrained(controlnet_folder(folder))} if task == "ControlNet" else {}
    )
    pipe = cls.get(task, dj.StableDiffusionPipeline).from_pretrained(folder, **given)
    if task == "live LoRA":
        pipe = pipe.load_lora_weights(lora_file(folder), adapter_name="style")
    options = arguments(task, steps, side)
    return lambda: np.asarray(pipe(**options, seed=0, noise="torch", output_type="np").images, np.float32)


def theirs(folder: Path, task: str, steps: int, side: int) -> Run:
    """PyTorch diffusers, run eagerly."""
    import diffusers
    import torch

    cls: Any = {
        "image to image": diffusers.StableDiffusionImg2ImgPipeline,
        "ControlNet": diffusers.StableDiffusionControlNetPipeline,
    }
    given = {}
    if task == "ControlNet":
        given["controlnet"] = diffusers.ControlNetModel.from_pretrained(controlnet_folder(folder))
    pipe = cls.get(task, diffusers.StableDiffusionPipeline).from_pretrained(folder, safety_checker=None, **given)
    pipe.set_progress_bar_config(disable=True)
    if task == "live LoRA":
        pipe.load_lora_weights(str(lora_file(folder)), adapter_name="style")
    options = arguments(task, steps, side)
    draw = lambda: pipe(**options, generator=torch.Generator().manual_seed(0), output_type="np").images
    return lambda: np.asarray(draw(), np.float32)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", choices=("tiny", "50m", "sd15"), default="sd15")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--steps", type=int, default=4, help="evaluations of the UNet")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--apart", action="store_true", help="one side in memory at a time")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "pipelines", help="where folders are written")
    parser.add_argument("--print-only", action="store_true", help="print rows, leave docs/results unchanged")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    folder = make_folder(args.folder, args.cache)
    controlnet_folder(folder), lora_file(folder)  # before the two sides would write them at the same time
    side = json.loads((folder / "vae" / "config.json").read_text())["sample_size"]
    rows = []
    for task in args.tasks:
        given = (folder, task, args.steps, side)
        sides = {"PyTorch diffusers": (theirs, *given), "diffuse_jax": (ours, *given)}
        label = {"folder": args.folder, "task": task, "network steps": args.steps}
        rows += [label | row for row in compete(sides, args.rounds, apart=args.apart)]
        for row in rows[-2:]:
            print(json.dumps(row), file=sys.stderr)
    if not args.print_only:
        print(write("image_tasks", "Images in, control and LoRA", ABOUT, rows, "jax", "torch", "diffusers", "peft"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
