"""A pipeline's run with everything that goes in and comes out between its steps, the same for both sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffuse_jax.pipelines import DiffusionPipeline, sampling
from diffuse_jax.pipelines.programs import Programs


class Trace(Programs):
    """Programs that remember; a run step by step fills it.

    Attributes:
      task, batch, plan: the static request, its data and the sampler's plan.
      prepared: the encoded prompts.
      latents: ``[images,h,w,c]`` before the first step and after every step.
      images: float32 ``[images,H,W,3]`` in [0, 1].
    """

    def __init__(self, programs: Programs) -> None:
        super().__init__()
        self._inner = programs
        self.task: Any = None
        self.batch: Any = None
        self.plan: Any = None
        self.prepared: Any = None
        self.latents: list[np.ndarray] = []
        self.images = np.zeros(0)

    def get(self, fn: Callable[..., Any], task: Any, mesh: Mesh | None, specs: tuple[Any, ...], args: Any) -> Any:
        """The program of the pipeline itself, which remembers what it is given and what it gives."""
        program = self._inner.get(fn, task, mesh, specs, args)

        def run(*arguments: Any) -> Any:
            result = program(*arguments)
            if fn is sampling.start:
                self.task, (_, self.batch, self.plan) = task, arguments
                self.prepared, state = result
                self.latents.append(np.asarray(state.sample))
            elif fn is sampling.advance:
                self.latents.append(np.asarray(result.sample))
            return result

        return run


def run_traced(pipe: DiffusionPipeline, prompts: Sequence[str], **call: Any) -> Trace:
    """Run a text-to-image pipeline step by step and remember everything; matrix products in full precision."""
    trace = Trace(pipe.programs)
    watched: Any = pipe.replace(programs=trace)
    with jax.default_matmul_precision("highest"):
        out = watched(list(prompts), output_type="np", callback_on_step_end=lambda *_: None, **call)
    trace.images = out.images
    trace.latents = [latents[: len(out.images)] for latents in trace.latents]  # without the padding
    return trace
