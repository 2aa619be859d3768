"""The table of all samplers: properties read from their plans, and for each its order and what it is good for.

python -m benchmarks.sampler_properties
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffuse_jax import schedulers
from diffuse_jax.schedulers.table import MEMORY, Table

STEPS = 20
"""Properties are read from tables of this many steps and twice as many, since consistency models allow at most 40."""


class Use(NamedTuple):
    """What cannot be computed: the order of convergence (None for samplers of another kind), and advice."""

    order: str | None
    when: str


USES = {
    "DDIM": Use("1", "the reference: few surprises, 50 steps and more"),
    "DDPM": Use(
        "1", "the training process backwards; hundreds of steps; its training schedule is what fine-tuning uses"
    ),
    "PNDM": Use("2", "default of Stable Diffusion 1"),
    "EulerDiscrete": Use("1", "default of SDXL; 30 steps, all spacings of noise levels"),
    "EulerAncestralDiscrete": Use("1", "lively images with 20 to 40 steps; keeps changing with more"),
    "DPMSolverMultistep": Use("1-3", "a good first choice: 15 to 25 steps; `sde-` types for detail"),
    "UniPCMultistep": Use("2-4", "fewest steps for a given error: 8 to 20"),
    "LCM": Use(None, "networks distilled into latent consistency models, 1 to 8 steps"),
    "HeunDiscrete": Use("2", "accurate and plain; each step costs two evaluations"),
    "LMSDiscrete": Use("1-4", "smooth trajectories at 30 steps and more"),
    "KDPM2Discrete": Use("2", "like Heun, with a midpoint"),
    "KDPM2AncestralDiscrete": Use("1", "like Euler ancestral, with a midpoint"),
    "IPNDM": Use("1-4", "the multistep half of PNDM"),
    "DPMSolverSDE": Use("1", "stochastic, yet the same seed converges to one image as steps are added"),
    "DPMSolverSinglestep": Use("1-3", "like the multistep one where evaluations must not depend on earlier steps"),
    "DEISMultistep": Use("1-3", "close to DPM-Solver++ at 10 to 20 steps"),
    "SASolver": Use("1-3", "stochastic with tunable noise, 20 steps and more"),
    "TCD": Use(None, "networks distilled for trajectory consistency, 1 to 8 steps; `eta` tunes the noise"),
    "EDMEuler": Use("1", "networks with the preconditioning of EDM"),
    "EDMDPMSolverMultistep": Use("1-3", "the same, fewer steps (Playground 2.5)"),
    "CosineDPMSolverMultistep": Use("2", "Stable Audio"),
    "FlowMatchEulerDiscrete": Use("1", "flow-matching networks: SD 3, Flux"),
    "FlowMatchHeunDiscrete": Use("2", "the same with two evaluations per step"),
    "FlowMatchLCM": Use(None, "flow-matching networks distilled into consistency models"),
    "DDIMInverse": Use("1", "from an image to the noise that DDIM generates it from"),
    "DPMSolverMultistepInverse": Use("1-3", "the same for DPM-Solver++, fewer steps"),
    "DDIMParallel": Use("1", "DDIM, for solvers that work on many timesteps at once"),
    "DDPMParallel": Use("1", "DDPM, likewise"),
    "DDPMWuerstchen": Use("1", "Würstchen and Stable Cascade"),
    "UnCLIP": Use("1", "unCLIP priors and decoders"),
    "RePaint": Use("1", "inpainting with a network that was not trained for it"),
    "KarrasVe": Use("2", "the stochastic sampler of EDM, algorithm 2, for variance-exploding networks"),
    "KarrasEDM": Use("2", "the same for networks with the preconditioning of EDM, and consistency networks"),
    "ScoreSdeVp": Use("1", "score networks of Song et al., variance preserving"),
    "ScoreSdeVe": Use("1", "the same, variance exploding, with a corrector"),
    "CMStochasticIterative": Use(None, "consistency models, 1 to a few steps"),
    "ConsistencyDecoder": Use(None, "the consistency decoder of DALL-E 3's autoencoder, 2 steps"),
    "VQDiffusion": Use(None, "discrete latents"),
}
"""By class name without ``Scheduler``."""


def properties(name: str) -> dict[str, Any]:
    """A row of the table."""
    more = {"num_vec_classes": 17} if name == "VQDiffusion" else {}
    scheduler = getattr(schedulers, f"{name}Scheduler")(**more)
    row: dict[str, Any] = {"sampler": name, "order": USES[name].order}
    interchangeable = type(scheduler) in schedulers.KarrasDiffusionSchedulers
    row |= read_off(scheduler)
    return row | {"interchangeable": interchangeable, "when": USES[name].when}


def read_off(scheduler: Any) -> dict[str, Any]:
    """Noise, evaluations per step and memory tensors of a run with the default settings."""
    try:
        tables = [scheduler.table(n) for n in (STEPS, 2 * STEPS)]
    except ValueError:  # the number of steps is not free
        return {}
    if not isinstance(tables[0], Table):
        return {"adds noise": True, "evaluations per step": 1.0, "memory tensors": 0}
    per_step = (len(tables[1]) - len(tables[0])) / STEPS
    return {
        "adds noise": bool(np.any(tables[0].rows[:, 0, -1])),
        "evaluations per step": round(per_step, 2),
        "memory tensors": memory_tensors(tables[1]),
    }


def memory_tensors(table: Table) -> int:
    """How many memory tensors the evaluations read."""
    used = np.any(table.rows[:, :, 3 : 3 + MEMORY], axis=(0, 1))
    return int(used.sum())


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from common import write

    rows = [properties(name) for name in USES]
    for row in rows:
        print(row)
    about = (
        "Order is the order of convergence of deterministic runs, a range if it depends on the settings; the rest is "
        "read from the plan of the default settings. Memory tensors have the size of the sample and come on top of it. "
        "Interchangeable: "
        "works with any network that predicts noise, velocity or the clean sample on a discrete training schedule "
        "(EDMEuler is in diffusers' list of these, but is for networks with the preconditioning of EDM)."
    )
    print(write("sampler_properties", "All samplers", about, rows, "numpy"))


if __name__ == "__main__":
    main()
