"""The two figures of the samplers page: the quality of every sampler for ordinary networks by number of evaluations.

    python -m benchmarks.sampler_quality        # a few minutes; needs matplotlib (pip install -e ".[plots]")

``samplers.png``: the problem of ``sampler_order.py``, whose answer is known: how far what comes out is from the data
(Wasserstein-1, 4000 samples). ``samplers_images.webp``: the shipped model, one prompt and seed, 2 to 32 evaluations of
the network.
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

KINDS = {
    "first order": ("DDIM", "EulerDiscrete", "EDMEuler"),
    "multistep, linear": ("PNDM", "LMSDiscrete"),
    "multistep, exponential": ("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"),
    "several evaluations a step": ("HeunDiscrete", "KDPM2Discrete", "DPMSolverSinglestep"),
    "adding noise": ("DDPM", "EulerAncestralDiscrete", "KDPM2AncestralDiscrete", "DPMSolverSDE", "SASolver"),
    "for distilled networks": ("LCM", "TCD"),
}
"""Which samplers share a panel of the chart; one that is in none would be missing from it, which is an error."""

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "images"


def build(name: str, config: dict[str, Any]) -> Scheduler:
    """A sampler with those of the settings that it supports."""
    cls = getattr(schedulers, name)
    fields = cls().to_json()
    more = {"clip_sample": False, "skip_prk_steps": True, "set_alpha_to_one": False, "timestep_spacing": "trailing"}
    return cls(**{k: v for k, v in (more | config).items() if k in fields})


def steps_for(scheduler: Scheduler, evaluations: int) -> int | None:
    """The largest number of steps within a budget of network evaluations; None if even one step exceeds it."""
    for n in range(evaluations, 0, -1):
        try:
            if len(scheduler.table(n)) <= evaluations:
                return n
        except ValueError:
            continue
    return None


def distance(scheduler: Scheduler, n: int, rng: np.random.Generator) -> float:
    """Wasserstein-1 distance between the data and the result of ``n`` steps with the exact network."""
    q = (np.arange(SAMPLES) + 0.5) / SAMPLES
    table = scheduler.table(n)
    noise = [rng.standard_normal(SAMPLES) for _ in range(len(table))]
    out = problem.solve(table, problem.quantile(q, table.levels[0])[rng.permutation(SAMPLES)], noise)[-1]
    return float(np.abs(np.sort(out) - problem.quantile(q, np.array([1.0, 0.0]))).mean())


def images(names: Sequence[str]) -> dict[str, dict[int, Array]]:
    """Images of the shipped model by sampler and evaluations."""
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


def chart(rows: list[dict[str, Any]], output: Path) -> None:
    """One panel per kind of sampler, with the others in the background."""
    lines = {
        row["sampler"]: [(n, row[f"{n} evaluations"]) for n in EVALUATIONS if row[f"{n} evaluations"] is not None]
        for row in rows
    }
    if missing := lines.keys() ^ {name for names in KINDS.values() for name in names}:
        raise ValueError(f"KINDS and the samplers differ in {sorted(missing)}")
    plt = pyplot()
    figure, axes = plt.subplots(3, 2, figsize=(7.5, 9), sharex=True, sharey=True, layout="constrained")
    for panel, (kind, names) in zip(axes.flat, KINDS.items(), strict=True):
        for line in lines.values():
            panel.loglog(*zip(*line, strict=True), color="#dddddd", linewidth=1)
        for name, colour, marker in zip(names, ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000"), "os^Dv"):
            panel.loglog(*zip(*lines[name], strict=True), color=colour, marker=marker, markersize=5, label=name)
        panel.set_title(kind, fontsize=12)
        panel.legend(fontsize=10, loc="lower left", framealpha=0.9)
        panel.set_xticks(EVALUATIONS, [str(n) for n in EVALUATIONS])
        panel.set_ylim(bottom=1e-3)  # room for the longest legend
        panel.minorticks_off()
    figure.supxlabel("network evaluations")
    figure.supylabel("distance from the data")
    figure.savefig(output, dpi=160)


def contact_sheet(made: dict[str, dict[int, Array]], output: Path) -> None:
    """One row per sampler and one column per number of evaluations."""
    figure, grid = pyplot().subplots(
        len(made), len(EVALUATIONS), figsize=(5.6, 0.7 * len(made)), squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, hspace=0, wspace=0)
    for cells, (name, images) in zip(grid, made.items(), strict=True):
        for cell, count in zip(cells, EVALUATIONS, strict=True):
            cell.axis("off")
            if count in images:
                cell.imshow(images[count], interpolation="lanczos")
        cells[0].text(-6, 32, name.removesuffix("Scheduler"), ha="right", va="center", fontsize=10)
    for cell, count in zip(grid[0], EVALUATIONS, strict=True):
        cell.set_title(str(count), fontsize=11)
    figure.savefig(output, dpi=160, pil_kwargs={"quality": 90})


def pyplot() -> Any:
    """Import matplotlib with a backend that needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the figures (default: docs/images)")
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
    args.output.mkdir(parents=True, exist_ok=True)
    chart(rows, args.output / "samplers.png")
    contact_sheet(images([name for name in names if name != OTHER_NETWORKS]), args.output / "samplers_images.webp")


if __name__ == "__main__":
    main()
