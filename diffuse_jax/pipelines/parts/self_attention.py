"""Self-attention guidance: away from what the network predicts once the regions that it attends to are blurred."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.models.intercept import Call, changed_layers
from diffuse_jax.pipelines.method import Params, Part, Rows, Step
from diffuse_jax.pipelines.parts.guidance import ClassifierFree, is_branches, per_image, without_keys
from diffuse_jax.schedulers.plan import State

LAYER = ("mid_block", "attentions_0", "transformer_blocks_0", "attn1", "attend")


@dataclasses.dataclass(frozen=True)
class AttentionMap(Part):
    """The network, which also passes on in ``step.kept`` what its middle block attends to."""

    inner: Any

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        def change(call: Call) -> Any:
            if call.path == LAYER:
                step.kept.write("attended", attended(call.inputs[0], call.inputs[1]))
            return call.output()

        with changed_layers(change):
            return self.inner(params, rows, x, step)


def attended(query: jax.Array, key: jax.Array) -> jax.Array:
    """The attention that each position gets, averaged over heads: ``[B,L,heads,D]`` twice -> ``[B,L]``."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores * query.shape[-1] ** -0.5, -1).mean(1).sum(1)


@dataclasses.dataclass(frozen=True)
class SelfAttention(Part):
    """Guidance that also moves away from the prediction for a degraded sample (Hong et al. 2023, arXiv 2210.00939).

    Where the middle block attends to more than on average, the clean sample that the first branch (the unconditional
    one, if there is guidance) predicts is blurred and noised again. Reads ``sag_scale [B]``.

    Attributes:
      inner: the guidance, of several branches or of one; around its network is an :class:`AttentionMap`.
      patch: edge in latent pixels of one place of the middle block.
    """

    inner: ClassifierFree
    patch: int

    @property
    def reads(self) -> tuple[str, ...]:
        return ("sag_scale",)

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        network, plan, channels = self.inner.inner, step.plan, x.shape[-1]
        output = self.inner.predictions(params, rows, x, step)
        mask = self._mask(step.kept.take("attended")[: len(x)], x.shape[1:3])
        input_scale, (alpha, _) = plan.input_scale[step.i], plan.levels[step.i]
        clean = plan.predict_x0(State(x / input_scale, ()), step.i, output[0])
        degraded = x + input_scale * alpha * mask * (gaussian_blur(clean) - clean)
        first = lambda value: value.values[:, 0] if is_branches(value) else value
        rows_of_first = jax.tree.map(first, without_keys(rows), is_leaf=is_branches)
        other = network(params, rows_of_first, degraded, step).astype(jnp.float32)
        step.kept.take("attended")
        away = per_image(rows["sag_scale"], x) * (output[0] - other)[..., :channels]
        guided = self.inner.guided(rows, x, step, output)
        return jnp.concatenate([guided[..., :channels] + away, guided[..., channels:]], -1)

    def _mask(self, attention: jax.Array, size: tuple[int, ...]) -> jax.Array:
        """1 at latent pixels that are attended to, ``[B,h,w,1]``."""
        small = [-(-length // self.patch) for length in size]
        rows, columns = (np.arange(n) * m // n for n, m in zip(size, small, strict=True))
        marked = (attention > 1).astype(jnp.float32).reshape(-1, *small, 1)
        return marked[:, rows[:, None], columns]


def gaussian_blur(x: jax.Array, size: int = 9, sigma: float = 1.0) -> jax.Array:
    """``[B,h,w,C]`` blurred by a Gaussian of ``size`` x ``size`` pixels, reflected at the edges."""
    half = size // 2
    weights = jnp.exp(-0.5 * (jnp.arange(-half, half + 1) / sigma) ** 2)
    weights = weights / weights.sum()
    for axis in (1, 2):
        pads = [(half, half) if a == axis else (0, 0) for a in range(4)]
        padded = jnp.pad(x, pads, mode="reflect")
        x = sum(w * jax.lax.slice_in_dim(padded, k, k + x.shape[axis], axis=axis) for k, w in enumerate(weights))
    return x
