"""How a contestant of ``pipeline.py`` talks: a JSON command per line on stdin, a JSON answer per line on stdout.

Contestants run in environments of their own, so this file needs nothing but the standard library.
"""

from __future__ import annotations

import collections
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Contestant(NamedTuple):
    """A library that draws.

    Attributes:
      name: with its version, as it stands in the table.
      commands: name -> function; ``load(folder)`` and ``draw(prompts, steps, guidance, seed)``, which returns pictures.
      compilations: counts what has been compiled so far; None where nothing is.
    """

    name: str
    commands: Mapping[str, Callable[..., Any]]
    compilations: Callable[[], int] | None = None


def serve(setup: Callable[[], Contestant]) -> None:
    """Run ``setup``, which imports the library, say who is there, and answer commands until stdin ends.

    An answer has the ``seconds`` that the command took, its ``processor`` seconds on all cores, how many
    ``compilations`` it caused, the process's ``peak_gib`` so far and, for pictures, their ``spread``; or it is the text
    of an ``error``.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    contestant = setup()
    print(json.dumps({"name": contestant.name, "processor": time.process_time()}), file=answers)
    for line in sys.stdin:
        try:
            answer = obey(contestant, json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


def obey(contestant: Contestant, command: dict[str, Any]) -> dict[str, Any]:
    """Time one command."""
    count = contestant.compilations or int
    before, start, processor = count(), time.perf_counter(), time.process_time()
    pictures = contestant.commands[command.pop("do")](**command)
    answer: dict[str, Any] = {
        "seconds": time.perf_counter() - start,
        "processor": time.process_time() - processor,
        "peak_gib": peak_gib(),
    }
    if contestant.compilations is not None:
        answer["compilations"] = count() - before
    return answer if pictures is None else answer | {"spread": spread(pictures)}


def spread(pictures: Any) -> float:
    """The standard deviation of all pixels, 0 to 255: NaN somewhere in a network gives pictures of one colour."""
    import numpy as np

    return float(np.stack([np.asarray(picture) for picture in pictures]).std())


def peak_gib() -> float:
    """The most memory this process has had. Linux's ``ru_maxrss`` also counts the process that started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def count_compilations() -> Callable[[], int]:
    """A function that says how many programs XLA has compiled from now on, those from JAX's cache not counted."""
    import jax

    events: collections.Counter[str] = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: events.update([event]))
    compiled, found = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"
    return lambda: events[compiled] - events[found]
