"""How far the two sides may be apart, by dtype; ``docs/parity.md`` says where the numbers come from."""

from __future__ import annotations

from typing import NamedTuple


class Tolerance(NamedTuple):
    """Largest relative errors (Euclidean norm of the difference over that of the reference).

    Attributes:
      noise: of the latents that a run starts from, which JAX makes in float32 for both.
      network: of what one network, or one layer of it, gives for equal inputs.
      latents: of latents after a step, each side on its own trajectory.
      pixels: of the pictures at the end.
    """

    noise: float
    network: float
    latents: float
    pixels: float


TOLERANCES = {
    "float32": Tolerance(noise=1e-6, network=1e-4, latents=1e-3, pixels=1e-3),
    "float16": Tolerance(noise=1e-6, network=1e-2, latents=5e-2, pixels=5e-2),
    "bfloat16": Tolerance(noise=1e-6, network=5e-2, latents=2e-1, pixels=2e-1),
}
