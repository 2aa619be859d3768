"""How much the two sides may differ, by dtype; ``docs/parity.md`` says where the numbers come from."""

from __future__ import annotations

from typing import NamedTuple


class Tolerance(NamedTuple):
    """Maximum relative errors (Euclidean norm of the difference over that of the reference).

    Attributes:
      noise: for the initial latents, which JAX computes in float32 for both sides.
      network: for the outputs of one network or layer with equal inputs, and for initial latents that contain an
        encoded image.
      latents: for the latents after a step, each side on its own trajectory.
      pixels: for the final images.
    """

    noise: float
    network: float
    latents: float
    pixels: float


def scaled(network: float) -> Tolerance:
    """Tolerances for a network error: guidance and sampling steps amplify it, decoding dampens it again."""
    return Tolerance(noise=1e-6, network=network, latents=4 * network, pixels=2 * network)


TOLERANCES = {"float32": scaled(1e-4), "float16": scaled(0.00625), "bfloat16": scaled(0.05)}
