"""How far the two sides may be apart, by dtype; ``docs/parity.md`` says where the numbers come from."""

from __future__ import annotations

from typing import NamedTuple


class Tolerance(NamedTuple):
    """Largest relative errors (Euclidean norm of the difference over that of the reference).

    Attributes:
      noise: of the latents that a run starts from, which JAX makes in float32 for both.
      network: of what one network, or one layer of it, gives for equal inputs; and of the latents that a run starts
        from where they hold an encoded image.
      latents: of latents after a step, each side on its own trajectory.
      pixels: of the pictures at the end.
    """

    noise: float
    network: float
    latents: float
    pixels: float


def scaled(network: float) -> Tolerance:
    """Guidance and the steps of a run amplify what the networks differ by; decoding damps it again."""
    return Tolerance(noise=1e-6, network=network, latents=4 * network, pixels=2 * network)


TOLERANCES = {"float32": scaled(1e-4), "float16": scaled(0.00625), "bfloat16": scaled(0.05)}
