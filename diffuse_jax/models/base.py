"""What every network of the library has in common: a frozen config, two dtypes, and a tree of shapes."""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.config import Config

Params = dict[str, Any]
"""A tree of arrays: nested dicts whose joined keys are the checkpoint's names."""


class Model(nn.Module):
    """A pure network: ``model.apply({"params": params}, ...)``; its only collection is ``params``.

    Attributes:
      config: the frozen configuration; the only thing that decides the tree of parameters.
      dtype: what the network computes in; norms, softmax and timesteps stay in float32.
      param_dtype: what fresh parameters are created in; loaded ones keep the dtype they were read with.
    """

    config: Config
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    config_class: ClassVar[type[Config]]
    weights_name: ClassVar[str] = "diffusion_pytorch_model"
    """Stem of the weight files in a folder; transformers' encoders use ``model``."""

    def example_inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Keyword arguments of ``__call__`` as shapes, of the smallest size that touches every parameter."""
        raise NotImplementedError

    def shapes(self) -> Params:
        """The tree of parameters as ``jax.ShapeDtypeStruct`` in ``param_dtype``; allocates and compiles nothing."""
        init = lambda inputs: self.init(jax.random.key(0), **inputs)["params"]  # noqa: E731
        return jax.eval_shape(init, self.example_inputs())
