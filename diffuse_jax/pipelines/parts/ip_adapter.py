"""Images as prompts: a UNet whose cross-attentions attend to images too."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from diffuse_jax.models.image_attention import ImagePrompt, image_prompts
from diffuse_jax.pipelines.method import Net, Params, Part, Rows, Step
from diffuse_jax.pipelines.parts.guidance import count_branches, is_branches, stacked, unstacked
from diffuse_jax.pipelines.parts.network import UNet


@dataclasses.dataclass(frozen=True)
class ImagePrompted(Part):
    """A UNet with IP-Adapters (Ye et al. 2023); it stands where the UNet stood, inside ControlNets and guidance.

    Reads, one entry for each of the ``nets``: ``image_prompts``, a tuple of dicts of what the network takes, ``images``
    and for faces ``states``, each ``[B,N,...]`` or :class:`Branches` of it; ``image_scale``, a tuple of float32 arrays,
    and ``image_masks``, a tuple of arrays ``[B,N,H,W]`` or None (as in :class:`~diffuse_jax.models.ImagePrompt`).
    Embeddings, scales and masks are not compiled in.
    """

    inner: UNet
    nets: tuple[Net, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return (*self.inner.reads, "image_prompts", "image_scale", "image_masks")

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
        with image_prompts(self.inner.net.config, [ImagePrompt(*values) for values in each]):
            return self.inner(params, rows, x, step)


def with_image_prompts(denoiser: Any, nets: tuple[Net, ...]) -> Any:
    """A denoiser whose UNet, however deep inside guidance and ControlNets, has IP-Adapters."""
    if isinstance(denoiser, UNet):
        return ImagePrompted(denoiser, nets)
    inner = {field.name: getattr(denoiser, field.name) for field in dataclasses.fields(denoiser)}
    changes = {name: with_image_prompts(part, nets) for name, part in inner.items() if isinstance(part, Part)}
    return dataclasses.replace(denoiser, **changes)
