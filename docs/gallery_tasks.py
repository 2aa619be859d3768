"""The part of the gallery that begins with images, or with networks that were trained beside the shipped model."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from gallery_sheets import SETTINGS, Sheet, thing
from PIL import Image

from diffuse_jax import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from diffuse_jax.models import CLIPVisionConfig, CLIPVisionModelWithProjection, IPAdapter, IPAdapterConfig, Params
from diffuse_jax.models.image_attention import cross_attentions
from diffuse_jax.processors import CLIPImageProcessor
from diffuse_jax.training.rewards import jpeg_sizes

ROOT = Path(__file__).resolve().parents[1]
EMOJI = ROOT / "tests" / "data" / "emoji"


def real(name: str) -> np.ndarray:
    """One of the twelve real emoji of the repository, float32 ``[64,64,3]`` in [0, 1]."""
    return np.asarray(Image.open(EMOJI / f"{name}.png").convert("RGB"), np.float32) / 255


def image_to_image(pipe: Any) -> Sheet:
    """Real emoji with another prompt, and more and more replaced."""
    pairs = {
        "red-apple": "green apple, noto style",
        "tiger-face": "cat face, noto style",
        "sunflower": "sunflower, twemoji style",
        "penguin": "penguin, fluent style",
    }
    strengths = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    images, variations = [real(name) for name in pairs], StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    given = SETTINGS | {"image": images, "seed": [0] * len(pairs)}
    columns = [variations(list(pairs.values()), strength=strength, **given).images for strength in strengths]
    rows = [[image, *row] for image, row in zip(images, zip(*columns))]
    return Sheet(rows, list(pairs.values()), ["image", *(f"{strength:g}" for strength in strengths)])


def inpainting(pipe: Any) -> Sheet:
    """The lower half of real emoji, repainted with other noise each time."""
    names = ("red-apple", "tiger-face", "penguin", "banana")
    prompts = {name: f"{name.replace('-', ' ')}, noto style" for name in names}
    inpaint, seeds = StableDiffusionInpaintPipeline.from_pipe(pipe), range(6)
    mask, rows = np.zeros((64, 64), np.float32), []
    mask[32:] = 1.0
    for name, prompt in prompts.items():
        image = real(name)
        given = SETTINGS | {"image": [image] * 6, "mask_image": [mask] * 6, "keep_unmasked": True}
        hidden = np.where(mask[..., None] > 0, np.float32(0.6), image)
        rows.append([image, hidden, *inpaint([prompt] * 6, seed=list(seeds), **given).images])
    return Sheet(rows, [*map(thing, prompts.values())], ["image", "known", *(f"seed {seed}" for seed in seeds)])


def ip_adapter(pipe: Any) -> Sheet:
    """An IP-Adapter that was never trained: it has learned nothing of images."""
    scales, prompt = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0), "grinning face, noto style"
    names = ("red-apple", "tiger-face", "rocket")
    with tempfile.TemporaryDirectory() as folder:
        weight_name = random_ip_adapter(pipe, Path(folder))
        steered = pipe.load_ip_adapter(folder, subfolder="", weight_name=weight_name)
    rows = []
    for name in names:
        given = SETTINGS | {"ip_adapter_image": Image.open(EMOJI / f"{name}.png").convert("RGB"), "seed": 0}
        images = [steered(prompt, ip_adapter_scale=scale, **given).images[0] for scale in scales]
        rows.append([real(name), *images])
    return Sheet(rows, [name.replace("-", " ") for name in names], ["image", *(f"{scale:g}" for scale in scales)])


def random_ip_adapter(pipe: Any, folder: Path) -> str:
    """Write an adapter and its image encoder with random weights; returns the name of the adapter's file."""
    unet = pipe.components["unet"].config
    width = unet.cross_attention_dim
    small = {"hidden_size": width, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
    config = CLIPVisionConfig(**small, image_size=32, patch_size=8, projection_dim=width)
    encoder = CLIPVisionModelWithProjection(config)
    encoder.save_pretrained(folder / "image_encoder", random_params(encoder.shapes()))
    CLIPImageProcessor(size=32, crop_size=(32, 32)).save_pretrained(folder / "image_encoder")
    layers = tuple(cross_attentions(unet).values())
    net = IPAdapter(IPAdapterConfig(layer_widths=layers, cross_attention_dim=width, image_width=width))
    net.save_pretrained(folder, random_params(net.shapes()))
    return "diffusion_pytorch_model.safetensors"


def random_params(shapes: Params) -> Params:
    """Weights that keep the scale of what they are applied to, so that the adapter's tokens are as large as text's."""
    rng = np.random.default_rng(0)

    def leaf(path: tuple[Any, ...], x: Any) -> np.ndarray:
        if x.ndim == 1:
            return np.full(x.shape, path[-1].key == "scale", np.float32)
        return rng.standard_normal(x.shape, np.float32) * np.float32(np.prod(x.shape[:-1])) ** -0.5

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def control(pipe: Any, args: argparse.Namespace) -> Sheet:
    """Held-out emoji drawn again from their edges and names, and from their names alone with the same noise."""
    sys.path.append(str(ROOT))
    from benchmarks.controlnet_edges import edges_and_prompts

    net = ControlNetModel.from_pretrained(Path(args.trained) / "controlnet")
    steered = StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=net)
    rows, beside, seeds = [], [], [0, 1, 2]
    for image, edges, prompt in edges_and_prompts(args.data_dir, 6):
        with_edges = steered([prompt] * 3, image=[edges] * 3, seed=seeds, **SETTINGS).images
        without = pipe([prompt] * 3, seed=seeds, **SETTINGS).images
        rows.append([image, edges.astype(np.float32) / 255, *with_edges, *without])
        beside.append(thing(prompt))
    above = ["image", "edges", *(f"seed {seed}" for seed in seeds), *["no edges"] * len(seeds)]
    return Sheet(rows, beside, above)


def loras(pipe: Any, args: argparse.Namespace) -> Sheet:
    """The same prompts and noise with two styles, alone and mixed."""
    names = ("pixel", "night")
    live = pipe
    for name in names:
        live = live.load_lora_weights(Path(args.trained) / name, adapter_name=name)
    prompts = [
        f"{label} style"
        for label in ("red apple, noto", "grinning face, fluent", "dog face, noto", "red heart, twemoji",
                      "mushroom, noto", "cat face, fluent", "watermelon, noto", "strawberry, twemoji")
    ]  # fmt: skip
    draw = lambda p: list(p(prompts, seed=list(range(8)), **SETTINGS).images)
    rows = {"the model": draw(pipe)}
    for label, weights in {"pixel": (1, 0), "night": (0, 1), "both": (1, 1), "both, 0.5": (0.5, 0.5)}.items():
        rows[label] = draw(live.set_adapters(list(names), list(map(float, weights))))
    return Sheet([*rows.values()], [*rows], [thing(prompt) for prompt in prompts])


def lcm(pipe: Any, args: argparse.Namespace) -> Sheet:
    """The teacher with many steps and few, and the student distilled from it, from the same noise."""
    sys.path.append(str(ROOT))
    from benchmarks.controlnet_edges import edges_and_prompts

    student, few = DiffusionPipeline.from_pretrained(Path(args.trained) / "lcm"), (4, 2, 1)
    same_sampler = pipe.replace(scheduler=student.scheduler)
    prompts = [prompt for _, _, prompt in edges_and_prompts(args.data_dir, 6)]
    draw = lambda model, steps: model(prompts, seed=[0] * 6, **SETTINGS | {"num_inference_steps": steps}).images
    columns = {f"{steps} step{'s' * (steps > 1)}": draw(pipe, steps) for steps in (25, *few)}
    columns |= {"LCM, 4": draw(same_sampler, 4)}
    columns |= {f"student, {steps}": draw(student, steps) for steps in few}
    return Sheet([list(row) for row in zip(*columns.values())], [*map(thing, prompts)], [*columns])


def edits(pipe: Any, args: argparse.Namespace) -> Sheet:
    """Drawings of one style, edited to another in which they are held out, and the true drawing of that style."""
    sys.path.append(str(ROOT))
    from benchmarks.emoji_edits import held_out_edits

    editor, seeds, rows, beside = DiffusionPipeline.from_pretrained(Path(args.trained) / "instruct-pix2pix"), 3, [], []
    for edit in held_out_edits(args.edits_dir, 6):
        given = SETTINGS | {"image": [edit.before] * seeds, "seed": list(range(seeds))}
        rows.append([edit.before, *editor([edit.instruction] * seeds, **given).images, edit.after])
        beside.append(edit.label)
    return Sheet(rows, beside, ["before", *(f"seed {seed}" for seed in range(seeds)), "true"])


def custom(pipe: Any, args: argparse.Namespace) -> Sheet:
    """Prompts with a learned word by the model that learned it, and without the word before, from the same noise."""
    word, folder, seeds = "<new1>", Path(args.trained) / "custom-diffusion", [0, 1]
    taught = pipe.load_attn_procs(folder).load_textual_inversion(folder / f"{word}.safetensors")
    prompts = [f"a {word} robot", f"a {word} robot, noto style", f"{word} cat face, noto style", "robot, noto style",
               "red apple, noto style"]  # fmt: skip
    rows = []
    for prompt, path in zip(prompts, sorted((Path(args.examples_dir) / "character").glob("*.png"))):
        before = pipe([prompt.replace(f"{word} ", "")] * len(seeds), seed=seeds, **SETTINGS).images
        after = taught([prompt] * len(seeds), seed=seeds, **SETTINGS).images
        rows.append([np.asarray(Image.open(path).convert("RGB"), np.float32) / 255, *before, *after])
    above = ["example", *(f"before, {seed}" for seed in seeds), *(f"after, {seed}" for seed in seeds)]
    return Sheet(rows, prompts, above)


def reward(pipe: Any, args: argparse.Namespace) -> Sheet:
    """Held-out emoji before and during tuning to small files, from the same noise; prints the mean sizes."""
    sys.path.append(str(ROOT))
    from benchmarks.controlnet_edges import edges_and_prompts

    folder, prompts = Path(args.trained) / "reward", [prompt for _, _, prompt in edges_and_prompts(args.data_dir, 6)]
    models = {"before": pipe}
    models |= {f"{n} steps": pipe.load_lora_weights(folder / f"checkpoint-{n}") for n in (20, 30, 40, 60, 80)}
    columns = {name: model(prompts, seed=[0] * 6, **SETTINGS).images for name, model in models.items()}
    for name, images in columns.items():
        print(f"{name}: {jpeg_sizes(images).mean():.2f} kB")
    return Sheet([list(row) for row in zip(*columns.values())], [*map(thing, prompts)], [*columns])


IMAGE_PARTS: dict[str, Callable[[Any], Sheet]] = {
    part.__name__: part for part in (image_to_image, inpainting, ip_adapter)
}
TRAINED_PARTS: dict[str, Callable[[Any, argparse.Namespace], Sheet]] = {
    part.__name__: part for part in (control, loras, lcm, edits, custom, reward)
}
