"""Images as prompts: their encoder, and a UNet whose cross-attentions attend to them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffuse_jax.models.image_attention import ImagePrompt, image_prompts
from diffuse_jax.pipelines.method import Net, Params, Part, Rows, Step, all_parts
from diffuse_jax.pipelines.parts.guidance import Branches, count_branches, is_branches, stacked, unstacked
from diffuse_jax.pipelines.parts.network import UNet

COMPONENT = "ip_adapter"
"""The name of the adapters' trees among the parameters."""


@dataclasses.dataclass(frozen=True)
class EncodeImages(Part):
    """A CLIP vision encoder for IP-Adapters.

    Reads ``prompt_pixels``, a tuple of pixel values ``[B,N,h,w,3]``, one for each adapter; and ``prompted``, bool
    ``[B]`` or :class:`Branches` of it: which branches of guidance see the images. The others get zeros, or the hidden
    states of a black image. Adds ``image_prompts``.

    Attributes:
      net: the encoder.
      states: for each adapter, whether it takes hidden states instead of embeddings.
    """

    net: Net
    states: tuple[bool, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return "prompt_pixels", "prompted"

    @property
    def adds(self) -> tuple[str, ...]:
        return ("image_prompts",)

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        prompts = []
        for pixels, states in zip(rows["prompt_pixels"], self.states, strict=True):
            found, without = encoded(self.net, params, pixels, states)
            prompts.append({"images": for_branches(found, without, rows["prompted"])})
        return rows | {"image_prompts": tuple(prompts)}


def encoded(net: Net, params: Params, pixels: jax.Array, states: bool) -> tuple[jax.Array, jax.Array]:
    """Images ``[B,N,h,w,3]`` as embeddings ``[B,N,D]``, or with ``states`` as the hidden states before the last layer
    ``[B,N,T,D]``; and what stands for no image, ``[1,1,D]`` of zeros or the states of zeros ``[1,1,T,D]``."""
    of = lambda output: output.hidden_states[-2] if states else output.image_embeds
    found = of(net.apply(params, pixels.reshape(-1, *pixels.shape[2:])))
    found = found.reshape(*pixels.shape[:2], *found.shape[1:])
    none = of(net.apply(params, jnp.zeros_like(pixels[:1, 0])))[None] if states else jnp.zeros_like(found[:1, :1])
    return found, none


def for_branches(found: jax.Array, without: jax.Array, prompted: Any) -> Any:
    """``found [B, ...]`` in the branches that are prompted, ``without [1, ...]`` in the others."""
    if not is_branches(prompted):
        return found
    sees = prompted.values.reshape(*prompted.values.shape, *(1,) * (found.ndim - 1))
    return Branches(jnp.where(sees, found[:, None], without[:, None]))


@dataclasses.dataclass(frozen=True)
class ImagePrompted(Part):
    """A UNet with IP-Adapters (Ye et al. 2023); it stands where the UNet stood, inside ControlNets and guidance.

    Reads, one entry for each of the ``nets``: ``image_prompts``, a tuple of dicts of what the network takes, ``images``
    and for faces ``states``, each ``[B,N,...]`` or :class:`Branches` of it; ``image_scale``, a tuple of float32 arrays,
    and ``image_masks``, a tuple of arrays ``[B,N,H,W]`` or None (as in :class:`~diffuse_jax.models.ImagePrompt`).
    Embeddings, scales and masks are not compiled in.

    Attributes:
      inner: the UNet, or a part around it.
      nets: the adapters.
      masked: whether there are masks.
    """

    inner: Any
    nets: tuple[Net, ...]
    masked: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        return "image_prompts", "image_scale", "image_masks"

    @property
    def adds(self) -> tuple[str, ...]:
        return ("image_states",)

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        """Compute keys and values of the images, which do not depend on the step."""
        states = []
        for net, given in zip(self.nets, rows["image_prompts"], strict=True):
            count = count_branches(given)
            computed = net.apply(params, **{name: stacked(value) for name, value in given.items()})
            branched = any(map(is_branches, given.values()))
            states.append(jax.tree.map(lambda x, n=count: unstacked(x, n), computed) if branched else computed)
        return super().prepare(params, rows | {"image_states": tuple(states)}, keys)

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        each = zip(rows["image_states"], rows["image_scale"], rows["image_masks"], strict=True)
        unet = next(part.net for part in all_parts(self.inner) if isinstance(part, UNet))
        with image_prompts(unet.config, [ImagePrompt(*values) for values in each]):
            return self.inner(params, rows, x, step)
