"""One training step of this library for parity checks: all values, gradients and updates, by PyTorch's names.

The loss and the optimizer step are those of the trainers (:mod:`diffuse_jax.training`). The same step on PyTorch is
:mod:`diffuse_jax.torch_backend.training_torch`; :mod:`diffuse_jax.torch_backend.training_report` compares the two.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffuse_jax.adapters import lora
from diffuse_jax.adapters.lora_file import changes_of, stem_of
from diffuse_jax.adapters.targets import TARGETS
from diffuse_jax.models.base import Params
from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.training.batches import Batch
from diffuse_jax.training.data import Example
from diffuse_jax.training.families import TrainedFamily, trained_family
from diffuse_jax.training.families.base import Arrays, Networks
from diffuse_jax.training.latent import Combine, denoising_loss, divided, finish, networks, whole, with_lora
from diffuse_jax.training.objective import Draw, Objective, draw
from diffuse_jax.training.optimizer import make_optimizer
from diffuse_jax.training.state import Loss, Metrics, init_state, make_step
from diffuse_jax.weights.names import flatten, to_torch, torch_key

LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-3, 0.01, 1.0
"""Settings of the AdamW step on both sides; all others are the defaults of PyTorch's AdamW."""


class Update(NamedTuple):
    """The results of one training step, as NumPy arrays.

    Attributes:
      values: in order of computation: ``prompt embeddings [B,L,D]``, ``pooled embeddings [B,P]`` (SDXL), ``noised
        latents`` and ``prediction [B,h,w,c]``, the scalars ``mse``, ``prior_loss`` (with prior preservation), ``loss``
        and ``grad_norm`` (before clipping).
      gradients: the gradient of the loss for each trained parameter, with PyTorch's name and shape, before clipping.
      changes: the change of each parameter in the step, with PyTorch's name and shape.
    """

    values: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    changes: dict[str, np.ndarray]


class Trained(NamedTuple):
    """The trained parameters, and how they combine with the frozen ones.

    Attributes:
      trainable, frozen: parameters by component.
      combine: see :data:`~diffuse_jax.training.latent.Combine`.
      named: maps a tree like ``trainable`` to arrays with PyTorch's names and shapes.
    """

    trainable: Params
    frozen: Params
    combine: Combine
    named: Callable[[Params], dict[str, np.ndarray]]


def full(pipe: DiffusionPipeline, names: Sequence[str]) -> Trained:
    """Full fine-tuning of the named networks, whose parameters are float32."""
    trainable, frozen = divided(pipe, names)
    return Trained(trainable, frozen, whole(networks(pipe)), named_parameters)


def low_rank(pipe: DiffusionPipeline, names: Sequence[str], rank: int, seed: int, targets: str = TARGETS) -> Trained:
    """LoRA for the named networks; both matrices of each pair are random values that bfloat16 represents exactly.

    In real training, ``up`` starts at zero, so ``down`` would have no gradient to compare.
    """
    rng = np.random.default_rng(seed)
    fresh = {name: lora.init(pipe.components[name].shapes(), rank, jax.random.key(seed), targets) for name in names}
    normal = lambda x: jnp.asarray(rng.standard_normal(x.shape) / (2 * rank), jnp.bfloat16)
    pairs = jax.tree.map(lambda x: normal(x).astype(jnp.float32), fresh)
    return Trained(pairs, dict(pipe.params), with_lora(networks(pipe)), named_pairs)


def named_parameters(params: Mapping[str, Params]) -> dict[str, np.ndarray]:
    """``{"unet": tree}`` -> ``{"unet.conv_in.weight": array [out,in,h,w]}``."""
    flat = {(name, path): leaf for name, tree in params.items() for path, leaf in flatten(tree).items()}
    return {f"{name}.{torch_key(path)}": to_torch(path, np.asarray(leaf)) for (name, path), leaf in flat.items()}


def named_pairs(pairs: Mapping[str, Params]) -> dict[str, np.ndarray]:
    """``{"unet": pairs}`` -> ``{"unet.mid_block...to_q.lora_A.weight": array [r,in], ...}``, as peft names them."""
    found: dict[str, np.ndarray] = {}
    for name, tree in pairs.items():
        for path, change in changes_of(tree).items():
            found |= {f"{stem_of(name, path)}.lora_{'AB'[half == 'up']}.weight": x for half, x in change.parts.items()}
    return found


def batch_of(pipe: DiffusionPipeline, examples: Sequence[Example]) -> Batch:
    """The batch of captioned images of one size, arrays ``[B,...]``, as a trainer's data workers compute it."""
    family = trained_family(pipe)
    rows = [finish(family.words(pipe), family.arrays(pipe, True), None, None, example) for example in examples]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@functools.lru_cache(maxsize=4)
def step_noise(objective: Objective, seed: int, shape: tuple[int, ...]) -> tuple[np.ndarray, Draw]:
    """The random numbers of the first step: the noise of the latents' posterior, and those of the loss. They are
    remembered, so that a step that is timed again draws none; leave them as they are.

    The keys are those of :func:`~diffuse_jax.training.state.make_step` and
    :func:`~diffuse_jax.training.latent.denoising_loss`.

    Args:
      objective: the loss.
      seed: seed of the step.
      shape: shape of the latents, ``[B,h,w,c]``.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), 0)
    k_latent, k_draw = jax.random.split(key)
    drawn = jax.tree.map(np.asarray, draw(objective, k_draw, jnp.zeros(shape, jnp.float32)))
    return np.asarray(jax.random.normal(k_latent, shape, jnp.float32)), drawn


def our_step(pipe: DiffusionPipeline, trained: Trained, objective: Objective, batch: Batch, seed: int = 0) -> Update:
    """One step of a text-to-image trainer.

    Args:
      pipe: the pipeline with the networks.
      trained: the trained parameters.
      objective: the loss.
      batch: see :func:`batch_of`.
      seed: seed of the step's random numbers.
    """
    return step_of(recording_loss(trained_family(pipe), trained.combine, objective), trained, batch, seed)


def step_of(loss: Loss, trained: Trained, batch: Mapping[str, Any], seed: int = 0) -> Update:
    """One AdamW step with gradient clipping, by the library's compiled training step.

    Args:
      loss: the loss; its metrics become values of the result.
      trained: the trained parameters.
      batch: arrays ``[B,...]``.
      seed: seed of the step's random numbers.
    """
    adamw = make_optimizer("adamw", lambda _: LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM, weight_decay=WEIGHT_DECAY)
    optimizer = optax.chain(record_gradients(), adamw)
    state = init_state(trained.trainable, optimizer, use_ema=False)
    step = make_step(loss, optimizer, seed)
    state, metrics = step(state, trained.frozen, jax.tree.map(lambda x: x[None], dict(batch)))
    changes = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), state.params, trained.trainable)
    values = {name: np.asarray(value, np.float32) for name, value in metrics.items()}
    return Update(values, trained.named(state.opt_state[0]), trained.named(changes))


def record_gradients() -> optax.GradientTransformation:
    """Passes gradients on unchanged; its state is the last gradient."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradients, state, params=None: (gradients, gradients),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded(TrainedFamily):
    """A family whose denoiser's inputs and outputs are recorded in ``seen``."""

    family: TrainedFamily
    seen: dict[str, jax.Array]

    def encoded(self, models: Networks, params: Params, batch: Arrays) -> dict[str, jax.Array]:
        return self.family.encoded(models, params, batch)

    def begin(self, models: Networks, params: Params, batch: Arrays, key: jax.Array) -> tuple[jax.Array, Arrays]:
        return self.family.begin(models, params, batch, key)

    def predict(self, models: Networks, params: Params, batch: Arrays, x: jax.Array, t: jax.Array) -> jax.Array:
        prediction = self.family.predict(models, params, batch, x, t)
        named = {"prompt embeddings": "states", "pooled embeddings": "pooled"}
        found = {name: batch[row] for name, row in named.items() if row in batch}
        self.seen.update(found | {"noised latents": x, "prediction": prediction})
        return prediction


def recording_loss(family: TrainedFamily, combine: Combine, objective: Objective) -> Loss:
    """:func:`~diffuse_jax.training.latent.denoising_loss`, with the denoiser's inputs and outputs as further
    metrics."""

    def loss(
        trainable: Params, frozen: Params, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        seen: dict[str, jax.Array] = {}
        recorded = Recorded(family=family, seen=seen)
        value, metrics = denoising_loss(recorded, combine, objective, trainable, frozen, batch, key)
        return value, metrics | seen

    return loss
