"""One training step of Stable Diffusion on PyTorch, with modules of diffusers and transformers and LoRA by peft.

It is written as PyTorch users would write it, from the definitions of the loss (Ho et al. 2020, eq. 14; Hang et al.
2023, section 3.4; Ruiz et al. 2023, eq. 2), and takes its random numbers from our side.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch

from diffuse_jax import weights
from diffuse_jax.adapters.lora_file import save_lora
from diffuse_jax.models.base import Params
from diffuse_jax.pipelines import catalogue
from diffuse_jax.pipelines.catalogue import NOT_LOADED, OPTIONAL
from diffuse_jax.torch_backend.networks import (
    DTYPES,
    channels_first,
    channels_last,
    choose_device,
    exact,
    open_network,
    quiet,
    to_numpy,
    to_torch,
)
from diffuse_jax.torch_backend.training import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Update, step_noise
from diffuse_jax.training.batches import Batch
from diffuse_jax.training.families import family_of
from diffuse_jax.training.objective import Draw, Objective
from diffuse_jax.weights.names import ALIASES, rename

ADAPTER = "parity"
"""The name of the compared LoRA adapter in peft."""

Parameters = dict[str, Any]
"""Trained parameters by component and checkpoint name: ``unet.conv_in.weight``."""


class LossAndValues(NamedTuple):
    """The loss of a batch, with its graph, and the intermediate values (:attr:`Update.values`)."""

    loss: Any
    values: dict[str, Any]


def open_reference(
    source: str | Path,
    *,
    trainable: Sequence[str],
    dtype: str = "float32",
    device: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> Any:
    """A pipeline of PyTorch diffusers for training, with parameters of the same dtypes as ours.

    Args:
      source: a folder in diffusers layout or a Hub id.
      trainable: components with float32 parameters; the others have ``dtype``, except for an autoencoder with
        ``force_upcast``, which stays in float32.
      dtype: "float32" or "bfloat16".
      device: "cpu" or "cuda"; if None, CUDA if available.
      variant, revision: as for our pipeline.

    Raises:
      WeightsError: PyTorch cannot open one of the networks.
      ValueError: the device does not exist, or the model is not a Stable Diffusion model.
    """
    folder, where = weights.resolve(source, variant=variant, revision=revision), choose_device(device)
    index = weights.read_index(folder)
    family_of(index.class_name, source, "comparison")
    parts: dict[str, Any] = dict.fromkeys(name for name in index.components if name in {*NOT_LOADED, *OPTIONAL})
    with quiet():
        for name, entry in index.components.items():
            if name not in parts and (kind := catalogue.network(entry)) is not None:
                module = open_network(kind, entry.folder, "float32", where, variant)
                in_float32 = name in trainable or getattr(module.config, "force_upcast", False)
                parts[name] = module if in_float32 else module.to(DTYPES[dtype])
        return getattr(diffusers, index.class_name).from_pretrained(folder, **parts)


def full_parameters(pipe: Any, names: Sequence[str]) -> Parameters:
    """All parameters of the named networks, with gradients enabled."""
    modules = {name: getattr(pipe, name).requires_grad_(True) for name in names}
    return {
        f"{name}.{checkpoint_name(key)}": p for name, module in modules.items() for key, p in module.named_parameters()
    }


def checkpoint_name(key: str) -> str:
    """A parameter's name in its module -> its name in checkpoints; they differ in some releases of transformers."""
    return rename(key, ALIASES)


def low_rank_parameters(pipe: Any, pairs: Mapping[str, Params]) -> Parameters:
    """Our LoRA pairs as a trainable adapter of the pipeline, loaded from a file in PyTorch's format.

    Raises:
      ImportError: peft is not installed.
    """
    with tempfile.TemporaryDirectory() as folder, quiet():
        written = save_lora(Path(folder), pairs)
        if hasattr(pipe, "load_lora_weights"):
            pipe.load_lora_weights(written.parent, adapter_name=ADAPTER)
        else:  # Kandinsky's pipelines read no files, but their networks do
            for name in pairs:
                options = {"weight_name": written.name, "prefix": name, "adapter_name": ADAPTER}
                getattr(pipe, name).load_lora_adapter(written.parent, **options)
    found = {}
    for name in pairs:
        for key, p in getattr(pipe, name).named_parameters():
            p.requires_grad_("lora_" in key)
            if "lora_" in key:
                p.data = p.data.float()
                found[f"{name}.{checkpoint_name(key).replace(f'.{ADAPTER}.', '.')}"] = p
    return found


def torch_step(parameters: Parameters, compute: Callable[[], LossAndValues]) -> Update:
    """One AdamW step with gradient clipping; gradients are in the order in which the backward pass finishes them.

    Args:
      parameters: the trained parameters; gradients of others are ignored.
      compute: computes the loss. Parameters that it does not use are left out of the result.
    """
    finished: dict[str, None] = {}
    hooks = [p.register_post_accumulate_grad_hook(lambda _, k=k: finished.setdefault(k)) for k, p in parameters.items()]
    with exact(), torch.enable_grad():
        computed = compute()
        computed.loss.backward()
    for hook in hooks:
        hook.remove()
    trained = {name: parameters[name] for name in finished}
    gradients = {name: host(p.grad) for name, p in trained.items()}
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), MAX_GRAD_NORM)
    before = {name: host(p) for name, p in trained.items()}
    torch.optim.AdamW(trained.values(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY).step()
    values = {
        name: host(value) for name, value in (computed.values | {"loss": computed.loss, "grad_norm": norm}).items()
    }
    return Update(values, gradients, {name: host(p) - before[name] for name, p in trained.items()})


def host(x: Any) -> np.ndarray:
    """A copy as a NumPy array, which later updates do not change."""
    return np.array(to_numpy(x))


def text_to_image_loss(
    pipe: Any, objective: Objective, batch: Batch, seed: int, dtype: str = "float32"
) -> LossAndValues:
    """The loss of a batch of images and captions, with our noise and timesteps.

    Args:
      pipe: Stable Diffusion 1.x, 2.x or XL of PyTorch diffusers; its scheduler determines the prediction type. If the
        batch has ``conditioning``, its ``controlnet`` or ``adapter`` reads it, or else its UNet.
      objective: loss weighting, see :func:`loss_at`.
      batch: as for our step.
      seed: seed of the noise and timesteps.
      dtype: with bfloat16, ``torch.autocast`` computes in it, with float32 parameters. An autoencoder with
        ``force_upcast`` stays in float32.
    """
    device = pipe.unet.device
    half = lambda wanted=True: torch.autocast(device.type, torch.bfloat16, enabled=wanted and dtype == "bfloat16")
    pixels = channels_first(to_torch(batch["pixel_values"], device)).to(pipe.vae.dtype) / 127.5 - 1
    with torch.no_grad(), half(not pipe.vae.config.force_upcast):
        posterior = pipe.vae.encode(pixels).latent_dist
    mean, std = channels_last(posterior.mean).float(), channels_last(posterior.std).float()
    noise, drawn = step_noise(objective, seed, tuple(mean.shape))
    x0 = scale_latents(mean + std * to_torch(noise, device), pipe.vae.config)
    with half():
        text = encode_prompts(pipe, batch, device)
    added = None
    if text.pooled is not None:
        added = {"text_embeds": text.pooled, "time_ids": to_torch(batch["time_ids"], device)}

    def predict(x: Any, t: Any) -> Any:
        x = beside_condition(pipe, batch, x, half)
        given: dict[str, Any] = {"encoder_hidden_states": text.states, "added_cond_kwargs": added}
        with half():
            more = control_residuals(pipe, batch, channels_first(x), t, given)
            return channels_last(pipe.unet(channels_first(x), t, **given, **more).sample)

    scheduler = noise_schedule(pipe.scheduler)
    computed = loss_at(scheduler, objective, x0, drawn, predict, batch.get("prior"), batch.get("loss_mask"))
    named = {"prompt embeddings": text.states, "pooled embeddings": text.pooled}
    return LossAndValues(computed.loss, {name: x for name, x in named.items() if x is not None} | computed.values)


@functools.lru_cache(maxsize=4)
def noise_schedule(scheduler: Any) -> Any:
    """The noise schedule of a sampler, which a trainer makes once."""
    return diffusers.DDPMScheduler.from_config(scheduler.config)


def beside_condition(pipe: Any, batch: Batch, x: Any, half: Callable[[bool], Any]) -> Any:
    """The input ``[B,h,w,2c]`` of a UNet that edits images, from noisy latents; these alone for others."""
    latents = pipe.vae.config.latent_channels
    if pipe.unet.config.in_channels != 2 * latents:
        return x
    images = channels_first(to_torch(batch["conditioning"], x.device)).to(pipe.vae.dtype) / 127.5 - 1
    with torch.no_grad(), half(not pipe.vae.config.force_upcast):
        original = channels_last(pipe.vae.encode(images).latent_dist.mode()).float()
    if "keeps_conditioning" in batch:
        original = original * to_torch(batch["keeps_conditioning"], x.device)[:, None, None, None]
    return torch.cat([x, original], -1)


def control_residuals(pipe: Any, batch: Batch, x: Any, t: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the ControlNet or T2I-Adapter adds inside the UNet, by the UNet's arguments; nothing if the batch has no
    control images."""
    if "conditioning" not in batch or not (hasattr(pipe, "adapter") or hasattr(pipe, "controlnet")):
        return {}
    images = channels_first(to_torch(batch["conditioning"], x.device)) / 255
    if hasattr(pipe, "adapter"):
        return {"down_intrablock_additional_residuals": pipe.adapter(images)}
    down, middle = pipe.controlnet(x, t, controlnet_cond=images, **given, return_dict=False)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


class Text(NamedTuple):
    """Prompt embeddings: ``states [B,L,D]`` and, for SDXL, ``pooled [B,P]``."""

    states: torch.Tensor
    pooled: torch.Tensor | None = None


def encode_prompts(pipe: Any, batch: Batch, device: Any) -> Text:
    """The captions' prompt embeddings; for SDXL, the hidden states before the last layer of both encoders."""
    names = [name for name in ("text_encoder", "text_encoder_2") if name in batch]
    ids = [to_torch(batch[name], device).long() for name in names]
    outputs = [getattr(pipe, name)(x, output_hidden_states=True) for name, x in zip(names, ids, strict=True)]
    if "text_encoder_2" not in names:
        return Text(outputs[0].last_hidden_state)
    return Text(torch.cat([out.hidden_states[-2] for out in outputs], -1), outputs[-1].text_embeds)


def scale_latents(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """Scaled latents ``[B,h,w,c]`` (the PyTorch counterpart of ``models.autoencoder_kl.scale_latents``)."""
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        return (latents - latents.new_tensor(mean)) * config.scaling_factor / latents.new_tensor(std)
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor


def loss_at(
    scheduler: Any,
    objective: Objective,
    x0: Any,
    drawn: Draw,
    predict: Callable[[Any, Any], Any],
    prior: np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> LossAndValues:
    """The loss of clean samples at sampled timesteps.

    Args:
      scheduler: a scheduler of PyTorch diffusers; determines the prediction type.
      objective: for ``snr_gamma``, ``snr_weighting`` and ``prior_loss_weight``; its scheduler is not used.
      x0: clean samples ``[B,h,w,c]`` float32.
      drawn: noise and timesteps.
      predict: ``(x, t) -> prediction``, both of the shape of ``x0``.
      prior, mask: bool ``[B]`` and float32 ``[B,h,w]``, see :func:`diffuse_jax.training.objective.errors`.
    """
    noise, t = to_torch(drawn.noise, x0.device), to_torch(drawn.t, x0.device).long()
    extra = 0 if drawn.extra is None else to_torch(drawn.extra, x0.device)
    x, kind = scheduler.add_noise(x0, noise + extra, t), scheduler.config.prediction_type
    prediction = predict(x, t).float()
    wanted = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x0, noise, t), "sample": x0}[kind]
    squares = (prediction - wanted).square()
    if mask is not None:
        weight = to_torch(mask, x0.device)[..., None]
        squares = squares * weight / weight.mean((1, 2, 3), keepdim=True)
    squares = squares.mean((1, 2, 3))
    error = squares * sample_weights(scheduler, objective, t)
    instance = torch.ones_like(t, dtype=torch.bool) if prior is None else ~to_torch(prior, x0.device)
    loss = error[instance].mean()
    values = {"noised latents": x, "prediction": prediction, "mse": squares[instance].mean()}
    if prior is not None:
        values["prior_loss"] = error[~instance].mean()
        loss = loss + objective.prior_loss_weight * values["prior_loss"]
    return LossAndValues(loss, values)


def sample_weights(scheduler: Any, objective: Objective, t: Any) -> Any:
    """The loss weight of each sample, ``[B]``."""
    alpha_bar = torch.cumprod(1 - scheduler.betas.double(), 0).to(t.device)[t]  # 1 - alpha_bar cancels in float32
    snr = alpha_bar / (1 - alpha_bar)
    weight = snr if objective.snr_weighting else torch.ones_like(snr)
    if objective.snr_gamma is not None:
        s = snr + 1 if scheduler.config.prediction_type == "v_prediction" else snr
        weight = weight * (objective.snr_gamma / s).clamp(max=1)
    return weight.float()
