"""One training step of networks without text on both sides: DDPM, EDM and flow matching, and an autoencoder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.models import AutoencoderKL, UNet2DModel
from diffuse_jax.models.layers import Conv
from diffuse_jax.torch_backend import training
from diffuse_jax.torch_backend import training_torch as twin
from diffuse_jax.torch_backend.networks import channels_first, channels_last, to_torch
from diffuse_jax.training import latent
from diffuse_jax.training.autoencoder import Terms, autoencoder_loss
from diffuse_jax.training.objective import Objective, draw, errors, noised
from diffuse_jax.training.pixel_objectives import KINDS, pixel_objective
from diffuse_jax.training.settings import EdmSettings, FlowSettings, ObjectiveSettings
from tests.oracle import twins
from tests.oracle.training_steps import Steps

torch, diffusers = twins.torch, twins.diffusers

BATCH = 4


@dataclasses.dataclass(frozen=True)
class Pair:
    """One network on both sides, of the noised latents and the timesteps alone."""

    params: Any
    ours: Callable[[Any, Any, Any], Any]
    parameters: dict[str, Any]
    theirs: Callable[[Any, Any], Any]


def unet(folder: Path, rng: np.random.Generator) -> Pair:
    module, model, params = twins.unet_twin("SD 2.x", folder)
    text = rng.standard_normal((BATCH, 5, 24)).astype(np.float32)
    ours = lambda params, x, t: model.apply({"params": params}, x, t, text)
    theirs = lambda x, t: module(x, t, encoder_hidden_states=torch.tensor(text)).sample
    return Pair(params, ours, dict(module.named_parameters()), theirs)


def pixel_unet(folder: Path, rng: np.random.Generator, config: Mapping[str, Any] | None = None) -> Pair:
    """The UNet of a config of diffusers; by default a small one of the first DDPMs' kind."""
    module = diffusers.UNet2DModel(**config or twins.PIXEL_UNETS["DDPM, first release"])
    module, model, params = twins.twin(module, UNet2DModel, folder)
    ours = lambda params, x, t: model.apply({"params": params}, x, t)
    return Pair(params, ours, dict(module.named_parameters()), lambda x, t: module(x, t).sample)


def convolution(folder: Path, rng: np.random.Generator) -> Pair:
    """One layer: the objective is what is compared, and compiles in no time."""
    module = torch.nn.Conv2d(4, 4, 3, padding=1)
    layer = Conv(4)
    kernel = module.weight.detach().numpy().transpose(2, 3, 1, 0)
    params = {"conv_in": {"kernel": kernel, "bias": module.bias.detach().numpy()}}
    ours = lambda params, x, t: layer.apply({"params": params["conv_in"]}, x)
    named = {f"conv_in.{key}": value for key, value in module.named_parameters()}
    return Pair(params, ours, named, lambda x, t: module(x))


def images_for(rng: np.random.Generator, channels: int, size: int = 8, count: int = BATCH) -> np.ndarray:
    """Clean samples ``[B,h,w,c]``."""
    return rng.standard_normal((count, size, size, channels)).astype(np.float32)


def steps_of(pair: Pair, objective: Objective, x0: np.ndarray, drawn: Any, torch_loss: Any) -> Steps:
    """A step whose noise and times are given."""

    def loss(trainable: Any, frozen: Any, batch: Any, key: Any) -> Any:
        x = noised(objective, batch["x0"], drawn)
        prediction = pair.ours(trainable["unet"], x, drawn.t)
        value, metrics = errors(objective, prediction, batch["x0"], drawn)
        return value, metrics | {"noised latents": x, "prediction": prediction}

    trained = training.Trained({"unet": pair.params}, {}, latent.whole({}), training.named_parameters)
    parameters = {f"unet.{key}": value for key, value in pair.parameters.items()}
    return Steps(loss, trained, {"x0": x0}, parameters, torch_loss)


def ddpm(pair: Pair, objective: Objective, x0: np.ndarray, t: Any, **schedule: Any) -> Steps:
    """Objectives of DDPM at the timesteps ``t``, with the schedule that diffusers makes of the same settings."""
    drawn = draw(objective, jax.random.key(0), jnp.asarray(x0))._replace(t=t)
    clean, host, theirs = torch.tensor(x0), jax.tree.map(np.asarray, drawn), pair.theirs
    scheduler = diffusers.DDPMScheduler(**schedule)
    predict = lambda x, t: channels_last(theirs(channels_first(x), t))
    return steps_of(pair, objective, x0, drawn, lambda: twin.loss_at(scheduler, objective, clean, host, predict))


def edm_loss(scheduler: Any, x0: Any, noise: Any, t: Any, network: Any) -> Any:
    """Equations 7 and 8 of EDM, with the preconditioning of diffusers' sampler."""
    sigma, data = torch.exp(4 * t.double()).float()[:, None, None, None], scheduler.config.sigma_data
    noisy = x0 + sigma * noise
    output = network(scheduler.precondition_inputs(noisy, sigma), scheduler.precondition_noise(sigma.flatten()))
    denoised = scheduler.precondition_outputs(noisy, output, sigma)
    return (((sigma**2 + data**2) / (sigma * data) ** 2) * (denoised - x0) ** 2).mean()


def flow_loss(scheme: str, x0: Any, noise: Any, t: Any, network: Any) -> Any:
    """The error of the velocity, with the weights of diffusers' script for Stable Diffusion 3."""
    sigma = t[:, None, None, None] / 1000
    output = network((1 - sigma) * x0 + sigma * noise, t)
    weights = diffusers.training_utils.compute_loss_weighting_for_sd3(scheme, sigma)
    return (weights * (output - (noise - x0)) ** 2).mean()


def continuous(pair: Pair, kind: str, x0: np.ndarray, flow: Mapping[str, Any], fields: Mapping[str, Any]) -> Steps:
    """EDM or flow matching (``kind``), with settings of the flow and fields of the scheduler."""
    objective = pixel_objective(
        KINDS[kind].scheduler.replace(**fields), ObjectiveSettings(), EdmSettings(), FlowSettings(**flow)
    )
    drawn = draw(objective, jax.random.key(0), jnp.asarray(x0))
    clean, noise, t = (
        channels_first(torch.tensor(x0)),
        channels_first(to_torch(drawn.noise, "cpu")),
        (to_torch(drawn.t, "cpu")),
    )
    scheduler, theirs = diffusers.EDMEulerScheduler(**fields) if kind == "edm" else None, pair.theirs

    def torch_loss() -> Any:
        seen: dict[str, Any] = {}

        def network(x: Any, t: Any) -> Any:
            found = theirs(x, t)
            seen.update({"noised latents": channels_last(x), "prediction": channels_last(found)})
            return found

        if kind == "edm":
            value = edm_loss(scheduler, clean, noise, t, network)
        else:
            value = flow_loss(flow["weighting_scheme"], clean, noise, t, network)
        return twin.LossAndValues(value, seen)

    return steps_of(pair, objective, x0, drawn, torch_loss)


def unconditional(
    folder: Path, rng: np.random.Generator, kind: str, config: Mapping[str, Any], size: int, count: int
) -> Steps:
    """A UNet of pixels with the objective ``kind`` of ``train/unconditional.py``."""
    pair, x0 = pixel_unet(folder, rng, config), images_for(rng, 3, size, count)
    if kind != "ddpm":
        return continuous(pair, kind, x0, {"weighting_scheme": "logit_normal"} if kind == "flow_matching" else {}, {})
    objective = pixel_objective(KINDS[kind].scheduler, ObjectiveSettings(), EdmSettings(), FlowSettings())
    return ddpm(pair, objective, x0, jnp.asarray(rng.integers(0, 1000, count), jnp.int32))


def autoencoder_terms(module: Any, x: Any, noise: Any, kl_weight: float) -> tuple[Any, Any, Any]:
    """``(reconstructed images, the error, the loss)`` of PyTorch's autoencoder: pixels, their edges, and the
    divergence."""
    posterior = module.encode(x).latent_dist
    y = module.decode(posterior.mean + posterior.std * noise).sample
    edges = sum((d(y) - d(x)).abs().mean() for d in (lambda v: v.diff(dim=2), lambda v: v.diff(dim=3)))
    reconstruction = (y - x).abs().mean() + edges
    return y, reconstruction, reconstruction + kl_weight * posterior.kl().mean() / noise[0].numel()


def autoencoder(
    folder: Path, rng: np.random.Generator, config: Mapping[str, Any], size: int, count: int, kl_weight: float = 1e-4
) -> Steps:
    """All of an autoencoder of images, without a perceptual loss and a discriminator."""
    module, vae, params = twins.twin(diffusers.AutoencoderKL(**config), AutoencoderKL, folder)
    pixels = rng.integers(0, 256, (count, size, size, 3), np.uint8)
    key, side = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0), size // vae.config.scale
    noise = jax.random.normal(key, (count, side, side, vae.config.latent_channels))
    x, z = channels_first(torch.tensor(pixels / np.float32(127.5) - 1)), channels_first(to_torch(noise, "cpu"))
    trained = training.Trained({"vae": params}, {}, latent.whole({}), training.named_parameters)
    batch = {"pixel_values": pixels, "update": np.zeros(count, np.int32)}
    loss = functools.partial(autoencoder_loss, Terms(vae=vae, kl_weight=kl_weight))
    parameters = {f"vae.{key}": value for key, value in module.named_parameters()}
    torch_loss = lambda: twin.LossAndValues(autoencoder_terms(module, x, z, kl_weight)[-1], {})
    return Steps(loss, trained, batch, parameters, torch_loss)
