"""The protocol of ``pipeline.py``'s contestants: a JSON command per line on stdin, a JSON answer per line on stdout.

Contestants run in separate environments, so this file needs only the standard library.
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
    """A library that generates images.

    Attributes:
      name: name and version, as shown in the table.
      commands: name -> function; ``load(folder)`` and ``draw(prompts, steps, guidance, seed)``, which returns images.
      compilations: the number of programs compiled so far; None if the library compiles nothing.
    """

    name: str
    commands: Mapping[str, Callable[..., Any]]
    compilations: Callable[[], int] | None = None


def serve(setup: Callable[[], Contestant]) -> None:
    """Run ``setup``, which imports the library, send the contestant's name, and answer commands until stdin ends.

    An answer has the ``seconds`` that the command took, its ``processor`` seconds on all cores, how many
    ``compilations`` it caused, the process's ``peak_gib`` so far and, for images, their ``spread``; or it has an
    ``error`` message.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keep what libraries print out of the answers
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
    """Run and time one command."""
    count = contestant.compilations or int
    before, start, processor = count(), time.perf_counter(), time.process_time()
    images = contestant.commands[command.pop("do")](**command)
    answer: dict[str, Any] = {
        "seconds": time.perf_counter() - start,
        "processor": time.process_time() - processor,
        "peak_gib": peak_gib(),
    }
    if contestant.compilations is not None:
        answer["compilations"] = count() - before
    return answer if images is None else answer | {"spread": spread(images)}


def spread(images: Any) -> float:
    """The standard deviation of all pixels, 0 to 255; it is 0 if NaN in a network gave images of a single colour."""
    import numpy as np

    return float(np.stack([np.asarray(image) for image in images]).std())


def peak_gib() -> float:
    """Peak memory of this process. Linux's ``ru_maxrss`` also includes the process that started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def count_compilations() -> Callable[[], int]:
    """A function that counts the programs that XLA compiles from now on, without those from JAX's cache."""
    import jax

    events: collections.Counter[str] = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: events.update([event]))
    compiled, found = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"
    return lambda: events[compiled] - events[found]
