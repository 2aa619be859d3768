"""Laws of the autoencoder's loss: whose gradient is whose, when the discriminator takes effect, what is recomputed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.models import AutoencoderKL
from diffuse_jax.models.autoencoder_kl import AutoencoderKLConfig
from diffuse_jax.models.discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from diffuse_jax.training.autoencoder import (
    Terms,
    autoencoder_loss,
    balance,
    decode,
    hinge_loss,
    latent_deviation,
    split_decoder,
)
from diffuse_jax.training.batches import IndexedBatches, WithStepIndex
from diffuse_jax.training.families import normalised
from diffuse_jax.training.initial import initial_params

VAE = AutoencoderKL(
    AutoencoderKLConfig(block_out_channels=(4,), norm_num_groups=2, latent_channels=2, mid_block_add_attention=False)
)
CRITIC = PatchDiscriminator(PatchDiscriminatorConfig(channels=4, layers=1, norm_num_groups=4))
TRAINABLE = {name: initial_params(net.shapes(), 0, ()) for name, net in (("vae", VAE), ("discriminator", CRITIC))}
START = 5


def batch(rng: np.random.Generator, update: int) -> dict[str, Any]:
    return {"pixel_values": rng.integers(0, 256, (2, 8, 8, 3), np.uint8), "update": np.full(2, update, np.int32)}


def gradient(terms: Terms, own: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    trainable = TRAINABLE if terms.discriminator else {"vae": TRAINABLE["vae"]}
    compute = jax.jit(jax.grad(lambda p: autoencoder_loss(terms, p, {}, own, jax.random.key(0)), has_aux=True))
    return compute(trainable)


def test_each_network_gets_the_gradient_of_its_own_loss(rng: np.random.Generator) -> None:
    """The discriminator gets that of the hinge loss on fixed images; the autoencoder that of the sum of its terms."""
    own = batch(rng, START)
    terms = Terms(vae=VAE, discriminator=CRITIC, discriminator_weight=0.7, discriminator_start=START)
    found, metrics = gradient(terms, own)
    x = normalised(jnp.asarray(own["pixel_values"]))
    posterior = VAE.apply({"params": TRAINABLE["vae"]}, x, method="encode")
    y = decode(VAE, TRAINABLE["vae"], posterior.sample(jax.random.key(0)))
    judge = lambda critic, images: CRITIC.apply({"params": critic}, images)
    hinge = jax.grad(lambda critic: hinge_loss(judge(critic, x), judge(critic, y)))(TRAINABLE["discriminator"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found["discriminator"], hinge)

    def by_hand(params: Any) -> jax.Array:
        plain, _ = autoencoder_loss(Terms(vae=VAE), {"vae": params}, {}, own, jax.random.key(0))
        z = VAE.apply({"params": params}, x, method="encode").sample(jax.random.key(0))
        return plain - 0.7 * metrics["balance"] * judge(TRAINABLE["discriminator"], decode(VAE, params, z)).mean()

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found["vae"], jax.grad(by_hand)(TRAINABLE["vae"])
    )


def test_before_its_start_the_discriminator_changes_nothing(rng: np.random.Generator) -> None:
    own = batch(rng, START - 1)
    terms = Terms(vae=VAE, discriminator=CRITIC, discriminator_weight=0.7, discriminator_start=START)
    found, _ = gradient(terms, own)
    plain, _ = gradient(Terms(vae=VAE), own)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found["vae"], plain["vae"])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(found["discriminator"]))


@pytest.mark.parametrize("discriminator", [None, CRITIC])
def test_a_decoder_trained_alone_gets_the_same_gradient(
    discriminator: PatchDiscriminator | None, rng: np.random.Generator
) -> None:
    own = batch(rng, START)
    terms = Terms(vae=VAE, discriminator=discriminator, discriminator_weight=0.7)
    decoder, encoder = split_decoder(TRAINABLE["vae"])
    assert sorted(decoder) == ["decoder", "post_quant_conv"]
    loss = lambda p: autoencoder_loss(terms, {**TRAINABLE, "vae": p}, {"vae": encoder}, own, jax.random.key(0))[0]
    wanted, _ = gradient(terms, own)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        jax.jit(jax.grad(loss))(decoder),
        {name: wanted["vae"][name] for name in decoder},
    )


@pytest.mark.parametrize("policy", ["blocks", "full"])
def test_recomputation_changes_no_gradient(policy: str, rng: np.random.Generator) -> None:
    own, again = batch(rng, 0), VAE.clone(remat=policy)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        gradient(Terms(vae=again), own)[0],
        gradient(Terms(vae=VAE), own)[0],
    )
    forward = jax.make_jaxpr(lambda p: again.apply({"params": p}, jnp.zeros((1, 8, 8, 3))))(TRAINABLE["vae"])
    parts = sum(equation.primitive.name in ("remat2", "checkpoint") for equation in forward.eqns)
    # one level and the middle in encoder and decoder; in them 1 and 2 residual blocks, and 2 and 2
    assert parts == {"blocks": 7, "full": 4}[policy]


def test_laws_of_hinge_and_balance() -> None:
    sure = jnp.full((2, 3, 3, 1), 1.5)
    assert float(hinge_loss(sure, -sure)) == 0, "a margin of one is enough"
    assert float(hinge_loss(jnp.zeros(3), jnp.zeros(3))) == 1
    g = jnp.ones((3, 3, 4, 3))
    assert float(balance(2 * g, g)) == pytest.approx(2, rel=1e-4)
    assert float(balance(g, 0 * g)) == 1e4


def test_the_deviation_is_that_of_all_latents(rng: np.random.Generator) -> None:
    images = rng.integers(0, 256, (5, 8, 8, 3), np.uint8)
    means = VAE.apply({"params": TRAINABLE["vae"]}, normalised(jnp.asarray(images)), method="encode").mean
    assert latent_deviation(VAE, TRAINABLE["vae"], iter(images), 2) == pytest.approx(float(means.std()), rel=1e-5)


def test_counted_batches_continue_where_they_were() -> None:
    make = lambda: WithStepIndex(IndexedBatches(lambda n: {"x": np.full(3, 10 * n)}, lambda n: [f"row {n}"]))
    first, second = make(), make()
    next(first), next(first)
    second.set_state(first.get_state())
    found = next(second)
    np.testing.assert_array_equal(found["update"], np.full(3, 2, np.int32))
    np.testing.assert_array_equal(found["x"], 20)
    assert second.names == ["row 2"]
    assert second.total is None
