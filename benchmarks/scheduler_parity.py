"""Difference between each sampler's trajectory and PyTorch diffusers', for every option.

    python -m benchmarks.scheduler_parity --output docs/results/scheduler_parity.json

The network is a fixed nonlinear function; stochastic samplers get the same noise on both sides. An error is the largest
absolute difference over the whole trajectory, divided by the largest absolute value in it. There are three:

* ``float64``: the NumPy table against diffusers with its float32 tables and arithmetic replaced by float64,
* ``float32``: the compiled JAX loop against the same,
* ``stock``: the compiled JAX loop against diffusers as it is, whose own tables are float32.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scheduler_cases import cases
from benchmarks.scheduler_cases.case import Case, Theirs
from benchmarks.scheduler_cases.torch_side import built, patched, torch_class

KINDS = ("float64", "float32", "stock")
ABOUT = (
    "Largest difference over trajectories of 1, 2, 3, 5, 10, 20, 50 and 999 steps, relative to their largest value,"
    " for every option of every sampler, with a fixed nonlinear function as the network. float64: the NumPy table"
    " against diffusers in float64; float32: the compiled loop against the same; stock: the compiled loop against"
    " diffusers as installed, whose own tables are float32 (and whose spacings by exponential or beta sigmas, and by"
    " Karras sigmas on the cosine schedule, round the first timestep down by one; SA-Solver loses digits at 999 steps)."
)

SHAPE = (2, 4, 4, 3)
MOST_EVALUATIONS = 2048


def network(x: Any, t: Any, lib: Any, *, variance: str, axis: int) -> Any:
    """A smooth nonlinear function of sample and timestep in place of a network."""
    out = 0.9 * x + 0.2 * lib.sin(1.5 * x + 0.002 * t)
    if not variance:
        return out
    # A variance is positive; a position in a range of variances need not be.
    return lib.concatenate([out, 0.01 * lib.tanh(x) ** 2 if variance == "learned" else lib.tanh(x)], axis)


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


def torch_trajectory(case: Case, n: int, noise: np.ndarray, *, double: bool) -> np.ndarray:
    """The samples of diffusers; ``noise[0]`` starts the run, ``noise[1]`` is the input of image-to-image."""
    import torch

    cls = torch_class(case.scheduler)
    z = torch.from_numpy(np.moveaxis(noise, -1, 2).copy()).to(torch.float64 if double else torch.float32)
    variance = case.config.get("variance_type") or ""
    variance = variance if variance.startswith("learned") else ""
    theirs = Theirs(None, None, lambda x, t: network(x, float(t), torch, variance=variance, axis=1), z[0], z[2:])
    with patched(importlib.import_module(cls.__module__), theirs.draw, double=double):
        scheduler = built(cls, {k: list(v) if isinstance(v, tuple) else v for k, v in case.config.items()})
        names = inspect.signature(scheduler.set_timesteps).parameters
        # The pipelines leave out the first steps themselves, whatever else a sampler would do with a strength.
        options = {k: v for k, v in case.plan.items() if k in names and k != "strength"}
        scheduler.set_timesteps(**({"num_inference_steps": n} if n else {}), **options)
        given = n or len(scheduler.timesteps)
        left_out = given - int(given * case.plan.get("strength", 1.0))
        left_out *= getattr(scheduler, "order", 1)
        run = slice(0, len(scheduler.timesteps) - left_out) if _scheduler(case).ascends else slice(left_out, None)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(run.start)
        theirs.scheduler, theirs.timesteps = scheduler, scheduler.timesteps[run]
        if _from_image(case):
            t = theirs.timesteps[:1].repeat(len(z[0]))
            flow = hasattr(scheduler, "scale_noise")
            theirs.start = scheduler.scale_noise(z[1], t, z[0]) if flow else scheduler.add_noise(z[1], z[0], t)
        else:
            theirs.start = z[0] * getattr(scheduler, "init_noise_sigma", 1.0)
        samples = case.loop(theirs) if case.loop else _steps(theirs, case.step)
    return np.moveaxis(torch.stack(samples).numpy().astype(np.float64), 2, -1)


def _steps(theirs: Theirs, options: dict[str, Any]) -> list[Any]:
    samples = [theirs.start]
    for t, noise in zip(theirs.timesteps, theirs.noise, strict=False):
        theirs.drawn = noise
        scaled = getattr(theirs.scheduler, "scale_model_input", lambda x, _: x)(samples[-1], t)
        out = theirs.network(scaled, t)
        samples.append(theirs.scheduler.step(out, t, samples[-1], **options).prev_sample)
    return samples


def _from_image(case: Case) -> bool:
    return "strength" in case.plan and not _scheduler(case).ascends


# ---- this library ----------------------------------------------------------------------------------------------------


def numpy_trajectory(case: Case, n: int, noise: np.ndarray) -> np.ndarray:
    """The float64 table, executed in NumPy."""
    table = _scheduler(case).table(n or None, **case.plan)
    variance = table.learned_variance
    start = table.init_scale * noise[0]
    if _from_image(case):
        start = table.levels[0, 0] * noise[1] + table.levels[0, 1] * noise[0]

    def model(x: np.ndarray, t: float) -> np.ndarray:
        return network(x, t, np, variance=variance, axis=-1)

    return np.stack(table.run(model, start, noise[2:]))


def jax_trajectory(case: Case, n: int, noise: np.ndarray) -> np.ndarray:
    """The float32 plan in one compiled loop that all cases share."""
    plan = _scheduler(case).plan(n or None, **case.plan)
    samples = _loop()(plan, noise.astype(np.float32), _from_image(case))
    return np.asarray(samples)[: int(plan.num_evaluations) + 1].astype(np.float64)


def _scheduler(case: Case) -> Any:
    from diffuse_jax import schedulers

    return getattr(schedulers, case.scheduler).from_config(case.config)


@functools.cache
def _loop() -> Any:
    import jax
    import jax.numpy as jnp

    @jax.jit
    def run(plan: Any, noise: jax.Array, from_image: jax.Array) -> jax.Array:
        state = plan.init(noise[0])
        state = jax.tree.map(lambda a, b: jnp.where(from_image, a, b), plan.init(noise[0], noise[1]), state)
        samples = jnp.zeros((MOST_EVALUATIONS + 1, *noise.shape[1:])).at[0].set(state.sample)

        def body(i: jax.Array, carry: Any) -> Any:
            state, samples = carry
            x, t = plan.model_input(state, i), plan.timestep(i)
            out = network(x, t, jnp, variance=plan.learned_variance, axis=-1)
            state = plan.step(state, i, out, noise=noise[i + 2])
            return state, samples.at[i + 1].set(state.sample)

        return jax.lax.fori_loop(0, plan.num_evaluations, body, (state, samples))[1]

    return run


def make_noise(seed: int = 0) -> np.ndarray:
    """Initial noise, input image and noise for each evaluation, the same float32 values on every side."""
    shape = (MOST_EVALUATIONS + 2, *SHAPE)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(np.float64)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute value of ``b``; infinite if anything is not finite."""
    if a.shape != b.shape:
        raise ValueError(f"trajectories have {len(a)} and {len(b)} samples")
    error = np.abs(a - b).max() / np.abs(b).max()
    return float(error) if np.isfinite(error) else float("inf")


def compare(case: Case, n: int, noise: np.ndarray, *, stock: bool) -> dict[str, float]:
    """The errors of one case at one number of steps; the third only with ``stock``."""
    exact = torch_trajectory(case, n, noise, double=True)
    ours = jax_trajectory(case, n, noise)
    errors = {"float64": relative(numpy_trajectory(case, n, noise), exact), "float32": relative(ours, exact)}
    return errors | ({"stock": relative(ours, torch_trajectory(case, n, noise, double=False))} if stock else {})


def largest(configurations: Iterable[dict[str, float | None]], kind: str) -> float | None:
    """The largest error of a kind, ignoring None."""
    return max((e[kind] for e in configurations if e[kind] is not None), default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results/scheduler_parity.json"))
    args = parser.parse_args()
    import diffusers
    import torch

    diffusers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    noise, configs = make_noise(), {}
    for case in cases():
        errors = [compare(case, n, noise, stock=True) for n in case.steps]
        worst = {kind: max(e[kind] for e in errors) for kind in KINDS}
        # diffusers as installed gives NaN for some, which concerns only its column.
        finite = {kind: error if np.isfinite(error) or kind != "stock" else None for kind, error in worst.items()}
        configs.setdefault(case.scheduler, {})[case.label] = finite
    rows = [
        {"scheduler": name, "configurations": len(errors)} | {kind: largest(errors.values(), kind) for kind in KINDS}
        for name, errors in configs.items()
    ]
    result = {
        "title": "Sampler trajectories against PyTorch diffusers",
        "about": ABOUT,
        "machine": {"diffusers": diffusers.__version__, "torch": torch.__version__},
        "rows": rows,
        "configurations": configs,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{sum(map(len, configs.values()))} configurations, written to {args.output}")


if __name__ == "__main__":
    main()
