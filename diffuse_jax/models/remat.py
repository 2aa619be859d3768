"""Which parts of a network the backward pass computes again instead of keeping them (Chen et al. 2016).

==========  ===============================================  =================================================
policy      kept for the backward pass                       cost
==========  ===============================================  =================================================
``none``    everything                                       none
``blocks``  what enters each residual or transformer block   most of the forward pass once more
``full``    what enters each level of the UNet               most of the forward pass twice more
==========  ===============================================  =================================================

With ``full`` a level is computed again when its gradient is due, keeping what enters its blocks, and then each block.
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
    """The class of a residual or transformer block, computed again under "blocks" and "full"."""
    return block if policy == "none" else nn.remat(block)


def remat_level(level: Module, policy: str, **options: Any) -> Module:
    """The class of a level, computed again under "full"; ``options`` are ``nn.remat``'s."""
    return nn.remat(level, **options) if policy == "full" else level
