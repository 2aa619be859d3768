"""What networks compute in, and what they compute again."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from diffuse_jax.models.remat import POLICIES
from diffuse_jax.training.checks import one_of

PRECISIONS: dict[str, DTypeLike] = {"no": jnp.float32, "bf16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """Precision and memory of the networks in a training step.

    Attributes:
      mixed_precision: "no" computes in float32, "bf16" in bfloat16. Trained parameters are float32 either way.
      gradient_checkpointing: the same as the policy "blocks".
      remat_policy: what the backward pass computes again to save memory, one of
        :data:`~diffuse_jax.models.remat.POLICIES`; wins over ``gradient_checkpointing``.

    Raises:
      ValueError: the precision or the policy is not known.
    """

    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    remat_policy: str | None = None

    def __post_init__(self) -> None:
        try:
            check_precision(self.mixed_precision)
        except ValueError as error:
            raise ValueError(f"mixed_precision: invalid choice: {error}") from None
        one_of(POLICIES, remat_policy=self.remat_policy)

    @property
    def dtype(self) -> np.dtype:
        """What networks compute in."""
        return jnp.dtype(PRECISIONS[self.mixed_precision])

    @property
    def remat(self) -> str:
        """What a network's ``remat`` should be."""
        return self.remat_policy or ("blocks" if self.gradient_checkpointing else "none")


def check_precision(name: str) -> None:
    """Refuse what is not a precision.

    Raises:
      ValueError: naming those that there are.
    """
    if name == "fp16":
        raise ValueError("'fp16' (gradients vanish without loss scaling; bf16 has the range of float32)")
    if name not in PRECISIONS:
        raise ValueError(f"{name!r} (choose from {', '.join(PRECISIONS)})")
