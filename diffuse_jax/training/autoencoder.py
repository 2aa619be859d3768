"""The loss of an autoencoder: pixels, edges, KL divergence, and optionally a perceptual and an adversarial term."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.models import AutoencoderKL, Params
from diffuse_jax.models.autoencoder_kl import Posterior
from diffuse_jax.models.discriminator import PatchDiscriminator
from diffuse_jax.training.families import normalised
from diffuse_jax.training.perceptual import perceptual_distance
from diffuse_jax.training.state import Metrics

MAX_BALANCE = 1e4
BALANCE_EPSILON = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of an autoencoder's loss: their networks and weights.

    Attributes:
      vae: the autoencoder to train.
      kl_weight: weight of the KL divergence from a standard normal distribution, per latent element.
      edge_weight: weight of the mean absolute error in the differences of neighbouring pixels.
      perceptual_weight: weight of :func:`~diffuse_jax.training.perceptual.perceptual_distance`.
      perceptual: name of the network of the perceptual distance; None to omit the term.
      discriminator: trained together with the autoencoder; None to omit the adversarial term.
      discriminator_weight: weight of the adversarial term, multiplied by :func:`balance`.
      discriminator_start: training step from which the discriminator is trained and used.
    """

    vae: AutoencoderKL
    kl_weight: float = 1e-4
    edge_weight: float = 1.0
    perceptual_weight: float = 0.0
    perceptual: str | None = None
    discriminator: PatchDiscriminator | None = None
    discriminator_weight: float = 0.0
    discriminator_start: int = 0


def autoencoder_loss(
    terms: Terms, trainable: Params, frozen: Params, batch: Mapping[str, jax.Array], key: jax.Array
) -> tuple[jax.Array, Metrics]:
    """The loss of images reconstructed from sampled latents, and its metrics.

    Args:
      terms: the terms of the loss.
      trainable: parameters of ``vae`` and, if there is one, of ``discriminator``. The gradient of the autoencoder is
        that of all terms but the discriminator's loss (:func:`hinge_loss`); the discriminator's is that of its loss
        alone.
      frozen: parameters of ``perceptual``, if there is such a term, and of the frozen modules of ``vae``, if any; see
        :func:`split_decoder`.
      batch: ``pixel_values`` uint8 ``[B,H,W,3]`` and, if there is a discriminator, ``update`` int32 ``[B]``, the number
        of training steps before this one.
      key: random key of the latents' noise.
    """
    x, vae = normalised(batch["pixel_values"]), {**frozen.get("vae", {}), **trainable["vae"]}
    posterior = terms.vae.apply({"params": vae}, x, method="encode")
    z = posterior.sample(key)
    divergence = posterior.kl().mean() / posterior.mean[0].size
    judge = lambda y: reconstruction_loss(terms, frozen, x, y)
    if terms.discriminator is None:
        value, metrics = judge(decode(terms.vae, vae, z))
    else:
        value, metrics = adversarial_loss(terms, {**trainable, "vae": vae}, x, z, judge, batch["update"])
    return value + terms.kl_weight * divergence, metrics | {"kl": divergence}


DECODER = ("decoder", "post_quant_conv")
"""The modules of an autoencoder that decode latents to images."""


def split_decoder(params: Params) -> tuple[Params, Params]:
    """Split an autoencoder's parameters into (decoder, encoder), to train only the decoder and so keep the latents."""
    decoder = {name: module for name, module in params.items() if name in DECODER}
    return decoder, {name: module for name, module in params.items() if name not in DECODER}


def decode(vae: AutoencoderKL, params: Params, z: jax.Array) -> jax.Array:
    """Images float32 ``[B,H,W,3]`` decoded from unscaled latents ``z [B,h,w,c]``."""
    return vae.apply({"params": params}, z, method="decode").astype(jnp.float32)


def reconstruction_loss(terms: Terms, frozen: Params, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Metrics]:
    """The loss of reconstructions ``y`` of ``x``, both float32 ``[B,H,W,3]`` in [-1, 1], without the adversarial
    term."""
    pixels = jnp.abs(y - x).mean()
    down, right = (jnp.abs(jnp.diff(y - x, axis=axis)).mean() for axis in (1, 2))
    edges = down + right
    value, metrics = pixels + terms.edge_weight * edges, {"pixels": pixels, "edges": edges}
    if terms.perceptual is not None:
        distance = perceptual_distance(terms.perceptual, frozen["perceptual"], x, y).mean()
        value, metrics = value + terms.perceptual_weight * distance, metrics | {"perceptual": distance}
    return value, metrics | {"mse": jnp.square(y - x).mean()}


# The adversarial term (Goodfellow et al. 2014; Esser et al. 2021, eq. 6 and 7)


def adversarial_loss(
    terms: Terms,
    trainable: Params,
    x: jax.Array,
    z: jax.Array,
    judge: Callable[[jax.Array], tuple[jax.Array, Metrics]],
    update: jax.Array,
) -> tuple[jax.Array, Metrics]:
    """Reconstruction, adversarial and discriminator losses in one scalar, from which each network gets its own
    gradient.

    The gradients with respect to the reconstructed images are computed once. They yield the balance of the two terms at
    the decoder's last kernel, and their weighted sum is then propagated through the decoder in a single pass.
    """
    params, critic = trainable["vae"], trainable["discriminator"]
    assert terms.discriminator is not None
    discriminate = lambda params, images: terms.discriminator.apply({"params": params}, images).astype(jnp.float32)
    last = lambda kernel: decode(terms.vae, with_last_kernel(params, kernel), z)
    y, pull = jax.vjp(last, params["decoder"]["conv_out"]["kernel"])
    fake_images, frozen_critic = jax.lax.stop_gradient((y, critic))
    (value, metrics), toward_x = jax.value_and_grad(judge, has_aux=True)(fake_images)
    adversarial, toward_real = jax.value_and_grad(lambda y: -discriminate(frozen_critic, y).mean())(fake_images)
    active = (update.max() >= terms.discriminator_start).astype(jnp.float32)
    ratio = jax.lax.stop_gradient(balance(pull(toward_x)[0], pull(toward_real)[0]))
    weight = active * ratio * terms.discriminator_weight
    real, fake = discriminate(critic, x), discriminate(critic, fake_images)
    critic_loss = hinge_loss(real, fake)
    metrics |= {"adversarial": adversarial, "balance": ratio, "discriminator": critic_loss}
    metrics |= {"logits_real": real.mean(), "logits_fake": fake.mean()}
    total = value + weight * adversarial + active * critic_loss
    return with_gradient(total, toward_x + weight * toward_real, y), metrics


def with_last_kernel(params: Params, kernel: jax.Array) -> Params:
    """An autoencoder's parameters with the kernel of the decoder's last convolution replaced."""
    last = {**params["decoder"]["conv_out"], "kernel": kernel}
    return {**params, "decoder": {**params["decoder"], "conv_out": last}}


def balance(reconstruction: jax.Array, adversarial: jax.Array) -> jax.Array:
    """The weight at which the adversarial term changes the last layer as much as the reconstruction does (eq. 7).

    Both arguments are gradients of the decoder's last kernel. As in the authors' code, the epsilon of the denominator
    is 1e-4, and the ratio is at most 1e4.
    """
    norm = lambda gradient: jnp.sqrt(jnp.square(gradient).sum())
    return jnp.minimum(norm(reconstruction) / (norm(adversarial) + BALANCE_EPSILON), MAX_BALANCE)


def hinge_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """The discriminator's hinge loss from its logits (Lim and Ye 2017, with the authors' factor 1/2)."""
    return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())


def with_gradient(value: jax.Array, gradient: jax.Array, at: jax.Array) -> jax.Array:
    """``value``, with ``gradient`` added to its gradient with respect to the array ``at`` of the same shape."""
    return value + (jax.lax.stop_gradient(gradient) * (at - jax.lax.stop_gradient(at))).sum()


def latent_deviation(vae: AutoencoderKL, params: Params, images: Iterable[np.ndarray], batch: int) -> float:
    """Standard deviation over all elements of the latent means of ``images`` (uint8 ``[H,W,3]`` each).

    Args:
      vae, params: the autoencoder and its parameters.
      images: images of the same size; only one batch of them is held at a time.
      batch: number of images that are encoded together.
    """

    @jax.jit
    def moments(params: Params, pixels: jax.Array) -> jax.Array:
        posterior: Posterior = vae.apply({"params": params}, normalised(pixels), method="encode")
        axes = (1, 2, 3)
        return jnp.stack([posterior.mean.mean(axes), jnp.square(posterior.mean).mean(axes)])

    found, rest = [], iter(images)
    while held := list(itertools.islice(rest, batch)):
        chunk = np.stack(held)
        pad = np.zeros((batch - len(chunk), *chunk.shape[1:]), np.uint8)  # one shape, one program
        found.append(np.asarray(moments(params, np.concatenate([chunk, pad])), np.float64)[:, : len(chunk)])
    mean, square = np.concatenate(found, axis=1).mean(axis=1)
    return float(np.sqrt(square - mean**2))
