"""One training step of this library, as a parity check sees it: every value, gradient and change, by PyTorch's names.

The loss and the update are the trainers' own (:mod:`diffuse_jax.training`). The same step on PyTorch is
:mod:`diffuse_jax.torch_backend.training_torch`; :mod:`diffuse_jax.torch_backend.training_report` compares the two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffuse_jax.adapters import lora
from diffuse_jax.models.base import Params
from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.pipelines.families import ClipFamily
from diffuse_jax.training.batches import Batch
from diffuse_jax.training.data import Example
from diffuse_jax.training.latent import (
    Combine,
    denoising_loss,
    finish,
    micro_conditioning,
    networks,
    tokenizers_of,
    whole,
    with_lora,
)
from diffuse_jax.training.objective import Draw, Objective, draw
from diffuse_jax.training.optimizer import make_optimizer
from diffuse_jax.training.state import Loss, Metrics, init_state, make_step
from diffuse_jax.weights.names import flatten, to_torch, torch_key

LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-3, 0.01, 1.0
"""Of the one update of AdamW, on both sides; everything else is the default of PyTorch's AdamW."""


class Update(NamedTuple):
    """What one step computed, as NumPy arrays.

    Attributes:
      values: in the order of computing: ``text states [B,L,D]``, ``pooled text [B,P]`` (SDXL), ``noised latents`` and
        ``prediction [B,h,w,c]``, the scalars ``mse``, ``prior_loss`` (with prior preservation), ``loss`` and
        ``grad_norm`` (before clipping).
      gradients: of the loss by each trained parameter, under PyTorch's name and in its shape, before clipping.
      changes: what the update added to each parameter; likewise.
    """

    values: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    changes: dict[str, np.ndarray]


class Trained(NamedTuple):
    """What is trained, and how it combines with what is not.

    Attributes:
      trainable, frozen: parameters by component.
      combine: see :data:`~diffuse_jax.training.latent.Combine`.
      named: such a tree as ``trainable`` -> its arrays by PyTorch's name, in PyTorch's shape.
    """

    trainable: Params
    frozen: Params
    combine: Combine
    named: Callable[[Params], dict[str, np.ndarray]]


def full(pipe: DiffusionPipeline, names: Sequence[str]) -> Trained:
    """Full fine-tuning of the named networks, whose parameters are float32."""
    trainable = {name: pipe.params[name] for name in names}
    frozen = {name: own for name, own in pipe.params.items() if name not in trainable}
    return Trained(trainable, frozen, whole(networks(pipe)), named_parameters)


def low_rank(pipe: DiffusionPipeline, names: Sequence[str], rank: int, seed: int) -> Trained:
    """LoRA of the named networks; both halves of every pair are random, and bfloat16 holds them exactly.

    A training starts with ``up`` at zero, where ``down`` has no gradient that could be compared.
    """
    rng = np.random.default_rng(seed)
    fresh = {name: lora.init(pipe.components[name].shapes(), rank, jax.random.key(seed)) for name in names}
    normal = lambda x: jnp.asarray(rng.standard_normal(x.shape) / (2 * rank), jnp.bfloat16)
    pairs = jax.tree.map(lambda x: normal(x).astype(jnp.float32), fresh)
    return Trained(pairs, dict(pipe.params), with_lora(networks(pipe)), named_pairs)


def named_parameters(params: Mapping[str, Params]) -> dict[str, np.ndarray]:
    """``{"unet": tree}`` -> ``{"unet.conv_in.weight": array [out,in,h,w]}``."""
    flat = {(name, path): leaf for name, tree in params.items() for path, leaf in flatten(tree).items()}
    return {f"{name}.{torch_key(path)}": to_torch(path, np.asarray(leaf)) for (name, path), leaf in flat.items()}


def named_pairs(pairs: Mapping[str, Params]) -> dict[str, np.ndarray]:
    """``{"unet": pairs}`` -> ``{"unet.mid_block...to_q.lora_A.weight": array [r,in], ...}``, as peft names them."""
    found = {}
    for name, tree in pairs.items():
        for path, pair in lora.pairs_of(tree).items():
            stem = f"{name}.{torch_key((*path, 'kernel')).removesuffix('.weight')}"
            found[f"{stem}.lora_A.weight"] = np.asarray(pair["down"]).T
            found[f"{stem}.lora_B.weight"] = np.asarray(pair["up"]).T
    return found


def batch_of(pipe: DiffusionPipeline, examples: Sequence[Example]) -> Batch:
    """The arrays of captioned pictures of one size, each ``[B,...]``, as a trainer's data workers make them."""
    time_ids = functools.partial(micro_conditioning, True) if "text_encoder_2" in pipe.components else None
    rows = [finish(tokenizers_of(pipe), time_ids, None, None, example) for example in examples]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def draws(objective: Objective, seed: int, shape: Sequence[int]) -> tuple[np.ndarray, Draw]:
    """The random numbers of the first step: noise of the latents' distribution, then those of the loss.

    The keys are those of :func:`~diffuse_jax.training.state.make_step` and
    :func:`~diffuse_jax.training.latent.denoising_loss`.

    Args:
      objective: of the loss.
      seed: of the step.
      shape: of the latents, ``[B,h,w,c]``.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), 0)
    k_latent, k_draw = jax.random.split(key)
    drawn = jax.tree.map(np.asarray, draw(objective, k_draw, jnp.zeros(shape, jnp.float32)))
    return np.asarray(jax.random.normal(k_latent, shape, jnp.float32)), drawn


def our_step(pipe: DiffusionPipeline, trained: Trained, objective: Objective, batch: Batch, seed: int = 0) -> Update:
    """One step of a text-to-image trainer.

    Args:
      pipe: the networks.
      trained: what is trained.
      objective: the loss.
      batch: see :func:`batch_of`.
      seed: of the step's random numbers.
    """
    return step_of(recorded(pipe.family, trained.combine, objective), trained, batch, seed)


def step_of(loss: Loss, trained: Trained, batch: Mapping[str, Any], seed: int = 0) -> Update:
    """One clipped update of AdamW by the library's own compiled step.

    Args:
      loss: of the step; its metrics become values of the result.
      trained: what is trained.
      batch: arrays ``[B,...]``.
      seed: of the step's random numbers.
    """
    own = make_optimizer("adamw", lambda _: LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM, weight_decay=WEIGHT_DECAY)
    optimizer = optax.chain(remembering(), own)
    state = init_state(trained.trainable, optimizer, use_ema=False)
    step = make_step(loss, optimizer, seed)
    state, metrics = step(state, trained.frozen, jax.tree.map(lambda x: x[None], dict(batch)))
    changes = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), state.params, trained.trainable)
    values = {name: np.asarray(value, np.float32) for name, value in metrics.items()}
    return Update(values, trained.named(state.opt_state[0]), trained.named(changes))


def remembering() -> optax.GradientTransformation:
    """Passes gradients on as they are; its state is the last one."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradients, state, params=None: (gradients, gradients),
    )


class Recorded(NamedTuple):
    """A UNet that keeps what it was asked and what it answered; stands where a model is applied."""

    model: Any
    seen: dict[str, jax.Array]

    def apply(self, variables: Mapping[str, Any], x: jax.Array, t: jax.Array, states: jax.Array, added: Any) -> Any:
        """As ``model.apply``."""
        prediction = self.model.apply(variables, x, t, states, added)
        self.seen.update({"text states": states, "noised latents": x, "prediction": prediction})
        if added is not None:
            self.seen["pooled text"] = added["text_embeds"]
        return prediction


def recorded(family: ClipFamily, combine: Combine, objective: Objective) -> Loss:
    """:func:`~diffuse_jax.training.latent.denoising_loss`, with what the UNet saw among its metrics."""

    def loss(
        trainable: Params, frozen: Params, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        seen: dict[str, jax.Array] = {}

        def watched(frozen: Params, trainable: Params) -> tuple[Mapping[str, Any], Params]:
            models, params = combine(frozen, trainable)
            return {**models, "unet": Recorded(models["unet"], seen)}, params

        value, metrics = denoising_loss(family, watched, objective, trainable, frozen, batch, key)
        return value, metrics | seen

    return loss
