"""Traces of ``jax.profiler`` on request (``--profile_steps``, ``--profile_validation``, ``--profile_memory``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax

from diffuse_jax.training.settings import ProfileSettings


class Profiler:
    """Writes traces to ``OUTPUT/profile``; open the folder with TensorBoard's profile plugin or Perfetto.

    Args:
      settings: what to trace.
      output: the folder of the run.
      first: number of training steps completed before this run. The first step of the run, which compiles, is never
        traced.
    """

    def __init__(self, settings: ProfileSettings, output: Path, first: int) -> None:
        self._settings, self._folder = settings, output / "profile"
        self._begin, self._end = first + 1, first + 1 + settings.profile_steps
        self._tracing = False

    @contextmanager
    def step(self, n: int) -> Iterator[None]:
        """Wrap step ``n``, counted from 0; the first of the traced steps starts the trace."""
        if self._settings.profile_steps and n == self._begin:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=n):
            yield

    def after(self, n: int, results: object) -> None:
        """Call this after step ``n`` has been dispatched: the trace ends once the ``results`` of its last step are
        ready."""
        if self._tracing and n + 1 >= self._end:
            jax.block_until_ready(results)
            self.close()

    def validation(self) -> AbstractContextManager[Any]:
        """Wrap the generation of validation images at the end of the run."""
        wanted = self._settings.profile_validation and not self._tracing
        return jax.profiler.trace(str(self._folder)) if wanted else nullcontext()

    def memory(self, name: str) -> None:
        """Write a memory profile of the devices to ``OUTPUT/profile/memory_NAME.prof`` (pprof)."""
        if self._settings.profile_memory and jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.save_device_memory_profile(str(self._folder / f"memory_{name}.prof"))

    def close(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
