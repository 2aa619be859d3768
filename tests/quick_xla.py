"""Settings of XLA under which tiny networks compile quickly; importing this starts no backend."""

from __future__ import annotations

import importlib.util
import mmap
from pathlib import Path

SIMPLE_FUSIONS = "xla_cpu_use_fusion_emitters"
WHOLE_MODULES = "xla_cpu_parallel_codegen_split_count"


def is_known(flag: str) -> bool:
    """Whether this jaxlib has the flag: XLA ends the process at one that it does not know, and lists them nowhere.

    Its library has the names of flags as C strings. Those of former flags are in there too, but inside other data.
    """
    spec = importlib.util.find_spec("jaxlib")
    assert spec is not None
    assert spec.origin is not None
    for library in Path(spec.origin).parent.glob("*jax_common*"):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(flag.encode() + b"\0") >= 0:
                return True
    return False


# Compilation is most of the tests' time, and this emitter of fused loops nearly half of that. Splitting a program to
# compile its pieces in parallel is a sixth of the rest; with as many test processes as cores it gains nothing.
FLAGS = "--xla_backend_optimization_level=0"
FLAGS += f" --{SIMPLE_FUSIONS}=false" if is_known(SIMPLE_FUSIONS) else ""
FLAGS += f" --{WHOLE_MODULES}=1" if is_known(WHOLE_MODULES) else ""


def xla_flags(devices: int = 1) -> str:
    """``XLA_FLAGS`` of a process that tests start or run in, with so many virtual devices."""
    return f"--xla_force_host_platform_device_count={devices} {FLAGS}"
