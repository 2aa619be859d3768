"""The loss of an autoencoder: pixels, edges, divergence, and if wanted a perceptual and an adversarial term."""

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
from diffuse_jax.training.latent import normalised
from diffuse_jax.training.perceptual import perceptual_distance
from diffuse_jax.training.state import Metrics

LARGEST_BALANCE = 1e4
BALANCE_EPSILON = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """The networks that judge a reconstruction, and the weights of what they say.

    Attributes:
      vae: what is trained.
      kl_weight: of the divergence from a standard normal, per latent number.
      edge_weight: of the mean absolute error in differences of neighbouring pixels.
      perceptual_weight: of :func:`~diffuse_jax.training.perceptual.perceptual_distance`.
      perceptual: its network; None for none.
      discriminator: trained beside the autoencoder; None for none.
      discriminator_weight: of the adversarial term, besides :func:`balance`.
      discriminator_start: updates before the discriminator is trained and heard.
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
    """The loss of random latents' reconstructions.

    Args:
      terms: of the loss.
      trainable: ``vae`` and, if there is one, ``discriminator``. The one's gradient is of its own loss (all terms but
        the last), the other's of its own (the last: :func:`hinge_loss`).
      frozen: ``perceptual``, if there is such a term, and ``vae``, the parts of the autoencoder that stay as they are,
        if there are any; :func:`decoder_alone` divides one.
      batch: ``pixel_values`` uint8 ``[B,H,W,3]`` and, if there is a discriminator, ``update`` int32 ``[B]``: how many
        updates came before.
      key: of the latents' noise.
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
"""The parts of an autoencoder that turn latents into images."""


def decoder_alone(params: Params) -> tuple[Params, Params]:
    """An autoencoder's parameters as (those of the decoder, the others), to train the first and keep the latents."""
    decoder = {name: own for name, own in params.items() if name in DECODER}
    return decoder, {name: own for name, own in params.items() if name not in DECODER}


def decode(vae: AutoencoderKL, params: Params, z: jax.Array) -> jax.Array:
    """Pictures float32 ``[B,H,W,3]`` of latents as the encoder makes them."""
    return vae.apply({"params": params}, z, method="decode").astype(jnp.float32)


def reconstruction_loss(terms: Terms, frozen: Params, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Metrics]:
    """How far pictures ``y`` are from ``x``, both float32 ``[B,H,W,3]`` in [-1, 1]: every term but the adversarial."""
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
    """Reconstruction, adversarial and discriminator's loss in one number, of which each network gets its own gradient.

    What decides the pictures' gradient is worked out once, at the pictures: it gives the balance of the two terms at
    the decoder's last kernel, and with the balance known it goes through the decoder in one pass.
    """
    params, own = trainable["vae"], trainable["discriminator"]
    assert terms.discriminator is not None
    discriminate = lambda own, pictures: terms.discriminator.apply({"params": own}, pictures).astype(jnp.float32)
    last = lambda kernel: decode(terms.vae, with_last_kernel(params, kernel), z)
    y, pull = jax.vjp(last, params["decoder"]["conv_out"]["kernel"])
    seen, fixed = jax.lax.stop_gradient((y, own))
    (value, metrics), toward_x = jax.value_and_grad(judge, has_aux=True)(seen)
    deceit, toward_real = jax.value_and_grad(lambda y: -discriminate(fixed, y).mean())(seen)
    active = (update.max() >= terms.discriminator_start).astype(jnp.float32)
    ratio = jax.lax.stop_gradient(balance(pull(toward_x)[0], pull(toward_real)[0]))
    weight = active * ratio * terms.discriminator_weight
    real, fake = discriminate(own, x), discriminate(own, seen)
    detected = hinge_loss(real, fake)
    metrics |= {"adversarial": deceit, "balance": ratio, "discriminator": detected}
    metrics |= {"logits_real": real.mean(), "logits_fake": fake.mean()}
    total = value + weight * deceit + active * detected
    return with_gradient(total, toward_x + weight * toward_real, y), metrics


def with_last_kernel(params: Params, kernel: jax.Array) -> Params:
    """An autoencoder's parameters with another kernel of the decoder's last convolution."""
    last = {**params["decoder"]["conv_out"], "kernel": kernel}
    return {**params, "decoder": {**params["decoder"], "conv_out": last}}


def balance(reconstruction: jax.Array, adversarial: jax.Array) -> jax.Array:
    """How much the adversarial term must count to change the last layer as much as reconstruction does (eq. 7).

    Both are gradients of the decoder's last kernel. As in the authors' code the small number of the denominator is
    1e-4, and the ratio is at most 1e4.
    """
    norm = lambda gradient: jnp.sqrt(jnp.square(gradient).sum())
    return jnp.minimum(norm(reconstruction) / (norm(adversarial) + BALANCE_EPSILON), LARGEST_BALANCE)


def hinge_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """The discriminator's loss of its logits (Lim and Ye 2017, with the authors' factor 1/2)."""
    return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())


def with_gradient(value: jax.Array, gradient: jax.Array, at: jax.Array) -> jax.Array:
    """``value``, to whose gradient ``gradient`` at the array ``at`` of the same shape is added."""
    return value + (jax.lax.stop_gradient(gradient) * (at - jax.lax.stop_gradient(at))).sum()


def latent_deviation(vae: AutoencoderKL, params: Params, pictures: Iterable[np.ndarray], batch: int) -> float:
    """Standard deviation of all numbers in the latents' means of ``pictures`` (uint8 ``[H,W,3]`` each).

    Args:
      vae, params: the autoencoder.
      pictures: all of one size; only a batch of them is held at a time.
      batch: pictures that are encoded together.
    """

    @jax.jit
    def moments(params: Params, pixels: jax.Array) -> jax.Array:
        posterior: Posterior = vae.apply({"params": params}, normalised(pixels), method="encode")
        axes = (1, 2, 3)
        return jnp.stack([posterior.mean.mean(axes), jnp.square(posterior.mean).mean(axes)])

    found, rest = [], iter(pictures)
    while held := list(itertools.islice(rest, batch)):
        chunk = np.stack(held)
        pad = np.zeros((batch - len(chunk), *chunk.shape[1:]), np.uint8)  # one shape, one program
        found.append(np.asarray(moments(params, np.concatenate([chunk, pad])), np.float64)[:, : len(chunk)])
    mean, square = np.concatenate(found, axis=1).mean(axis=1)
    return float(np.sqrt(square - mean**2))
