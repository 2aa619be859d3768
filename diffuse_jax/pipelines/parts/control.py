"""Denoisers with further inputs: images as extra channels, ControlNets, T2I-Adapters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.models.t2i_adapter import combined_features
from diffuse_jax.pipelines.method import Net, Params, Part, Rows, Step
from diffuse_jax.pipelines.parts.guidance import is_branches, per_image
from diffuse_jax.pipelines.parts.network import conditions


@dataclasses.dataclass(frozen=True)
class Beside(Part):
    """Rows concatenated to the sample as extra channels: the mask and the masked image of inpainting, the image of
    InstructPix2Pix, a depth map."""

    inner: Any
    names: tuple[str, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return self.names

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        return self.inner(params, rows, jnp.concatenate([x, *(rows[name] for name in self.names)], -1), step)


@dataclasses.dataclass(frozen=True)
class BesideScaled(Beside):
    """The same of rows that the sampler scales as it scales the sample, such as the image of latent diffusion's
    super-resolution (Rombach et al. 2022, 4.4)."""

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        scale = jnp.asarray(step.plan.input_scale)[step.i]
        return super().__call__(params, rows | {name: scale * rows[name] for name in self.names}, x, step)


@dataclasses.dataclass(frozen=True)
class Controlled(Part):
    """A denoiser with ControlNets (Zhang et al. 2023): their outputs are added inside its UNet.

    Reads, for each of the ``nets``: ``control_images``, a tuple of ``[B,H,W,C]`` in [0, 1]; ``control_scale [B,n]``,
    the strength of each; ``guess_mode`` bool ``[B]``, whether they act on the conditional branch alone, and less on
    finer levels; ``control_window`` int32 ``[B,n,2]``, the first evaluation at which each acts and the first
    at which it no longer does. None of these values is compiled in.
    """

    inner: Any
    nets: tuple[Net, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return "control_images", "control_scale", "control_window", "guess_mode"

    @property
    def adds(self) -> tuple[str, ...]:
        return ("control_features",)

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        """Embed the control images, which does not depend on the step."""
        pairs = zip(self.nets, rows["control_images"], strict=True)
        features = tuple(net.apply(params, images, method="embed") for net, images in pairs)
        return super().prepare(params, rows | {"control_features": features}, keys)

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        if is_branches(rows["states"]):
            raise TypeError(
                "a ControlNet got the branches of guidance one by one; a guidance around it must inherit from "
                "diffuse_jax.pipelines.parts.Guidance, and the ControlNet take the place of its inner denoiser"
            )
        window = rows["control_window"]
        acts = (window[..., 0] <= step.i) & (step.i < window[..., 1])
        scale = jnp.where(acts, rows["control_scale"], 0.0)
        residuals = None
        for k, net in enumerate(self.nets):
            output = net.apply(
                params, x, step.t, rows["states"], features=rows["control_features"][k], **conditions(net, rows)
            )
            tensors = jax.tree.leaves(output)
            scales = strengths(rows, scale[:, k], len(tensors), levels=not net.config.global_pool_conditions)
            weighted = [y * per_image(s, y).astype(y.dtype) for y, s in zip(tensors, scales, strict=True)]
            weighted = jax.tree.unflatten(jax.tree.structure(tuple(output)), weighted)
            residuals = weighted if residuals is None else jax.tree.map(jnp.add, residuals, weighted)
        return self.inner(params, rows | {"residuals": residuals}, x, step)


def strengths(rows: Rows, scale: jax.Array, count: int, *, levels: bool) -> list[jax.Array]:
    """The factor ``[B]`` of each of a ControlNet's ``count`` residuals, the finest first.

    Args:
      rows: with ``guess_mode``, and ``conditional`` if there is guidance.
      scale: ``[B]``, of the whole network.
      count: of residuals.
      levels: in guess mode, weaken finer levels, down to a tenth.
    """
    guess = rows["guess_mode"]
    scale = jnp.where(guess & ~rows.get("conditional", True), 0.0, scale)
    factors = np.logspace(-1, 0, count, dtype=np.float32) if levels else np.ones(count, np.float32)
    return [scale * jnp.where(guess, factor, 1.0) for factor in factors]


@dataclasses.dataclass(frozen=True)
class Steered(Part):
    """A denoiser with T2I-Adapters (Mou et al. 2023): its UNet adds what they compute from images before the loop.

    Reads, for each of the ``nets``: ``adapter_images``, a tuple of ``[B,H,W,C]`` in [0, 1], and the weights
    ``adapter_scale [B,n]``; and ``adapter_evaluations`` int32 ``[B]``, the number of evaluations, from the first, at
    which they act. None of these values is compiled in.
    """

    inner: Any
    nets: tuple[Net, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return "adapter_images", "adapter_scale", "adapter_evaluations"

    @property
    def adds(self) -> tuple[str, ...]:
        return ("adapter_features",)

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        """The weighted sum of the adapters' features, which does not depend on the step."""
        pairs = zip(self.nets, rows["adapter_images"], strict=True)
        features = combined_features([net.apply(params, images) for net, images in pairs], rows["adapter_scale"])
        return super().prepare(params, rows | {"adapter_features": features}, keys)

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        acts = step.i < rows["adapter_evaluations"]
        features = tuple(jnp.where(per_image(acts, y), y, 0) for y in rows["adapter_features"])
        return self.inner(params, rows | {"inner_residuals": features}, x, step)
