"""Rematerialisation: which activations the backward pass recomputes instead of storing them (Chen et al. 2016).

==========  ===============================================  =================================================
policy      stored for the backward pass                     cost
==========  ===============================================  =================================================
``none``    everything                                       none
``blocks``  inputs of each residual or transformer block     most of one more forward pass
``full``    inputs of each level of the UNet                 most of two more forward passes
==========  ===============================================  =================================================

With ``full`` the backward pass recomputes a level, storing the inputs of its blocks, and then recomputes each block.
"""

from __future__ import annotations

from typing import Any, TypeVar

import flax.linen as nn

Module = TypeVar("Module", bound=type[nn.Module])

POLICIES = ("none", "blocks", "full")


def check_policy(policy: str) -> None:
    """Raise ``ValueError`` unless ``policy`` is one of :data:`POLICIES`."""
    if policy not in POLICIES:
        raise ValueError(f"remat must be one of {', '.join(POLICIES)}, got {policy!r}")


def remat_block(block: Module, policy: str) -> Module:
    """The class of a residual or transformer block, rematerialised under "blocks" and "full"."""
    return block if policy == "none" else nn.remat(block)


def remat_level(level: Module, policy: str, **options: Any) -> Module:
    """The class of a level, rematerialised under "full"; ``options`` are those of ``nn.remat``."""
    return nn.remat(level, **options) if policy == "full" else level
