"""Calling PyTorch's networks with our arguments and channel-last arrays: one entry for each class and method.

A new network needs an entry here; then every pipeline that uses it runs on PyTorch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from diffuse_jax.models.autoencoder_kl import Posterior
from diffuse_jax.models.autoencoder_tiny import Encoded
from diffuse_jax.models.clip_vision import CLIPVisionOutput
from diffuse_jax.models.controlnet import ControlNetOutput
from diffuse_jax.models.unclip_text_proj import DecoderConditions
from diffuse_jax.text.clip import CLIPTextOutput
from diffuse_jax.text.ldm_bert import LDMBertOutput
from diffuse_jax.text.multilingual_clip import MultilingualCLIPOutput
from diffuse_jax.text.t5 import T5Output
from diffuse_jax.torch_backend.networks import channels_first, channels_last


def text(module: Any, input_ids: torch.Tensor, attention_mask: Any = None) -> CLIPTextOutput:
    """Call a CLIP text encoder."""
    with watched(getattr(module, "text_projection", None)) as seen:
        out = module(input_ids.long(), attention_mask=attention_mask, output_hidden_states=True)
    pooled = seen[0] if seen else out.pooler_output
    return CLIPTextOutput(out.last_hidden_state, pooled, tuple(out.hidden_states), getattr(out, "text_embeds", None))


def vision(module: Any, pixel_values: torch.Tensor) -> CLIPVisionOutput:
    """A CLIP vision encoder."""
    inner = getattr(module, "vision_model", module)
    with watched(inner.post_layernorm) as seen:
        out = module(channels_first(pixel_values.to(module.dtype)), output_hidden_states=True)
    pooled = inner.post_layernorm(seen[0])
    return CLIPVisionOutput(out.last_hidden_state, pooled, tuple(out.hidden_states), getattr(out, "image_embeds", None))


def safety(module: Any, clip_input: torch.Tensor) -> torch.Tensor:
    """The safety checker's verdicts; the images that it would blacken are not given to it."""
    _, flagged = module(channels_first(clip_input.to(module.dtype)), [torch.zeros(1)] * len(clip_input))
    return torch.tensor(flagged)


def depth(module: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """A depth estimator."""
    return module(channels_first(pixel_values.to(module.dtype))).predicted_depth


@contextlib.contextmanager
def watched(layer: Any) -> Iterator[list[torch.Tensor]]:
    """Record a layer's inputs in this context; transformers does not return the pooled state before its projection."""
    seen: list[torch.Tensor] = []
    if layer is None:
        yield seen
        return
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def t5(module: Any, input_ids: torch.Tensor, attention_mask: Any = None) -> T5Output:
    """T5's encoder."""
    return T5Output(module(input_ids.long(), attention_mask=attention_mask).last_hidden_state)


def ldm_bert(module: Any, input_ids: torch.Tensor, attention_mask: Any = None) -> LDMBertOutput:
    """Latent diffusion's text encoder."""
    return LDMBertOutput(module(input_ids.long(), attention_mask=attention_mask).last_hidden_state)


def multilingual(module: Any, input_ids: torch.Tensor, attention_mask: Any = None) -> MultilingualCLIPOutput:
    """Kandinsky 2.1's text encoder."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    embeds, states = module(input_ids.long(), mask.long())
    return MultilingualCLIPOutput(states, embeds)


def if_safety(module: Any, clip_input: torch.Tensor) -> torch.Tensor:
    """The verdicts of DeepFloyd IF's safety checker, one for both of its scores."""
    blank = [np.zeros(1)] * len(clip_input)
    _, unsafe, marked = module(channels_first(clip_input.to(module.dtype)), blank)
    return torch.tensor(unsafe) | torch.tensor(marked)


def final_norm(module: Any, states: torch.Tensor) -> torch.Tensor:
    """Apply a CLIP text encoder's final layer norm, which is in different places in different transformers releases."""
    return getattr(module, "text_model", module).final_layer_norm(states.to(module.dtype))


def unet(
    module: Any,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    added_cond_kwargs: Any = None,
    class_labels: Any = None,
    timestep_cond: Any = None,
    encoder_attention_mask: Any = None,
    down_block_additional_residuals: Any = None,
    mid_block_additional_residual: Any = None,
    down_intrablock_additional_residuals: Any = None,
) -> torch.Tensor:
    """Call a text-conditioned UNet."""
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
        encoder_attention_mask=encoder_attention_mask,
        down_block_additional_residuals=None if down is None else tuple(map(image, down)),
        mid_block_additional_residual=image(mid_block_additional_residual),
        down_intrablock_additional_residuals=None if inside is None else list(map(image, inside)),
    )
    return channels_last(out.sample)


def added(module: Any, given: Any) -> Any:
    """Pooled prompt embeddings, image embeddings and hints in the module's dtype, and SDXL's micro-conditioning."""
    if given is None:
        return None
    cast = {name: value if name == "time_ids" else value.to(module.dtype) for name, value in given.items()}
    return cast | ({"hint": channels_first(cast["hint"])} if "hint" in cast else {})


def pixel_unet(module: Any, sample: torch.Tensor, timesteps: torch.Tensor, class_labels: Any = None) -> torch.Tensor:
    """Call a UNet without text conditioning."""
    return channels_last(module(channels_first(sample.to(module.dtype)), timesteps, class_labels).sample)


def prior(
    module: Any,
    hidden_states: torch.Tensor,
    timesteps: torch.Tensor,
    proj_embedding: torch.Tensor,
    encoder_hidden_states: Any = None,
    attention_mask: Any = None,
) -> torch.Tensor:
    """Call a prior."""
    cast = lambda x: None if x is None else x.to(module.dtype)
    return module(
        cast(hidden_states),
        timesteps,
        cast(proj_embedding),
        encoder_hidden_states=cast(encoder_hidden_states),
        attention_mask=attention_mask,
    ).predicted_image_embedding


def unnormalised(module: Any, embeddings: torch.Tensor) -> torch.Tensor:
    """CLIP image embeddings from samples of a prior."""
    return module.post_process_latents(embeddings).float()


def scaled(module: Any, embeddings: torch.Tensor) -> torch.Tensor:
    """CLIP image embeddings at zero mean and unit variance."""
    return module.scale(embeddings).float()


def unscaled(module: Any, embeddings: torch.Tensor) -> torch.Tensor:
    """CLIP image embeddings from those of zero mean and unit variance."""
    return module.unscale(embeddings).float()


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
    """Call a ControlNet with control images, or with the features that :func:`embed` computed from them."""
    cast = lambda x: None if x is None else x.to(module.dtype)
    embedding = module.controlnet_cond_embedding
    if features is not None:
        module.controlnet_cond_embedding = torch.nn.Identity()
    try:
        given = channels_first(cast(controlnet_cond if features is None else features))
        if features is not None and swaps_colours(module):
            given = given.flip(1)  # the module reverses the channels, but the features were computed from reversed ones
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
    """Compute a ControlNet's features of control images."""
    given = channels_first(images.to(module.dtype))
    return channels_last(module.controlnet_cond_embedding(given.flip(1) if swaps_colours(module) else given))


def adapter(module: Any, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A T2I-Adapter's features of control images."""
    return tuple(map(channels_last, module(channels_first(images.to(module.dtype)))))


def swaps_colours(module: Any) -> bool:
    """Whether a ControlNet takes images in BGR order."""
    return module.config.controlnet_conditioning_channel_order == "bgr"


def decoder_conditions(
    module: Any, image: torch.Tensor, prompt: torch.Tensor, states: torch.Tensor, unconditional: torch.Tensor
) -> DecoderConditions:
    """An unCLIP decoder's conditions; the module itself puts its learned embedding before all others."""
    learned = module.learned_classifier_free_guidance_embeddings
    context, vector = module(
        image_embeddings=torch.where(unconditional[:, None], learned, image.to(module.dtype)),
        prompt_embeds=prompt.to(module.dtype),
        text_encoder_hidden_states=states.to(module.dtype),
        do_classifier_free_guidance=False,
    )
    return DecoderConditions(context, vector)


def encode(module: Any, images: torch.Tensor) -> Posterior:
    """Encode images; returns the posterior."""
    found = module.encode(channels_first(images.to(module.dtype))).latent_dist
    return Posterior(channels_last(found.mean).float(), channels_last(found.logvar).float())


def encode_tiny(module: Any, images: torch.Tensor) -> Encoded:
    """A tiny autoencoder's latents."""
    return Encoded(channels_last(module.encode(channels_first(images.to(module.dtype))).latents).float())


def decode(module: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents to images."""
    return channels_last(module.decode(channels_first(latents.to(module.dtype))).sample)


def decode_codes(module: Any, latents: torch.Tensor, force_not_quantize: bool = False) -> torch.Tensor:
    """The images of a vector-quantised autoencoder."""
    given = latents.movedim(-1, 1) if latents.ndim == 4 else latents
    looks_up = force_not_quantize and module.config.lookup_from_codebook
    shape = (*latents.shape, module.quantize.vq_embed_dim) if looks_up else None
    given = given.long() if looks_up else given.to(module.dtype)
    return channels_last(module.decode(given, force_not_quantize=force_not_quantize, shape=shape).sample)


def decode_masked(module: Any, latents: torch.Tensor, image: Any = None, mask: Any = None) -> torch.Tensor:
    """The images of an autoencoder whose decoder sees the image outside the mask."""
    given = (None if x is None else channels_first(x.to(module.dtype)) for x in (image, mask))
    return channels_last(module.decode(channels_first(latents.to(module.dtype)), None, *given).sample)


def encode_paella(module: Any, images: torch.Tensor) -> torch.Tensor:
    """Latents of Paella's autoencoder."""
    return channels_last(module.encode(channels_first(images.to(module.dtype))).latents).float()


def decode_paella(module: Any, latents: torch.Tensor, quantize: bool = False) -> torch.Tensor:
    """Images of Paella's autoencoder."""
    given = channels_first(latents.to(module.dtype))
    return channels_last(module.decode(given, force_not_quantize=not quantize).sample)


def prior_maps(module: Any, sample: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Würstchen's prior."""
    given = channels_first(sample.to(module.dtype)), timesteps.expand(len(sample)), states.to(module.dtype)
    return channels_last(module(*given)).float()


def diffnext(
    module: Any, sample: torch.Tensor, timesteps: torch.Tensor, effnet: torch.Tensor, states: torch.Tensor
) -> torch.Tensor:
    """Würstchen's decoder."""
    image = lambda x: channels_first(x.to(module.dtype))
    times = timesteps.expand(len(sample))
    return channels_last(module(image(sample), times, image(effnet), states.to(module.dtype))).float()


CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("CLIPTextModel", "__call__"): text,
    ("CLIPTextModel", "final_norm"): final_norm,
    ("CLIPTextModelWithProjection", "__call__"): text,
    ("CLIPTextModelWithProjection", "final_norm"): final_norm,
    ("T5EncoderModel", "__call__"): t5,
    ("LDMBertModel", "__call__"): ldm_bert,
    ("MultilingualCLIP", "__call__"): multilingual,
    ("CLIPVisionModel", "__call__"): vision,
    ("CLIPVisionModelWithProjection", "__call__"): vision,
    ("DPTForDepthEstimation", "__call__"): depth,
    ("StableDiffusionSafetyChecker", "__call__"): safety,
    ("IFSafetyChecker", "__call__"): if_safety,
    ("UNet2DConditionModel", "__call__"): unet,
    ("UNet2DModel", "__call__"): pixel_unet,
    ("PriorTransformer", "__call__"): prior,
    ("PriorTransformer", "unnormalised"): unnormalised,
    ("StableUnCLIPImageNormalizer", "__call__"): scaled,
    ("StableUnCLIPImageNormalizer", "unscale"): unscaled,
    ("UnCLIPTextProjModel", "__call__"): decoder_conditions,
    ("ControlNetModel", "__call__"): control,
    ("ControlNetModel", "embed"): embed,
    ("T2IAdapter", "__call__"): adapter,
    ("AutoencoderKL", "encode"): encode,
    ("AutoencoderKL", "decode"): decode,
    ("AutoencoderTiny", "encode"): encode_tiny,
    ("AutoencoderTiny", "decode"): decode,
    ("PaellaVQModel", "encode"): encode_paella,
    ("PaellaVQModel", "decode"): decode_paella,
    ("WuerstchenPrior", "__call__"): prior_maps,
    ("WuerstchenDiffNeXt", "__call__"): diffnext,
    ("VQModel", "encode"): encode_tiny,
    ("VQModel", "decode"): decode_codes,
    ("AsymmetricAutoencoderKL", "encode"): encode,
    ("AsymmetricAutoencoderKL", "decode"): decode_masked,
}
"""``(class, method)`` -> the corresponding call of PyTorch's module."""
