"""How PyTorch's networks are called with our arguments: one entry for each class and method, arrays channel-last.

A new network needs its line here, and every pipeline that uses it then runs on PyTorch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from diffuse_jax.models.autoencoder_kl import Posterior
from diffuse_jax.models.controlnet import ControlNetOutput
from diffuse_jax.text.clip import CLIPTextOutput
from diffuse_jax.torch_backend.networks import channels_first, channels_last


def text(module: Any, input_ids: torch.Tensor, attention_mask: Any = None) -> CLIPTextOutput:
    """A CLIP text encoder."""
    with watched(getattr(module, "text_projection", None)) as seen:
        out = module(input_ids.long(), attention_mask=attention_mask, output_hidden_states=True)
    pooled = seen[0] if seen else out.pooler_output
    return CLIPTextOutput(out.last_hidden_state, pooled, tuple(out.hidden_states), getattr(out, "text_embeds", None))


@contextlib.contextmanager
def watched(layer: Any) -> Iterator[list[torch.Tensor]]:
    """What a layer is given inside the block; transformers does not return the pooled state before its projection."""
    seen: list[torch.Tensor] = []
    if layer is None:
        yield seen
        return
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def final_norm(module: Any, states: torch.Tensor) -> torch.Tensor:
    """A CLIP text encoder's last layer norm; releases of transformers differ in where it lies."""
    return getattr(module, "text_model", module).final_layer_norm(states.to(module.dtype))


def unet(
    module: Any,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    added_cond_kwargs: Any = None,
    class_labels: Any = None,
    timestep_cond: Any = None,
    down_block_additional_residuals: Any = None,
    mid_block_additional_residual: Any = None,
    down_intrablock_additional_residuals: Any = None,
) -> torch.Tensor:
    """A text-conditioned UNet."""
    cast = lambda x: None if x is None else x.to(module.dtype)
    image = lambda x: None if x is None else channels_first(cast(x))
    down, inside = down_block_additional_residuals, down_intrablock_additional_residuals
    out = module(
        image(sample),
        timesteps,
        cast(encoder_hidden_states),
        class_labels=class_labels,
        timestep_cond=cast(timestep_cond),
        added_cond_kwargs=added(module, added_cond_kwargs),
        down_block_additional_residuals=None if down is None else tuple(map(image, down)),
        mid_block_additional_residual=image(mid_block_additional_residual),
        down_intrablock_additional_residuals=None if inside is None else list(map(image, inside)),
    )
    return channels_last(out.sample)


def added(module: Any, given: Any) -> Any:
    """SDXL's further conditioning."""
    return None if given is None else given | {"text_embeds": given["text_embeds"].to(module.dtype)}


def pixel_unet(module: Any, sample: torch.Tensor, timesteps: torch.Tensor, class_labels: Any = None) -> torch.Tensor:
    """A UNet without text."""
    return channels_last(module(channels_first(sample.to(module.dtype)), timesteps, class_labels).sample)


def control(
    module: Any,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    controlnet_cond: Any = None,
    added_cond_kwargs: Any = None,
    class_labels: Any = None,
    timestep_cond: Any = None,
    features: Any = None,
) -> ControlNetOutput:
    """A ControlNet, with images or with what :func:`embed` made of them."""
    cast = lambda x: None if x is None else x.to(module.dtype)
    embedding = module.controlnet_cond_embedding
    if features is not None:
        module.controlnet_cond_embedding = torch.nn.Identity()
    try:
        given = channels_first(cast(controlnet_cond if features is None else features))
        if features is not None and swaps_colours(module):
            given = given.flip(1)  # the module turns them round, the features are turned already
        out = module(
            channels_first(cast(sample)),
            timesteps,
            cast(encoder_hidden_states),
            controlnet_cond=given,
            class_labels=class_labels,
            timestep_cond=cast(timestep_cond),
            added_cond_kwargs=added(module, added_cond_kwargs),
        )
    finally:
        module.controlnet_cond_embedding = embedding
    down = tuple(map(channels_last, out.down_block_res_samples))
    return ControlNetOutput(down, channels_last(out.mid_block_res_sample))


def embed(module: Any, images: torch.Tensor) -> torch.Tensor:
    """A ControlNet's features of control images."""
    given = channels_first(images.to(module.dtype))
    return channels_last(module.controlnet_cond_embedding(given.flip(1) if swaps_colours(module) else given))


def adapter(module: Any, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A T2I-Adapter's features of control images."""
    return tuple(map(channels_last, module(channels_first(images.to(module.dtype)))))


def swaps_colours(module: Any) -> bool:
    """Whether a ControlNet takes blue first."""
    return module.config.controlnet_conditioning_channel_order == "bgr"


def encode(module: Any, images: torch.Tensor) -> Posterior:
    """An autoencoder's posterior."""
    found = module.encode(channels_first(images.to(module.dtype))).latent_dist
    return Posterior(channels_last(found.mean).float(), channels_last(found.logvar).float())


def decode(module: Any, latents: torch.Tensor) -> torch.Tensor:
    """An autoencoder's images."""
    return channels_last(module.decode(channels_first(latents.to(module.dtype))).sample)


CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("CLIPTextModel", "__call__"): text,
    ("CLIPTextModel", "final_norm"): final_norm,
    ("CLIPTextModelWithProjection", "__call__"): text,
    ("CLIPTextModelWithProjection", "final_norm"): final_norm,
    ("UNet2DConditionModel", "__call__"): unet,
    ("UNet2DModel", "__call__"): pixel_unet,
    ("ControlNetModel", "__call__"): control,
    ("ControlNetModel", "embed"): embed,
    ("T2IAdapter", "__call__"): adapter,
    ("AutoencoderKL", "encode"): encode,
    ("AutoencoderKL", "decode"): decode,
}
"""``(class, method)`` -> the same call of PyTorch's module."""
