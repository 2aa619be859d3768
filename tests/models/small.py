"""Networks that compile quickly, for tests that compile a gradient, a training step or every operation on its own."""

from __future__ import annotations

from typing import Any


def one_level(config: Any) -> Any:
    """The UNet of the first level alone, with nothing in the middle: less than half the parameters and layers."""
    first, last = config.block_out_channels[:1], config.up_block_types[-1:]
    return config.replace(
        block_out_channels=first, down_block_types=config.down_block_types[:1], up_block_types=last, mid_block_type=None
    )
