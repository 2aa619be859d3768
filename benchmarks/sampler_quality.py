"""The picture of the samplers page: what every sampler for ordinary networks makes of how many evaluations.

    python -m benchmarks.sampler_quality        # a minute; needs matplotlib (pip install -e ".[plots]")

Left, the problem of ``sampler_order.py``, whose answer is known: how far what comes out is from the data
(Wasserstein-1, 4000 samples). Right, the shipped model: one prompt and seed, 2 to 32 evaluations of the network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import sampler_order as problem
from diffuse_jax import schedulers
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.scheduler import Scheduler

EVALUATIONS = (2, 4, 8, 16, 32)
SAMPLES = 4000
PROMPT, SEED = "red apple, fluent style", 3
OTHER_NETWORKS = "EDMEulerScheduler"
"""Interchangeable by its place in diffusers' list, but for networks with another preconditioning."""

MORE = ("SASolverScheduler", "LCMScheduler", "TCDScheduler")
"""Others that run on any network; the last two are made for distilled ones. The rest need networks of their own."""

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "samplers.png"


def build(name: str, config: dict[str, Any]) -> Scheduler:
    """A sampler with those of the settings that it has."""
    cls = getattr(schedulers, name)
    fields = cls().to_json()
    more = {"clip_sample": False, "skip_prk_steps": True, "set_alpha_to_one": False, "timestep_spacing": "trailing"}
    return cls(**{k: v for k, v in (more | config).items() if k in fields})


def steps_for(scheduler: Scheduler, evaluations: int) -> int | None:
    """The most steps that ask the network at most so often; None if there are none."""
    for n in range(evaluations, 0, -1):
        try:
            if len(scheduler.table(n)) <= evaluations:
                return n
        except ValueError:
            continue
    return None


def distance(scheduler: Scheduler, n: int, rng: np.random.Generator) -> float:
    """Wasserstein-1 distance between what ``n`` steps with the exact network give and the data."""
    q = (np.arange(SAMPLES) + 0.5) / SAMPLES
    table = scheduler.table(n)
    noise = [rng.standard_normal(SAMPLES) for _ in range(len(table))]
    out = problem.solve(table, problem.quantile(q, table.levels[0])[rng.permutation(SAMPLES)], noise)[-1]
    return float(np.abs(np.sort(out) - problem.quantile(q, np.array([1.0, 0.0]))).mean())


def pictures(names: Sequence[str]) -> dict[str, dict[int, Array]]:
    """Pictures of the shipped model by sampler and evaluations."""
    from diffuse_jax import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("diffuse-jax/emoji")
    config = {k: v for k, v in pipe.scheduler.to_json().items() if not k.startswith("_")}
    out: dict[str, dict[int, Array]] = {}
    for name in names:
        scheduler = build(name, config)
        steps = {count: steps_for(scheduler, count) for count in EVALUATIONS}
        out[name] = {
            count: pipe.replace(scheduler=scheduler)(
                PROMPT, num_inference_steps=n, guidance_scale=5.0, seed=SEED, output_type="np"
            ).images[0]
            for count, n in steps.items()
            if n is not None
        }
    return out


def draw(rows: list[dict[str, Any]], made: dict[str, dict[int, Array]], output: Path) -> None:
    """Chart and pictures side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 0.62 * len(made) + 1), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1))
    axes = left.subplots()
    colours = plt.get_cmap("tab20").colors
    for i, row in enumerate(rows):
        line = [(n, row[f"{n} evaluations"]) for n in EVALUATIONS if row[f"{n} evaluations"] is not None]
        style = "--" if row["stochastic"] else "-"
        axes.loglog(*zip(*line, strict=True), style, marker=".", color=colours[i % 20], label=row["sampler"])
    axes.set_xticks(EVALUATIONS, [str(n) for n in EVALUATIONS])
    axes.minorticks_off()
    axes.set_xlabel("evaluations of the network (dashed: samplers that add noise)")
    axes.set_ylabel("distance from the data, exact network")
    axes.legend(fontsize=7, ncols=2)
    grid = right.subplots(len(made), len(EVALUATIONS), squeeze=False, gridspec_kw={"hspace": 0.02, "wspace": 0.02})
    for cells, (name, own) in zip(grid, made.items(), strict=True):
        for cell, count in zip(cells, EVALUATIONS, strict=True):
            cell.axis("off")
            if count in own:
                cell.imshow(own[count])
        cells[0].text(-6, 32, name.removesuffix("Scheduler"), ha="right", va="center", fontsize=8)
    for cell, count in zip(grid[0], EVALUATIONS, strict=True):
        cell.set_title(str(count), fontsize=9)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from common import write

    rng = np.random.default_rng(0)
    names = [cls.__name__ for cls in schedulers.KarrasDiffusionSchedulers] + list(MORE)
    rows = []
    for name in names:
        scheduler = build(name, problem.SD)
        steps = {count: steps_for(scheduler, count) for count in EVALUATIONS}
        values = {
            f"{count} evaluations": None if n is None else float(f"{distance(scheduler, n, rng):.2g}")
            for count, n in steps.items()
        }
        noisy = bool(np.any(scheduler.table(10).rows[:, :, -1]))
        rows.append({"sampler": name.removesuffix("Scheduler"), "stochastic": noisy} | values)
        print(rows[-1])
    about = (
        f"Wasserstein-1 distance between {SAMPLES} samples and the data (a mixture of three Gaussians with an exact "
        "network, spread 1.0), default settings on Stable Diffusion's training schedule."
    )
    print(write("sampler_quality", "Quality against evaluations", about, rows, "numpy"))
    draw(rows, pictures([name for name in names if name != OTHER_NETWORKS]), args.output)
    print(args.output)


if __name__ == "__main__":
    main()
