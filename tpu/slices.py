"""The TPU generations, and the slices that can be asked for.

Sources: https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e (chips, topologies, interconnect), /runtimes (software
versions) and /regions-zones, read in 2025; the machine types of GKE from
https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tpu.gcloud import Failed


@dataclass(frozen=True)
class Generation:
    """One TPU generation.

    Attributes:
      name: what people call it.
      prefix: what its accelerator types begin with.
      counted: what the number in an accelerator type counts: 1 for chips, 2 for TensorCores, of which a chip has two.
      runtime: the software version of its virtual machines for JAX.
      topologies: arrangements of chips, smallest first; one for each accelerator type.
      one_host: the largest number of chips of a slice with a single virtual machine; larger ones have 4 chips on each.
      zones: where it is offered to everybody.
      gke: the value of GKE's label ``gke-tpu-accelerator``.
      machine: GKE's machine type, with ``{}`` for the number of chips.
      interconnect: bytes per second that a chip can send over all its links, half of the bidirectional bandwidth.
      device_kinds: what ``jax.Device.device_kind`` says.
    """

    name: str
    prefix: str
    counted: int
    runtime: str
    topologies: tuple[str, ...]
    one_host: int
    zones: tuple[str, ...]
    gke: str
    machine: str
    interconnect: float
    device_kinds: tuple[str, ...]


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")

GENERATIONS = (
    Generation(
        name="v4",
        prefix="v4",
        counted=2,
        runtime="tpu-ubuntu2204-base",
        topologies=CUBES,
        one_host=4,
        zones=("us-central2-b",),
        gke="tpu-v4-podslice",
        machine="ct4p-hightpu-{}t",
        interconnect=300e9,
        device_kinds=("TPU v4",),
    ),
    Generation(
        name="v5e",
        prefix="v5litepod",
        counted=1,
        runtime="v2-alpha-tpuv5-lite",
        topologies=FLAT,
        one_host=8,
        zones=("us-central1-a", "us-south1-a", "us-west1-c", "us-west4-a", "europe-west4-b"),
        gke="tpu-v5-lite-podslice",
        machine="ct5lp-hightpu-{}t",
        interconnect=200e9,
        device_kinds=("TPU v5 lite", "TPU v5e"),
    ),
    Generation(
        name="v5p",
        prefix="v5p",
        counted=2,
        runtime="v2-alpha-tpuv5",
        topologies=(*CUBES, "16x16x16", "16x16x24"),
        one_host=4,
        zones=("us-central1-a", "us-east5-a", "europe-west4-b"),
        gke="tpu-v5p-slice",
        machine="ct5p-hightpu-{}t",
        interconnect=600e9,
        device_kinds=("TPU v5p", "TPU v5"),
    ),
    Generation(
        name="v6e",
        prefix="v6e",
        counted=1,
        runtime="v2-alpha-tpuv6e",
        topologies=FLAT,
        one_host=8,
        zones=("us-central1-b", "us-east1-d", "us-east5-a", "us-east5-b", "europe-west4-a", "asia-northeast1-b"),
        gke="tpu-v6e-slice",
        machine="ct6e-standard-{}t",
        interconnect=400e9,
        device_kinds=("TPU v6 lite", "TPU v6e"),
    ),
)


@dataclass(frozen=True)
class Slice:
    """A slice of a generation, by the arrangement of its chips."""

    generation: Generation
    topology: str

    @property
    def chips(self) -> int:
        return math.prod(int(n) for n in self.topology.split("x"))

    @property
    def chips_per_host(self) -> int:
        return self.chips if self.chips <= self.generation.one_host else 4

    @property
    def hosts(self) -> int:
        """The number of workers: virtual machines that each run the command."""
        return self.chips // self.chips_per_host

    @property
    def accelerator_type(self) -> str:
        """What gcloud calls it."""
        return f"{self.generation.prefix}-{self.chips * self.generation.counted}"

    @property
    def machine(self) -> str:
        """The machine type of its hosts in GKE."""
        return self.generation.machine.format(self.chips_per_host)


def slices_of(generation: Generation) -> list[Slice]:
    """All slices of a generation, the smallest first."""
    return [Slice(generation, topology) for topology in generation.topologies]


def parse_slice(text: str) -> Slice:
    """The slice of ``v5e-8``, gcloud's ``v5litepod-8``, or ``v5e:2x4`` as JAX writes topologies.

    Raises:
      Failed: there is no such generation, or no such slice of it; the message lists those that there are.
    """
    colon = ":" in text
    name, _, size = text.lower().partition(":" if colon else "-")
    generation = next((g for g in GENERATIONS if name in (g.name, g.prefix)), None)
    if generation is None:
        known = ", ".join(f"{g.name}-{slices_of(g)[0].accelerator_type.split('-')[1]}" for g in GENERATIONS)
        raise Failed(f"unknown TPU type {text!r}; known generations, with their smallest type: {known}")
    found = slices_of(generation)
    for one in found:
        if size == (one.topology if colon else one.accelerator_type.split("-")[1]):
            return one
    if colon:
        raise Failed(f"{generation.name} has no topology {size!r}; it has {', '.join(generation.topologies)}")
    sizes = ", ".join(one.accelerator_type.split("-")[1] for one in found)
    counts = "chips" if generation.counted == 1 else "TensorCores, two on each chip"
    raise Failed(f"there is no {generation.name}-{size}; {generation.name} comes with {sizes} ({counts})")


def generation_of(device_kind: str) -> Generation | None:
    """The generation of a device that JAX found; None if it is not one of these."""
    return next((g for g in GENERATIONS if device_kind in g.device_kinds), None)


def table() -> str:
    """All slices as text: what ``python -m tpu types`` prints."""
    lines = [f"{'type':<12} {'gcloud':<16} {'topology':<10} {'chips':>6} {'workers':>8}   runtime version, zones"]
    for generation in GENERATIONS:
        for i, one in enumerate(slices_of(generation)):
            where = f"   {generation.runtime}; {' '.join(generation.zones)}" if i == 0 else ""
            name = f"{generation.name}-{one.accelerator_type.split('-')[1]}"
            lines.append(
                f"{name:<12} {one.accelerator_type:<16} {one.topology:<10} {one.chips:>6} {one.hosts:>8}{where}"
            )
    return "\n".join(lines)
