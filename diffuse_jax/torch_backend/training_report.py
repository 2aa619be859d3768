"""Two training steps side by side: rows of a table, in the order of computing, and what the first difference means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from diffuse_jax.torch_backend.differences import Difference
from diffuse_jax.torch_backend.report import Comparison, compare
from diffuse_jax.torch_backend.training import Update

SETTLED = 10
"""A number takes part in the comparison of changes if its gradient is so many times larger than the accepted error of
its parameter's gradient: AdamW's first step hardly depends on a gradient's size but on its sign."""


class Tolerance(NamedTuple):
    """Largest relative errors that are accepted.

    Attributes:
      values: of what the forward pass computes.
      gradients: of each parameter's gradient. What is smaller than the share ``quiet`` of the usual gradient (root mean
        square of all) is mostly rounding, so its error is told relative to that share: biases of keys in attention,
        for example, have no gradient but rounding.
      changes: of each parameter's change.
    """

    values: float
    gradients: float
    quiet: float
    changes: float


TOLERANCES = {
    "float32": Tolerance(values=1e-4, gradients=1e-3, quiet=1e-3, changes=1e-2),
    "bfloat16": Tolerance(values=0.05, gradients=0.3, quiet=0.03, changes=0.1),
}
"""By what the networks compute in; ``docs/parity.md`` says where the numbers come from."""


class Compared(NamedTuple):
    """What was found, in the order of computing.

    Attributes:
      values: rows of text states, noised latents, prediction, errors and loss.
      gradients: in the order in which PyTorch's backward pass finishes them, then those that it does not compute.
      norm: of all gradients.
      changes: what the update added to each parameter.
      differences: configurations and parameters that were not the same before the step.
    """

    values: list[Comparison]
    gradients: list[Comparison]
    norm: list[Comparison]
    changes: list[Comparison]
    differences: Sequence[Difference] = ()

    @property
    def rows(self) -> list[Comparison]:
        """All rows."""
        return [*self.values, *self.gradients, *self.norm, *self.changes]

    @property
    def ok(self) -> bool:
        """Nothing differs before the step, and every row is within its tolerance."""
        return not self.differences and all(row.ok for row in self.rows)


def compare_updates(ours: Update, theirs: Update, tolerance: Tolerance) -> Compared:
    """Everything that two steps computed; ``theirs`` is PyTorch's.

    A parameter that PyTorch gives no gradient (the last layer of an encoder whose last but one is used) must have a
    gradient of zeros here. Its change is not compared: PyTorch's AdamW then leaves it alone, ours decays it.

    Raises:
      ValueError: PyTorch trains a parameter that is not trained here.
    """
    if odd := theirs.gradients.keys() - ours.gradients.keys():
        raise ValueError(f"{min(odd)} and {len(odd) - 1} more parameters are trained by PyTorch only")
    values = [compare(name, ours.values[name], value, tolerance.values) for name, value in theirs.values.items()]
    typical = root_mean_square(theirs.gradients.values())
    floor = {name: tolerance.quiet * typical * math.sqrt(g.size) for name, g in ours.gradients.items()}
    unused = ours.gradients.keys() - theirs.gradients.keys()
    references = theirs.gradients | {name: np.zeros_like(ours.gradients[name]) for name in sorted(unused)}
    compared = lambda name, g: compare(f"gradient {name}", ours.gradients[name], g, tolerance.gradients, floor[name])
    gradients = [compared(name, g) for name, g in references.items()]
    changes = []
    for name, g in theirs.gradients.items():
        accepted = tolerance.gradients * max(float(np.linalg.norm(g)), floor[name]) / math.sqrt(g.size)
        settled = np.abs(g) > SETTLED * accepted
        pair = ours.changes[name][settled], theirs.changes[name][settled]
        changes.append(compare(f"change {name}", *pair, tolerance.changes))
    *values, norm = values  # the norm is worked out after all gradients
    return Compared(values, gradients, [norm], changes)


MEANING = {
    "text states": "the text encoder's forward pass: `diffuse-jax parity MODEL --component text_encoder --bisect`",
    "pooled text": "the second text encoder's output: `diffuse-jax parity MODEL --component text_encoder_2 --bisect`",
    "noised latents": "the autoencoder's encoder, its scaling_factor, or the noise schedule (betas)",
    "prediction": "the UNet's forward pass: `diffuse-jax parity MODEL --component unet --bisect`",
    "mse": "predictions agree but not what they are compared with: prediction_type, or the noise schedule (betas)",
    "prior_loss": "the pictures' errors agree but not those of the class: prior_loss_weight, or which are which",
    "loss": "the squared errors agree but not how they are weighed: snr_gamma, snr_weighting or prior_loss_weight",
    "gradient": "the loss agrees, so this is a fault in the backward pass of that layer or of the one after it",
    "grad_norm": "each gradient agrees but their norm does not: the sum over parameters",
    "change": "gradients agree but not the update: clipping or AdamW",
}
"""First word or whole name of the first row that differs -> what that means."""


def verdict(compared: Compared) -> str:
    """In words: the same, or what differs first and what that means."""
    if compared.differences:
        first, *more = map(str, compared.differences)
        return f"DIFFERENT before the step: {first}" + (f" (and {len(more)} more)" if more else "")
    bad = [row for row in compared.rows if not row.ok]
    if not bad:
        return f"the same: {len(compared.rows)} rows within tolerance"
    first = bad[0].name
    meaning = MEANING.get(first) or MEANING[first.split()[0]]
    return f"DIFFERENT: {len(bad)} of {len(compared.rows)} rows, in the order of computing first {first}:\n{meaning}"


def shown(compared: Compared, worst: int = 5) -> list[Comparison]:
    """The rows for a table: all values; of gradients and changes the one that differs first, and the worst."""
    rows = list(compared.values)
    for group in (compared.gradients, compared.norm, compared.changes):
        chosen = sorted(group, key=lambda row: -row.relative_error)[:worst]
        chosen += [row for row in group if not row.ok][:1]
        rows += [row for row in group if row in chosen]
    return rows


def root_mean_square(arrays: Iterable[np.ndarray]) -> float:
    """Of all numbers of some arrays."""
    parts = [(float(np.vdot(a, a)), a.size) for a in arrays]
    return math.sqrt(sum(square for square, _ in parts) / sum(size for _, size in parts))
