"""What a sampler costs compared with the network, and how many programs all samplers need.

    python -m benchmarks.sampler_overhead            # with the SD 1.5 UNet: 5 GB of memory
    python -m benchmarks.sampler_overhead --rounds 3

One compiled loop over SD 1.5 latents (2 x 64 x 64 x 4) runs any plan. Its time per evaluation without a network is the
full cost of ``model_input``, ``step`` and the loop, including noise for stochastic samplers; the UNet is timed in the
same process, in alternation. Every interchangeable sampler also runs at five step counts, and compilations are counted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPE = (2, 64, 64, 4)
STEPS = (5, 10, 20, 30, 50)
TIMED = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from common import write
    from unet_step import ours

    from diffuse_jax import schedulers

    names = [cls.__name__ for cls in schedulers.KarrasDiffusionSchedulers]
    loop, compilations = sampling_loop(), 0
    for name in names:
        for n in STEPS:
            loop(getattr(schedulers, name)().plan(n))
    compilations = loop.program._cache_size()

    unet = ours("sd15", SHAPE[1], SHAPE[0], "float32")
    plans = {name: getattr(schedulers, name)().plan(TIMED) for name in names}
    network, steps = [], {name: [] for name in names}
    for _ in range(args.rounds):
        network.append(timed(unet))
        for name, plan in plans.items():
            steps[name].append(timed(lambda plan=plan: loop(plan)) / int(plan.num_evaluations))
    network_time = statistics.median(network)
    rows = [
        {
            "sampler": name.removesuffix("Scheduler"),
            "milliseconds_per_evaluation": round(1e3 * statistics.median(times), 3),
            "percent_of_network": round(100 * statistics.median(times) / network_time, 4),
        }
        for name, times in steps.items()
    ]
    for row in rows:
        print(row)
    about = (
        f"Median time of one evaluation's `model_input` and `step` in the compiled loop without a network, latents of "
        f"{' x '.join(map(str, SHAPE))}, float32, against one SD 1.5 UNet evaluation in the same process "
        f"({network_time:.1f} s). {len(names)} interchangeable samplers at {len(STEPS)} step counts each: "
        f"{compilations} program compiled."
    )
    path = write("sampler_overhead", "Cost of a sampler compared with the network", about, rows, "jax")
    print(f"{len(names)} samplers x {len(STEPS)} step counts: {compilations} compilations; {path}")


def sampling_loop() -> Any:
    """``loop(plan)`` runs all evaluations of a plan without the network and blocks; ``loop.program`` is jitted."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def program(plan: Any, noise: jax.Array, keys: jax.Array) -> jax.Array:
        def body(i: jax.Array, state: Any) -> Any:
            return plan.step(state, i, 0.5 * plan.model_input(state, i), keys)

        return jax.lax.fori_loop(0, plan.num_evaluations, body, plan.init(noise)).sample

    noise = jax.random.normal(jax.random.key(0), SHAPE, jnp.float32)
    keys = jax.random.split(jax.random.key(1), SHAPE[0])

    def loop(plan: Any) -> jax.Array:
        return jax.block_until_ready(program(plan, noise, keys))

    loop.program = program  # type: ignore[attr-defined]
    return loop


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
