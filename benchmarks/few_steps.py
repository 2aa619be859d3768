"""Does the latent consistency model of the gallery draw in few steps what its teacher draws in many?

    python -m benchmarks.few_steps --student runs/gallery/lcm --data_dir runs/emoji/data

The page of the gallery has the command that trains it. Captions are held-out pairs of a common concept and a style,
chosen with a fixed seed; image *n* has seed *n*, guidance is 4. Every image is rated by its features, those of the
frozen MobileNetV2 of ``emoji_retrieval.py``:

* ``R@1``, ``R@5``: which concept does it show? As there, but among the concepts of these captions alone.
* ``to 25 steps``: the mean cosine to the teacher's image of the same caption and noise after 25 steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import mobilenet_v2
from benchmarks.common import RESULTS, write
from benchmarks.controlnet_edges import SETTINGS, common_lines
from benchmarks.emoji_judge import Array, Data, Judge, Row, load_data
from benchmarks.emoji_retrieval import to_uint8
from diffuse_jax import DiffusionPipeline

COMPONENTS = 128
FEW = (4, 2, 1)
ABOUT = (
    "Images of the shipped model, the teacher, and of the student that the gallery distils from it; guidance 4, the"
    " same captions and noise. `evaluations`: of the network, for one image. `R@1`, `R@5`: the concept of the caption"
    " is the first, or among the first five, of {concepts} concepts, by features of a frozen MobileNetV2, among real"
    " images of other families of styles. `to 25 steps`: mean cosine to the features of the teacher's image after 25"
    " steps. Renders are the real images of the captions, which are held out."
)


def main() -> None:
    args = parse_args()
    pipe = DiffusionPipeline.from_pretrained("diffuse-jax/emoji")
    student, same_sampler = student_and_teacher(pipe, args.student)
    data, chosen = held_out(args.data_dir, args.num_samples)
    network = mobilenet_v2.load()
    judge = Judge(data, mobilenet_v2.features(network, data.images), COMPONENTS)
    prompts = [f"{data.records[i]['label']}, {data.records[i]['style']} style" for i in chosen]
    kinds: list[tuple[str, Any, int, int]] = [
        *(("teacher", pipe, steps, 2 * steps) for steps in (25, *FEW)),
        ("teacher with LCMScheduler", same_sampler, 4, 8),
        *(("student", student, steps, steps) for steps in FEW),
    ]
    rows: list[Row] = [{"images": "renders"} | hits(judge, judge.features[chosen], chosen)]
    target = None
    for name, model, steps, evaluations in kinds:
        seeds, given = list(range(len(prompts))), SETTINGS | {"num_inference_steps": steps}
        found = mobilenet_v2.features(network, to_uint8(model(prompts, seed=seeds, **given).images))
        target = found if target is None else target
        likeness = {"to 25 steps": float((judge.whiten(found) * judge.whiten(target)).sum(-1).mean())}
        head = {"images": name, "steps": steps, "evaluations": evaluations}
        rows.append(head | hits(judge, found, chosen) | likeness)
        print(rows[-1], flush=True)
    about = ABOUT.format(concepts=len(data.labels))
    print(write("few_steps", "Few steps", about, rows, "jax", folder=Path(args.output_dir)))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="runs/gallery/lcm", help="folder that lcm_distillation.py wrote")
    parser.add_argument("--data_dir", default="runs/emoji/data", help="folder that make_dataset.py wrote")
    parser.add_argument("--num_samples", type=int, default=64, help="number of captions")
    parser.add_argument("--output_dir", default=RESULTS, help="folder of the result")
    return parser.parse_args()


def student_and_teacher(pipe: Any, folder: str | Path) -> tuple[Any, Any]:
    """The student, and the teacher with the sampler of the student."""
    student = DiffusionPipeline.from_pretrained(folder)
    return student, pipe.replace(scheduler=student.scheduler)


def held_out(data_dir: str, count: int) -> tuple[Data, Array]:
    """All real images of the concepts of ``count`` held-out drawings of common things, and the numbers of those."""
    data, pair = load_data(Path(data_dir)), lambda record: (record["label"], record["style"])
    common = set(map(pair, common_lines(Path(data_dir) / "heldout")))
    every = data.choose(True, len(data.records), 0)
    numbers = np.array([i for i in every if pair(data.records[i]) in common][:count])
    kept = np.flatnonzero(np.isin(data.concepts, data.concepts[numbers]))
    few = Data([data.records[i] for i in kept], data.images[kept], data.held[kept])
    return few, np.searchsorted(kept, numbers)


def hits(judge: Judge, features: Array, chosen: Array) -> Row:
    """R@1 and R@5 of the features of images of captions."""
    found = judge.hits(features, chosen)
    return {name: float(found[name].mean()) for name in ("R@1", "R@5")}


if __name__ == "__main__":
    main()
