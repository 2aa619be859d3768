"""Decoupled cross-attention: inside a context a UNet's cross-attentions attend to images too (Ye et al. 2023, eq. 5).

Nothing about the UNet changes, so its programs without images are the same as before; scales, masks and the images are
arrays, so changing them compiles nothing.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffuse_jax.interpolation import at_queries, query_grid
from diffuse_jax.kernels import attention
from diffuse_jax.models.intercept import Call, changed_layers
from diffuse_jax.models.ip_adapter import ImageStates, IPAdapterConfig
from diffuse_jax.models.unet_2d_condition import UNet2DConditionConfig
from diffuse_jax.sharding import to_current_mesh
from diffuse_jax.weights.names import Path

logger = logging.getLogger(__name__)


class ImagePrompt(NamedTuple):
    """What one IP-Adapter adds to a UNet's cross-attentions.

    Attributes:
      states: keys and values of the ``N`` images, what :class:`~diffuse_jax.models.IPAdapter` returns.
      scale: strength, one number, or ``[B]``, or ``[B,L]`` for each of the ``L`` cross-attentions in the order of
        :func:`cross_attentions`. With ``mask`` each image has its own: ``[B,N]`` or ``[B,N,L]``.
      mask: where each image acts, ``[B,N,H,W]`` in [0, 1] at any resolution with the aspect ratio of the latents; its
        first axis may be 1. Without masks all images share one softmax.
    """

    states: ImageStates
    scale: jax.Array | float = 1.0
    mask: jax.Array | None = None


def cross_attentions(config: UNet2DConditionConfig) -> dict[Path, int]:
    """Path -> width of a UNet's cross-attentions, as IP-Adapters count them: downward, upward, middle.

    Raises:
      ValueError: the UNet has K blocks or joint attention, for which there are no IP-Adapters.
    """
    if any(level.joint for level in (*config.down_levels(), *config.up_levels(), config.mid_level())):
        raise ValueError(
            "there are no IP-Adapters for a UNet with joint attention, those of DeepFloyd IF and Kandinsky"
        )
    if config.has_k_blocks:
        raise ValueError("there are no IP-Adapters for a UNet with K blocks, that of the x2 latent upscaler")
    if config.has_joint_attention:
        raise ValueError("there are no IP-Adapters for a UNet with joint attention, as in DeepFloyd IF and Kandinsky")
    down = [(f"down_blocks_{i}", level) for i, level in enumerate(config.down_levels())]
    up = [(f"up_blocks_{i}", level) for i, level in enumerate(config.up_levels())]
    middle = [] if config.mid_block_type is None else [("mid_block", config.mid_level())]
    return {
        (block, f"attentions_{j}", f"transformer_blocks_{k}", "attn2"): level.channels
        for block, level in (*down, *up, *middle)
        for j, depth in enumerate(level.depths)
        for k in range(depth)
    }


def check_fits(adapter: IPAdapterConfig, unet: UNet2DConditionConfig) -> None:
    """Refuse an IP-Adapter that is for another UNet.

    Raises:
      ValueError: it is; the message says what both have.
    """
    have = (tuple(cross_attentions(unet).values()), unet.cross_attention_dim)
    want = (adapter.layer_widths, adapter.cross_attention_dim)
    if have == want:
        return
    show = lambda widths, dim: (
        f"{len(widths)} cross-attentions of widths {', '.join(map(str, sorted({*widths})))} to states of {dim}"
    )
    raise ValueError(f"this IP-Adapter is for a UNet with {show(*want)}; this one has {show(*have)}")


@contextlib.contextmanager
def image_prompts(config: UNet2DConditionConfig, prompts: Sequence[ImagePrompt]) -> Iterator[None]:
    """Inside this context a UNet with this configuration attends to images; enter it where the UNet is applied.

    Raises:
      ValueError: the number of layers, the widths, or a scale or mask do not fit.

    Example::

        states = adapter.apply({"params": adapter_params}, image_embeds)  # once
        with image_prompts(unet.config, [ImagePrompt(states, 0.6)]):
            y = unet.apply({"params": params}, x, t, text)
    """
    layers = {path: i for i, path in enumerate(cross_attentions(config))}
    ready = [_ready(prompt, len(layers)) for prompt in prompts]

    def change(call: Call) -> jax.Array:
        y = call.output()
        if call.name != "attend" or call.path[:-1] not in layers:
            return y
        query = call.inputs[0]
        for prompt in to_current_mesh(ready):
            y = y + _attended(query, prompt, layers[call.path[:-1]])
        return y

    with changed_layers(change):
        yield


def _ready(prompt: ImagePrompt, count: int) -> ImagePrompt:
    """With ``scale [B,N,1 or count]``, and without masks all images as one."""
    keys, values = prompt.states
    B, N = keys[0].shape[:2]
    if len(keys) != count:
        raise ValueError(f"an IP-Adapter for {len(keys)} cross-attentions cannot be added to a UNet with {count}")
    if prompt.mask is None:
        one = lambda x: x.reshape(B, 1, -1, x.shape[-1])
        keys, values, N = tuple(map(one, keys)), tuple(map(one, values)), 1
    elif prompt.mask.ndim != 4 or prompt.mask.shape[0] not in (1, B) or prompt.mask.shape[1] != N:
        raise ValueError(f"masks of an IP-Adapter must be [{B} or 1,{N},H,W], got {prompt.mask.shape}")
    scale = jnp.asarray(prompt.scale, jnp.float32)
    each = (B,) if prompt.mask is None else (B, N)
    if scale.shape not in ((), each, (*each, count)):
        raise ValueError(f"scale of an IP-Adapter must be one number, {each} or {(*each, count)}, got {scale.shape}")
    scale = scale if scale.ndim > len(each) else jnp.broadcast_to(scale, each)[..., None]
    return ImagePrompt(ImageStates(keys, values), scale.reshape(B, N, -1), prompt.mask)


def _attended(query: jax.Array, prompt: ImagePrompt, layer: int) -> jax.Array:
    """What the images add to the output of one cross-attention with this query, ``[B,L,heads,D]``."""
    total = jnp.zeros_like(query)
    B, L, heads, D = query.shape
    key, value = prompt.states.keys[layer], prompt.states.values[layer]
    if key.shape[0] != B or key.shape[-1] != heads * D:
        raise ValueError(
            f"keys of an IP-Adapter's images {key.shape} do not fit a query of {B} images and {heads * D} channels"
        )
    scale = jnp.asarray(prompt.scale)[..., layer if jnp.shape(prompt.scale)[-1] > 1 else 0].astype(query.dtype)
    split = lambda x: jnp.asarray(x, query.dtype).reshape(B, -1, heads, D)
    for i in range(key.shape[1]):
        weight = scale[:, i, None]
        if prompt.mask is not None:
            weight = weight * resized_mask(prompt.mask[:, i], L).astype(query.dtype)
        total = total + weight[..., None, None] * attention(query, split(key[:, i]), split(value[:, i]))
    return total


def resized_mask(mask: jax.Array, count: int) -> jax.Array:
    """A mask ``[B,H,W]`` at the positions of a layer, ``[B,count]``; see :func:`diffuse_jax.interpolation.at_queries`.

    The layer's height and width follow from ``count`` and the mask's aspect ratio; where they are others, a warning is
    logged.
    """
    _, H, W = mask.shape
    if math.prod(query_grid(H, W, count)) != count:
        logger.warning("a mask of %d x %d has another aspect than the image; pass masks of the image's aspect", H, W)
    return at_queries(jnp.asarray(mask, jnp.float32), count, jnp)
