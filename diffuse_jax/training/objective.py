"""The training target of a denoising network, and the weighting of noise levels.

A trainer samples noise and timesteps (:func:`draw`), evaluates its network on the noised sample (:func:`noised`) and
computes the loss of the prediction (:func:`errors`); an :class:`Objective` describes all three.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.bounds import NONNEGATIVE, POSITIVE
from diffuse_jax.schedulers.continuous import ContinuousScheduler
from diffuse_jax.schedulers.edm import EDMScheduler
from diffuse_jax.schedulers.flow_match import FlowMatchScheduler
from diffuse_jax.schedulers.scheduler import Scheduler
from diffuse_jax.sharding import shard_batch
from diffuse_jax.training.checks import Checked, one_of
from diffuse_jax.training.settings import ObjectiveSettings
from diffuse_jax.training.settings.methods import TIMESTEP_BIASES
from diffuse_jax.training.times import Times


def target(scheduler: Scheduler, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """The target for ``add_noise(x0, noise, t)``: the noise, the velocity or the clean sample, ``[B,...]``.

    EDM's schedulers call the network F of Karras et al. 2022, eq. 7, ``epsilon``; its target is ``(x0 - c_skip x) /
    c_out``, which is the velocity with the other sign. The weight ``lambda(sigma) c_out^2`` of its squared error is 1.

    Raises:
      ValueError: the scheduler's ``prediction_type`` is not one of these.
    """
    match scheduler.prediction_type:
        case "epsilon" if isinstance(scheduler, EDMScheduler):
            return -scheduler.velocity(x0, noise, t)
        case "epsilon":
            return noise
        case "v_prediction" | "flow_prediction":
            return scheduler.velocity(x0, noise, t)
        case "sample":
            return x0
    expected = "epsilon, v_prediction, flow_prediction or sample"
    raise ValueError(f"prediction_type must be {expected}, got {scheduler.prediction_type!r}")


def snr_table(scheduler: Scheduler) -> np.ndarray:
    """The signal-to-noise ratio ``alpha_bar / (1 - alpha_bar)`` of every training timestep, float32 ``[T]``."""
    return (scheduler.alpha_bar / (1 - scheduler.alpha_bar)).astype(np.float32)


def snr_at(scheduler: Scheduler, t: jax.Array) -> jax.Array:
    """The signal-to-noise ratios ``[B]`` at training timesteps ``t [B]``, or at times of a continuous schedule."""
    if isinstance(scheduler, ContinuousScheduler):
        alpha, sigma = scheduler.level(t, jnp)
        return jnp.square(alpha / sigma)
    return jnp.asarray(snr_table(scheduler))[t]


def min_snr_weight(snr: jax.Array, gamma: float, prediction_type: str) -> jax.Array:
    """Min-SNR-gamma weight of the squared error (Hang et al. 2023, section 3.4): ``min(s, gamma) / s``.

    ``s`` is the ratio itself for noise and sample prediction and ``snr + 1`` for velocity, whose error is already that
    of the clean sample times ``snr + 1``. If a schedule ends in pure noise (ratio 0), the weight there is 1, its limit.
    """
    s = snr + 1 if prediction_type == "v_prediction" else snr
    return jnp.where(s > gamma, gamma / jnp.maximum(s, 1e-8), 1.0)


def flow_weight(sigma: jax.Array, scheme: str, lowest: float) -> jax.Array:
    """Weights of the squared error in flow matching at levels ``sigma [B]`` (Esser et al. 2024, section 3.1).

    Args:
      sigma: levels in [0, 1].
      scheme: "sigma_sqrt", ``1 / sigma^2``, with which the error is that of a clean sample; or "cosmap".
      lowest: smaller levels have the weight of this one.
    """
    if scheme == "sigma_sqrt":
        return jnp.square(1 / jnp.maximum(sigma, lowest))
    return 2 / (jnp.pi * (1 - 2 * sigma + 2 * jnp.square(sigma)))


def per_sample_error(prediction: jax.Array, wanted: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean squared error of each sample in float32, ``[B,...,C] -> [B]``.

    ``mask [B,...]`` weights the error of every place; the result is the weighted mean, 0 for a sample whose weights are
    all 0.
    """
    error = jnp.square(prediction.astype(jnp.float32) - wanted.astype(jnp.float32))
    if mask is None:
        return error.mean(tuple(range(1, error.ndim)))
    weight = mask.astype(jnp.float32)
    total = weight.sum(tuple(range(1, weight.ndim)))
    weighted = (error.mean(-1) * weight).sum(tuple(range(1, weight.ndim)))
    return jnp.where(total > 0, weighted / jnp.where(total > 0, total, 1), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(Checked):
    """The loss of a denoising network, for latents or pixels.

    Attributes:
      scheduler: the noise schedule and the prediction type.
      snr_gamma: Min-SNR weighting, see :func:`min_snr_weight`; None for no such weighting.
      noise_offset: scale of noise shared by all pixels of a channel, so that brightness is learned too (Guttenberg
        2023).
      input_perturbation: scale of additional noise in the input that is not part of the target (Ning et al. 2023);
        typically 0.1.
      timestep_bias: probabilities of the timesteps, from :func:`timestep_probabilities`; None for uniform ones.
      times: how timesteps are chosen in continuous time; None for uniform ones.
      flow_weighting: weights of the levels of flow matching, see :func:`flow_weight`; None for equal ones.
      snr_weighting: multiply the error by the signal-to-noise ratio. For sample prediction, this gives the error of the
        corresponding noise prediction (Salimans and Ho 2022, section 4); with ``snr_gamma`` the weight is
        ``min(s, gamma)``.
      prior_loss_weight: weight of the loss on class images relative to instance images, for DreamBooth's prior
        preservation (Ruiz et al. 2023, eq. 2); see :func:`errors`.
    """

    scheduler: Scheduler
    snr_gamma: Annotated[float, POSITIVE] | None = None
    noise_offset: Annotated[float, NONNEGATIVE] = 0.0
    input_perturbation: Annotated[float, NONNEGATIVE] = 0.0
    timestep_bias: tuple[float, ...] | None = None
    times: Times | None = None
    flow_weighting: str | None = None
    snr_weighting: bool = False
    prior_loss_weight: Annotated[float, NONNEGATIVE] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(("sigma_sqrt", "cosmap"), flow_weighting=self.flow_weighting)
        wanted = FlowMatchScheduler if self.times is None else self.times.schedulers
        if (self.times or self.flow_weighting) and not isinstance(self.scheduler, wanted):
            what = self.times or f"flow_weighting {self.flow_weighting}"
            raise ValueError(f"{what} needs a {wanted.__name__}, got a {type(self.scheduler).__name__}")
        steps = self.scheduler.num_train_timesteps
        if self.timestep_bias is not None and len(self.timestep_bias) != steps:
            raise ValueError(f"timestep_bias has {len(self.timestep_bias)} entries for {steps} training timesteps")


def objective_from(settings: ObjectiveSettings, scheduler: Scheduler, prior_loss_weight: float = 1.0) -> Objective:
    """The objective of a model with this scheduler.

    Raises:
      ValueError: the biased timesteps are not within those of the scheduler.
    """
    bias = timestep_probabilities(
        settings.timestep_bias_strategy,
        scheduler.num_train_timesteps,
        multiplier=settings.timestep_bias_multiplier,
        portion=settings.timestep_bias_portion,
        begin=settings.timestep_bias_begin,
        end=settings.timestep_bias_end,
    )
    return Objective(
        scheduler=scheduler,
        snr_gamma=settings.snr_gamma,
        noise_offset=settings.noise_offset,
        input_perturbation=settings.input_perturbation,
        timestep_bias=bias,
        prior_loss_weight=prior_loss_weight,
    )


class Draw(NamedTuple):
    """The random quantities of one training step: noise, additional noise of the input, and timesteps."""

    noise: jax.Array  # [B,...]
    extra: jax.Array | None  # [B,...] additional noise of the input, not part of the target
    t: jax.Array  # int32 [B]; float32 if the schedule is continuous


def draw(objective: Objective, key: jax.Array, x0: jax.Array) -> Draw:
    """Sample noise and timesteps for a batch of clean samples ``[B,...,C]``, float32."""
    k_noise, k_time, k_offset, k_extra = jax.random.split(key, 4)
    noise = shard_batch(jax.random.normal(k_noise, x0.shape, jnp.float32))
    if objective.noise_offset:
        flat = (x0.shape[0], *(1,) * (x0.ndim - 2), x0.shape[-1])
        noise = noise + objective.noise_offset * jax.random.normal(k_offset, flat, jnp.float32)
    extra = None
    if objective.input_perturbation:
        extra = objective.input_perturbation * jax.random.normal(k_extra, x0.shape, jnp.float32)
    steps, shape = objective.scheduler.num_train_timesteps, x0.shape[:1]
    if objective.times is not None:
        return Draw(noise, extra, shard_batch(objective.times(objective.scheduler, k_time, x0.shape[0])))
    if isinstance(objective.scheduler, ContinuousScheduler):
        low, high = objective.scheduler.timestep_range
        return Draw(noise, extra, shard_batch(jax.random.uniform(k_time, shape, jnp.float32, low, high)))
    if objective.timestep_bias is None:
        return Draw(noise, extra, shard_batch(jax.random.randint(k_time, shape, 0, steps, jnp.int32)))
    logits = jnp.log(jnp.asarray(objective.timestep_bias, jnp.float32))
    return Draw(noise, extra, shard_batch(jax.random.categorical(k_time, logits, shape=shape).astype(jnp.int32)))


def noised(objective: Objective, x0: jax.Array, drawn: Draw) -> jax.Array:
    """The network's input ``[B,...]``, float32."""
    noise = drawn.noise if drawn.extra is None else drawn.noise + drawn.extra
    noisy = objective.scheduler.add_noise(x0.astype(jnp.float32), noise, drawn.t)
    return objective.scheduler.network_input(noisy, drawn.t)


def errors(
    objective: Objective,
    prediction: jax.Array,
    x0: jax.Array,
    drawn: Draw,
    prior: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss and its parts as metrics: ``mse`` without weights and, with ``prior``, ``prior_loss``.

    Args:
      prediction: output of the network, ``[B,...]``.
      x0: clean samples, ``[B,...]``.
      drawn: the noise and timesteps of the network's input.
      prior: bool ``[B]``, true for class images; their mean loss is computed separately and added with the weight
        ``prior_loss_weight``. None without prior preservation.
      mask: ``[B,...]`` without the channels of ``x0``, the weight of every place; see :func:`per_sample_error`. None
        for equal weights.
    """
    wanted = target(objective.scheduler, x0.astype(jnp.float32), drawn.noise, drawn.t)
    squares = per_sample_error(prediction, wanted, mask)
    weighted, snr = squares, snr_at(objective.scheduler, drawn.t)
    if objective.snr_weighting:
        weighted = weighted * snr
    if objective.snr_gamma is not None:
        weighted = weighted * min_snr_weight(snr, objective.snr_gamma, objective.scheduler.prediction_type)
    if objective.flow_weighting is not None:
        assert isinstance(objective.scheduler, FlowMatchScheduler)
        _, sigma = objective.scheduler.level(drawn.t, jnp)
        lowest = 1 / objective.scheduler.num_train_timesteps
        weighted = weighted * flow_weight(sigma, objective.flow_weighting, lowest)
    if prior is None:
        return weighted.mean(), {"mse": squares.mean()}
    instance_loss = mean_where(weighted, ~prior)
    prior_loss = mean_where(weighted, prior)
    metrics = {"mse": mean_where(squares, ~prior), "prior_loss": prior_loss}
    return instance_loss + objective.prior_loss_weight * prior_loss, metrics


def mean_where(values: jax.Array, where: jax.Array) -> jax.Array:
    """Mean of the selected ``values [B]``; 0 if none is selected."""
    return jnp.where(where, values, 0).sum() / jnp.maximum(where.sum(dtype=values.dtype), 1)


def timestep_probabilities(
    strategy: str, steps: int, *, multiplier: float = 1.0, portion: float = 0.25, begin: int = 0, end: int | None = None
) -> tuple[float, ...] | None:
    """The probabilities with which training timesteps are sampled; None for uniform ones.

    Args:
      strategy: which timesteps to favour: "none"; "earlier" or "later" for the first or last ``portion`` of them;
        "range" for those from ``begin`` up to, but not including, ``end``; "cubic" for timesteps ``steps (1 - u**3)``
        with uniform ``u``, mostly the noisy ones (Mou et al. 2023, section 3.4), whatever the other arguments.
      steps: number of training timesteps.
      multiplier: how many times more often these are sampled than the others.
      portion, begin, end: see ``strategy``; ``end`` is ``steps`` if None.

    Raises:
      ValueError: the strategy is unknown, the range exceeds the timesteps, or multiplier or portion is not positive.
    """
    one_of(TIMESTEP_BIASES, timestep_bias_strategy=strategy)
    if strategy == "none":
        return None
    if strategy == "cubic":
        edges = np.cbrt(1 - np.arange(steps + 1) / steps)
        return tuple(float(p) for p in edges[:-1] - edges[1:])
    if multiplier <= 0:
        raise ValueError(f"timestep_bias_multiplier must be positive, got {multiplier}; 'none' turns the bias off")
    count = int(portion * steps)
    if strategy != "range" and not 1 <= count <= steps:
        raise ValueError(f"timestep_bias_portion must leave 1 to {steps} timesteps, {portion} leaves {count}")
    end = steps if end is None else end
    if strategy == "range" and not 0 <= begin < end <= steps:
        raise ValueError(f"timestep_bias_begin and _end must be 0 <= begin < end <= {steps}, got {begin} and {end}")
    chosen = {"earlier": slice(count), "later": slice(steps - count, None), "range": slice(begin, end)}[strategy]
    weights = np.ones(steps)
    weights[chosen] *= multiplier
    return tuple(float(w) for w in weights / weights.sum())
