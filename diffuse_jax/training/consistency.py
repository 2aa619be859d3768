"""Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378; with LoRA, arXiv 2311.05556).

A teacher's steps along its trajectory to the clean image teach a student to go there at once, from anywhere on the
trajectory: the student's clean images of two neighbouring points must agree.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffuse_jax.models import Params
from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.pipelines.parts.network import strength_embedding
from diffuse_jax.schedulers import LCMScheduler, Scheduler
from diffuse_jax.schedulers.noise_schedule import predict_eps, predict_x0, preserving_levels
from diffuse_jax.schedulers.noising import columns, lookup
from diffuse_jax.sharding import shard_batch
from diffuse_jax.training.families import TrainedFamily, trained_family
from diffuse_jax.training.families.base import Arrays, Networks
from diffuse_jax.training.families.stable_diffusion import distilled
from diffuse_jax.training.latent import Combine, networks
from diffuse_jax.training.settings import ConsistencySettings
from diffuse_jax.training.state import AVERAGE, Metrics

UNCONDITIONAL = "unconditional"
"""The name under which the loss finds the embeddings of no prompt among the frozen parameters."""


@dataclasses.dataclass(frozen=True)
class Consistency:
    """What is distilled, and the loss.

    Attributes:
      sampler: samples the student; its noise schedule and prediction type are those of both networks, its timesteps
        the solver's.
      settings: the range of guidance scales, and the loss.
    """

    sampler: LCMScheduler
    settings: ConsistencySettings

    @property
    def timesteps(self) -> jax.Array:
        """Where the solver's steps begin, ascending, int32 ``[num_ddim_timesteps]``."""
        return jnp.asarray(self.sampler.distilled(None, 1.0), jnp.int32)

    @property
    def stride(self) -> int:
        """Training timesteps of a step of the solver."""
        return self.sampler.num_train_timesteps // self.settings.num_ddim_timesteps


def consistency_from(settings: ConsistencySettings, teacher: DiffusionPipeline) -> Consistency:
    """The distillation of a pipeline, which may have only shapes in place of its parameters.

    Raises:
      ValueError: the pipeline has been distilled before, there are more steps than timesteps, or a model that predicts
        noise would be given nothing else.
    """
    if reason := distilled(teacher.components["unet"].config):
        raise ValueError(reason)
    sampler = LCMScheduler.from_config(teacher.scheduler).replace(
        original_inference_steps=settings.num_ddim_timesteps,
        timestep_scaling=settings.timestep_scaling_factor,
        clip_sample=False,
        thresholding=False,
    )
    if settings.num_ddim_timesteps > sampler.num_train_timesteps:
        raise ValueError(
            f"--num_ddim_timesteps must be at most {sampler.num_train_timesteps}, the timesteps of this model, got "
            f"{settings.num_ddim_timesteps}"
        )
    sampler.table(1)  # raises where the prediction says nothing about the image
    return Consistency(sampler, settings)


# The student


def with_guidance(pipe: DiffusionPipeline, dim: int) -> DiffusionPipeline:
    """The pipeline with a UNet that also takes an embedding of the guidance scale.

    The projection of the embedding is zero, so the network makes the same predictions at first.

    Args:
      pipe: a pipeline for text to image; its parameters may be shapes (``jax.ShapeDtypeStruct``).
      dim: width of the embedding.
    """
    unet, params = pipe.components["unet"], pipe.params["unet"]
    student = unet.clone(config=unet.config.replace(time_cond_proj_dim=dim))
    new = student.shapes()["time_embedding"]["cond_proj"]["kernel"].shape

    def grown(params: Params) -> Params:
        embedding = {**params["time_embedding"], "cond_proj": {"kernel": jnp.zeros(new, jnp.float32)}}
        return {**params, "time_embedding": embedding}

    shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    return pipe.replace(unet=(student, jax.eval_shape(grown, params) if shapes else grown(params)))


def teacher_of(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline with copies of its UNet's parameters, in the dtype in which it computes; a run may use up the
    others, as those of its student."""
    unet = pipe.components["unet"]
    copies = jax.tree.map(lambda x: jnp.array(x, unet.dtype, copy=True), pipe.params["unet"])
    return pipe.replace(unet=(unet, copies))


def frozen_from(pipe: DiffusionPipeline, unused: Sequence[str]) -> Params:
    """The frozen parameters of :func:`consistency_loss`: those of the teacher, and the embeddings of no prompt.

    Args:
      pipe: the teacher.
      unused: networks that the run does not need, because their outputs are cached.
    """
    kept = {name: tree for name, tree in pipe.params.items() if name not in unused}
    return kept | {UNCONDITIONAL: trained_family(pipe).unconditional(pipe)}


# The loss


class Draw(NamedTuple):
    """The random quantities of one training step."""

    noise: jax.Array  # [B,...] float32
    position: jax.Array  # int32 [B], the step of the solver
    w: jax.Array  # float32 [B], the guidance scale less 1


def draw(distillation: Consistency, key: jax.Array, x0: jax.Array) -> Draw:
    """Sample noise, steps of the solver and guidance scales for a batch of clean samples ``[B,...]``."""
    k_noise, k_index, k_w = jax.random.split(key, 3)
    settings, shape = distillation.settings, x0.shape[:1]
    noise = shard_batch(jax.random.normal(k_noise, x0.shape, jnp.float32))
    position = shard_batch(jax.random.randint(k_index, shape, 0, settings.num_ddim_timesteps, jnp.int32))
    w = jax.random.uniform(k_w, shape, jnp.float32, settings.w_min, settings.w_max)
    return Draw(noise, position, shard_batch(w))


class Prediction(NamedTuple):
    """The clean sample and the noise that a network's output means, ``[B,...]`` float32."""

    x0: jax.Array
    eps: jax.Array


def predicted(sampler: Scheduler, x: jax.Array, output: jax.Array, t: jax.Array) -> Prediction:
    """What the output for ``x [B,...]`` at timesteps ``t [B]`` means."""
    alpha, sigma = columns(lookup(preserving_levels(sampler.alpha_bar), t), x)
    what = sampler.prediction_type, x, output.astype(jnp.float32), alpha, sigma
    return Prediction(predict_x0(*what), predict_eps(*what))


def solved(sampler: Scheduler, start: Prediction, t: jax.Array) -> jax.Array:
    """The sample ``[B,...]`` at timesteps ``t [B]``, by a step of DDIM (Song et al. 2020, eq. 12)."""
    alpha, sigma = columns(lookup(preserving_levels(sampler.alpha_bar), t), start.x0)
    return alpha * start.x0 + sigma * start.eps


def consistent(sampler: LCMScheduler, x: jax.Array, output: jax.Array, t: jax.Array) -> jax.Array:
    """The consistency function ``f(x, t)`` ``[B,...]`` of the network with this output (eq. 9)."""
    c_skip, c_out = sampler.boundary(t.astype(jnp.float32).reshape(-1, *(1,) * (x.ndim - 1)))
    return c_skip * x + c_out * predicted(sampler, x, output, t).x0


def consistency_loss(
    family: TrainedFamily,
    teacher: Networks,
    combine: Combine,
    distillation: Consistency,
    trainable: Params,
    frozen: Params,
    batch: Arrays,
    key: jax.Array,
) -> tuple[jax.Array, Metrics]:
    """The distance between the student's clean sample and that of the target network one step of the teacher further on
    (Luo et al. 2023, eqs. 13-14 and algorithm 1).

    ``batch`` is that of :func:`~diffuse_jax.training.latent.denoising_loss`. The target network is the running average
    of the student where the state has one, or else the student itself; no gradient flows through it. ``frozen`` has the
    parameters of :func:`frozen_from`.
    """
    sampler, settings = distillation.sampler, distillation.settings
    k_begin, k_draw = jax.random.split(key)
    x0, given = family.begin(teacher, frozen, family.encoded(teacher, frozen, batch), k_begin)
    drawn = draw(distillation, k_draw, x0)
    start = distillation.timesteps[drawn.position]
    end = jnp.maximum(start - distillation.stride, 0)
    x = sampler.add_noise(x0.astype(jnp.float32), drawn.noise, start)

    # The teacher goes one step, with guidance (eq. 13).
    empty = {name: jnp.broadcast_to(row.astype(given[name].dtype), given[name].shape)
             for name, row in frozen[UNCONDITIONAL].items()}  # fmt: skip
    asked = predicted(sampler, x, family.predict(teacher, frozen, given, x, start), start)
    unasked = predicted(sampler, x, family.predict(teacher, frozen, {**given, **empty}, x, start), start)
    w = drawn.w.reshape(-1, *(1,) * (x.ndim - 1))
    guided = jax.tree.map(lambda with_prompt, without: with_prompt + w * (with_prompt - without), asked, unasked)
    x_end = solved(sampler, guided, end)

    def clean(params: Params, x: jax.Array, t: jax.Array) -> jax.Array:
        models, params = combine(frozen, params)
        dim = models[family.denoiser].config.time_cond_proj_dim
        seen = given if dim is None else {**given, "timestep_cond": strength_embedding(drawn.w, dim)}
        return consistent(sampler, x, family.predict(models, params, seen, x, t), t)

    wanted = jax.lax.stop_gradient(clean(frozen.get(AVERAGE, trainable), x_end, end))
    squares = jnp.square(clean(trainable, x, start) - wanted)
    if settings.loss_type == "l2":
        return squares.mean(), {"mse": squares.mean()}
    return (jnp.sqrt(squares + settings.huber_c**2) - settings.huber_c).mean(), {"mse": squares.mean()}


def consistency_loss_of(teacher: DiffusionPipeline, combine: Combine, distillation: Consistency) -> Any:
    """:func:`consistency_loss` in the form that :func:`~diffuse_jax.training.state.make_step` takes.

    Args:
      teacher: its pipeline; the networks of the student are those of ``combine``.
      combine: the student's trained and frozen parameters.
      distillation: from :func:`consistency_from`.
    """
    return functools.partial(consistency_loss, trained_family(teacher), networks(teacher), combine, distillation)
