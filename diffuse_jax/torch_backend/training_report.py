"""Comparing two training steps: table rows in order of computation, and the meaning of the first difference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from diffuse_jax.torch_backend.differences import Difference
from diffuse_jax.torch_backend.report import Comparison, compare
from diffuse_jax.torch_backend.training import Update

MIN_GRADIENT = 10
"""An element's change is compared only if its gradient is at least this many times the accepted error of its
parameter's gradient, because AdamW's first step depends mostly on the sign of the gradient, not on its magnitude."""


class Tolerance(NamedTuple):
    """Maximum relative errors that are accepted.

    Attributes:
      values: for values of the forward pass.
      gradients: for each parameter's gradient.
      quiet: gradients smaller than this fraction of the root mean square of all gradients are mostly rounding, so their
        error is relative to that fraction. Key biases in attention, for example, have no gradient besides rounding.
      changes: for each parameter's change.
    """

    values: float
    gradients: float
    quiet: float
    changes: float


TOLERANCES = {
    "float32": Tolerance(values=1e-4, gradients=1e-3, quiet=1e-3, changes=1e-2),
    "bfloat16": Tolerance(values=0.05, gradients=0.3, quiet=0.03, changes=0.1),
}
"""Tolerances by compute dtype; ``docs/parity.md`` says where the numbers come from."""


class Compared(NamedTuple):
    """The results of a comparison, in order of computation.

    Attributes:
      values: rows for prompt embeddings, noised latents, prediction, errors and loss.
      gradients: rows in the order in which PyTorch's backward pass finishes gradients, then those that it does not
        compute.
      norm: the row for the global gradient norm.
      changes: rows for the change of each parameter.
      differences: configurations and parameters that differed before the step.
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
        """Whether nothing differs before the step and all rows are within their tolerances."""
        return not self.differences and all(row.ok for row in self.rows)


def compare_updates(ours: Update, theirs: Update, tolerance: Tolerance) -> Compared:
    """Compare the results of two training steps; ``theirs`` is PyTorch's.

    A parameter without a gradient in PyTorch (the last layer of an encoder whose penultimate layer is used) must have a
    zero gradient here. Its change is not compared, because PyTorch's AdamW then skips it and ours applies weight decay.

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
        reliable = np.abs(g) > MIN_GRADIENT * accepted
        pair = ours.changes[name][reliable], theirs.changes[name][reliable]
        changes.append(compare(f"change {name}", *pair, tolerance.changes))
    *values, norm = values  # the norm is computed after all gradients
    return Compared(values, gradients, [norm], changes)


MEANING = {
    "prompt embeddings": "text encoder's forward pass: `diffuse-jax parity MODEL --component text_encoder --bisect`",
    "pooled embeddings": "second text encoder's output: `diffuse-jax parity MODEL --component text_encoder_2 --bisect`",
    "noised latents": "the autoencoder's encoder, its scaling_factor, or the noise schedule (betas)",
    "prediction": "the UNet's forward pass: `diffuse-jax parity MODEL --component unet --bisect`",
    "mse": "predictions agree but their targets do not: prediction_type, or the noise schedule (betas)",
    "prior_loss": "the instance errors agree but the class errors do not: prior_loss_weight, or which images are which",
    "loss": "the squared errors agree but their weights do not: snr_gamma, snr_weighting or prior_loss_weight",
    "gradient": "the loss agrees, so the fault is in the backward pass of this layer or of the next one",
    "grad_norm": "all gradients agree but their norm does not: the sum over parameters",
    "change": "gradients agree but the update does not: clipping or AdamW",
}
"""Name, or first word of the name, of the first differing row -> what that means."""


def verdict(compared: Compared) -> str:
    """A text that says that the steps are the same, or what differs first and what that means."""
    if compared.differences:
        first, *more = map(str, compared.differences)
        return f"DIFFERENT before the step: {first}" + (f" (and {len(more)} more)" if more else "")
    bad = [row for row in compared.rows if not row.ok]
    if not bad:
        return f"the same: {len(compared.rows)} rows within tolerance"
    first = bad[0].name
    meaning = MEANING.get(first) or MEANING[first.split()[0]]
    return (
        f"DIFFERENT: {len(bad)} of {len(compared.rows)} rows, in order of computation the first is {first}:\n{meaning}"
    )


def shown(compared: Compared, worst: int = 5) -> list[Comparison]:
    """The rows to show in a table: all values, and of gradients and changes the first differing and the worst ones."""
    rows = list(compared.values)
    for group in (compared.gradients, compared.norm, compared.changes):
        chosen = sorted(group, key=lambda row: -row.relative_error)[:worst]
        chosen += [row for row in group if not row.ok][:1]
        rows += [row for row in group if row in chosen]
    return rows


def root_mean_square(arrays: Iterable[np.ndarray]) -> float:
    """The root mean square of all elements of several arrays."""
    parts = [(float(np.vdot(a, a)), a.size) for a in arrays]
    return math.sqrt(sum(square for square, _ in parts) / sum(size for _, size in parts))
