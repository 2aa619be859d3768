"""One update of a trainer on both sides, which tests compare and ``benchmarks/train_step.py`` times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffuse_jax.torch_backend import training
from diffuse_jax.torch_backend import training_torch as twin
from diffuse_jax.torch_backend.training_report import Compared, Tolerance, compare_updates
from diffuse_jax.training.state import Loss

LOSS, PARAMETERS = 1e-6, 1e-5
"""Accepted relative differences of the loss, and of the vector of all parameters after the step."""

ROUNDING = Tolerance(values=1e-5, gradients=1e-5, quiet=0.1, changes=1e-3)
"""Nothing between the two sides but rounding, which in a gradient that should vanish is up to 1e-6 of a typical one.

AdamW's first change is about the learning rate, 1e-3, whatever the size of a gradient, so this is 1e-6 of a parameter.
What is left of it: a change is the difference of two numbers near 0.1 or 1, of which float32 keeps 1e-8 and 1e-7; the
divisor of optax, 1 - 0.999 in float32, is 1.3e-5 off; and gradients near AdamW's epsilon, 1e-8, have errors of up to a
tenth. Where a gradient is all rounding (key biases in attention), so is the change: PARAMETERS alone holds for those.
"""


class Steps(NamedTuple):
    """What both sides need for an update, which neither has made yet.

    Attributes:
      loss: our loss.
      trained: our parameters.
      batch: our arrays ``[B,...]``.
      parameters: PyTorch's trained parameters, by the names that ``trained.named`` gives ours.
      torch_loss: computes PyTorch's loss of the same batch with the same random numbers. It keeps no array of ours
        alive, and makes nothing that a training script makes once.
      averages: pairs of PyTorch's running average and the parameter whose average it is.
    """

    loss: Loss
    trained: training.Trained
    batch: Mapping[str, Any]
    parameters: twin.Parameters
    torch_loss: Callable[[], twin.LossAndValues]
    averages: Sequence[tuple[Any, Any]] = ()

    def updates(self) -> tuple[training.Update, training.Update]:
        """Our update and PyTorch's."""
        ours = training.step_of(self.loss, self.trained, self.batch)
        return ours, twin.torch_step(self.parameters, self.torch_loss)

    def compared(self, tolerance: Tolerance = ROUNDING) -> Compared:
        """The comparison of the two; the loss and the parameters after the step agree to LOSS and PARAMETERS."""
        before = {name: parameter.detach().numpy().copy() for name, parameter in self.parameters.items()}
        ours, theirs = self.updates()
        np.testing.assert_allclose(ours.values["loss"], theirs.values["loss"], rtol=LOSS)
        moved = np.concatenate([np.ravel(before[name] + change) for name, change in theirs.changes.items()])
        apart = np.concatenate([np.ravel(ours.changes[name] - change) for name, change in theirs.changes.items()])
        assert np.linalg.norm(apart) < PARAMETERS * np.linalg.norm(moved)
        return compare_updates(ours, theirs, tolerance)
