"""One update of a trainer on both sides, which tests compare and ``benchmarks/train_step.py`` times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from diffuse_jax.torch_backend import training
from diffuse_jax.torch_backend import training_torch as twin
from diffuse_jax.torch_backend.training_report import TOLERANCES, Compared, Tolerance, compare_updates
from diffuse_jax.training.state import Loss


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

    def compared(self, tolerance: Tolerance = TOLERANCES["float32"]) -> Compared:
        """The comparison of the two."""
        return compare_updates(*self.updates(), tolerance)
