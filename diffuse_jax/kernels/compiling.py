"""Options of the XLA compiler that suit these networks, by platform."""

from __future__ import annotations

import functools

import jax

from diffuse_jax.kernels.platform import attached_platform, current_platform
from diffuse_jax.messages import warn

# For small batches the TPU compiler moves pieces of the image to the batch axis before each convolution and back after
# it. With channels in hundreds, the copies cost more than they gain: by its own estimate for v5e, two residual blocks
# on [2, 64, 64, 320] take half the time without. It takes both options to turn it off.
OPTIONS: dict[str, dict[str, bool]] = {
    "tpu": {"xla_tpu_run_space_to_batch": False, "xla_tpu_run_space_to_batch_on_new_platforms": False}
}
"""Platform -> options."""


def compiler_options(*, attached: bool = False) -> dict[str, bool] | None:
    """The ``compiler_options`` of :func:`jax.jit` for a network on :func:`diffuse_jax.kernels.current_platform`.

    Pipelines and training steps are compiled with them; pass them to the ``jit`` of your own programs. They change how
    the program is arranged, not what it computes. Options that the attached device's compiler does not know are left
    out, so that another release of libtpu still compiles.

    Args:
      attached: for the default device of this process, whatever platform kernels are chosen for.

    Returns:
      options, or None where none are set.
    """
    here = attached_platform()
    platform = here if attached else current_platform()
    options = OPTIONS.get(platform, {})
    if platform == here:
        options = {name: value for name, value in options.items() if _known(name, value)}
    return dict(options) or None


@functools.cache
def _known(name: str, value: bool) -> bool:
    """Whether the compiler of the default device accepts an option."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        warn(f"this compiler has no option {name}; programs may be slower")
        return False
    return True
