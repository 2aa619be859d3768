"""Optimisers by name, and learning-rate schedules."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffuse_jax.training.checks import one_of
from diffuse_jax.training.settings import OptimizerSettings
from diffuse_jax.training.settings.run import SCHEDULES, check_warmup

DECAY_SHARE = 1 / 3
"""Fraction of a ``warmup_stable_decay`` run during which the learning rate decays."""

LOWEST = 1e-7
"""Final learning rate of ``polynomial``."""

Factor = Callable[[jnp.ndarray], jnp.ndarray]


def learning_rate(
    name: str, peak: float, warmup: int, total: int, *, cycles: int = 1, power: float = 1.0, rules: str = ""
) -> optax.Schedule:
    """The learning rate at each training step: a linear warm-up to ``peak``, then the named schedule up to ``total``
    steps.

    With ``p`` the completed fraction of the run after the warm-up, the factor on the peak is

    * ``constant`` (which has no warm-up) and ``constant_with_warmup``: 1,
    * ``linear``: ``1 - p``,
    * ``cosine``: half a period, from 1 to 0,
    * ``cosine_with_restarts``: the same, ``cycles`` times,
    * ``polynomial``: ``(1 - p) ** power``, down to a rate of 1e-7,
    * ``piecewise_constant`` (no warm-up): given by ``rules``; ``"1:10,0.1:20,0.01"`` means 1 until step 10, 0.1 until
      step 20, then 0.01,
    * ``warmup_stable_decay``: 1 until the last third, in which it decays linearly to 0; such a run can be resumed with
      another ``total``.

    Raises:
      ValueError: the name is unknown, the warm-up is longer than the run, or the rules cannot be parsed.
    """
    one_of(SCHEDULES, lr_scheduler=name)
    if name == "piecewise_constant":
        return _piecewise(peak, rules)
    check_warmup(name, warmup, total)
    warmup = 0 if name == "constant" else warmup
    if name == "polynomial" and peak <= LOWEST:
        raise ValueError(f"the polynomial schedule ends at {LOWEST:g}, so learning_rate must be larger, got {peak:g}")
    factor = {
        "linear": lambda p: 1 - p,
        "cosine": lambda p: 0.5 * (1 + jnp.cos(jnp.pi * p)),
        "cosine_with_restarts": lambda p: jnp.where(p >= 1, 0.0, 0.5 * (1 + jnp.cos(jnp.pi * ((cycles * p) % 1)))),
        "polynomial": lambda p: ((peak - LOWEST) * (1 - p) ** power + LOWEST) / peak,
        "warmup_stable_decay": lambda p: jnp.minimum(1.0, (1 - p) / DECAY_SHARE),
    }.get(name, jnp.ones_like)

    def rate(step: jnp.ndarray) -> jnp.ndarray:
        s = jnp.asarray(step, jnp.float32)
        p = jnp.clip((s - warmup) / (total - warmup), 0.0, 1.0)
        return peak * jnp.where(s < warmup, s / max(warmup, 1), factor(p))

    return rate


def _piecewise(peak: float, rules: str) -> optax.Schedule:
    *pieces, last = rules.split(",")
    try:
        pairs = [(float(factor), int(until)) for factor, until in (piece.split(":") for piece in pieces)]
        final = float(last)
    except ValueError:
        raise ValueError(
            f"lr_step_rules must look like '1:10,0.1:20,0.01' (factor:until step, ..., last factor), got {rules!r}"
        ) from None
    ends = [until for _, until in pairs]
    if ends != sorted(set(ends)):
        raise ValueError(f"the steps in lr_step_rules must increase, got {ends}")
    factors = jnp.array([factor for factor, _ in pairs] + [final], jnp.float32)
    bounds = jnp.array(ends, jnp.float32)
    return lambda step: peak * factors[jnp.searchsorted(bounds, jnp.asarray(step, jnp.float32), side="right")]


def adamw(
    rate: optax.Schedule,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    weight_decay: float = 0.01,
    epsilon: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019): two moments, so its state takes twice the memory of the parameters."""
    return optax.adamw(rate, b1=beta1, b2=beta2, eps=epsilon, weight_decay=weight_decay)


def lion(
    rate: optax.Schedule, *, beta1: float = 0.9, beta2: float = 0.99, weight_decay: float = 0.01, epsilon: float = 0.0
) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023): one moment; use a learning rate 3 to 10 times below AdamW's. ``epsilon`` is unused."""
    del epsilon
    return optax.lion(rate, b1=beta1, b2=beta2, weight_decay=weight_decay)


def adafactor(
    rate: optax.Schedule, *, beta1: float = 0.0, beta2: float = 0.999, weight_decay: float = 0.0, epsilon: float = 1e-30
) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern 2018) with the given learning rate: stores only row and column means of the second
    moment.

    ``beta1=0`` keeps no first moment. ``beta2`` is unused: the decay approaches 1 by the paper's rule.
    """
    del beta2
    descent = optax.adafactor(None, multiply_by_parameter_scale=False, momentum=beta1 or None, eps=epsilon)
    # optax does not scale its weight decay by the learning rate: 0.01 would shrink every weight by 1 % in every step.
    return optax.chain(descent, optax.add_decayed_weights(-weight_decay), optax.scale_by_schedule(rate))


def prodigy(
    rate: optax.Schedule,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    weight_decay: float = 0.01,
    epsilon: float = 1e-8,
) -> optax.GradientTransformation:
    """Prodigy (Mishchenko and Defazio 2023): Adam that finds its learning rate; ``rate`` is a factor on it, with peak
    1.

    It estimates the distance of the solution from the start and therefore also stores the initial parameters: its state
    takes four times the memory of the parameters. During a warm-up the growth of the estimate is limited.
    """
    return optax.contrib.prodigy(
        rate, betas=(beta1, beta2), eps=epsilon, weight_decay=weight_decay, safeguard_warmup=True
    )


def muon(
    rate: optax.Schedule,
    *,
    beta1: float = 0.95,
    beta2: float = 0.999,
    weight_decay: float = 0.01,
    epsilon: float = 1e-8,
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024): the momentum of every kernel, as a matrix from all its inputs to its outputs, is made
    orthogonal, and so is that of LoRA pairs; biases, norms and embeddings have NAdamW.

    Updates have the size that AdamW's usually have (Liu et al. 2025), so that its learning rates fit. Matrices have one
    moment. ``beta1`` is their momentum (elsewhere it is 0.9), ``beta2`` the second moment's decay elsewhere.
    """
    return optax.contrib.muon(
        rate,
        beta=beta1,
        eps=epsilon,
        adam_b2=beta2,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=0.2,
    )


MATRICES = ("kernel", "down", "up")
"""Names of the parameters that are matrices, or become one if all axes but the last are taken together."""


def _matrices(params: Any) -> Any:
    """Which axes of a matrix are inputs, and which is the output; None for other parameters."""

    def axes(path: Any, x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        if x.ndim < 2 or getattr(path[-1], "key", None) not in MATRICES:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": adamw,
    "lion": lion,
    "adafactor": adafactor,
    "prodigy": prodigy,
    "muon": muon,
}
"""Optimisers by the name that ``--optimizer`` takes."""


def make_optimizer(
    name: str,
    rate: optax.Schedule,
    *,
    max_grad_norm: float | None = 1.0,
    rates: Mapping[str, optax.Schedule] | None = None,
    **settings: float,
) -> optax.GradientTransformation:
    """An optimiser preceded by gradient clipping.

    Args:
      name: one of :data:`OPTIMIZERS`.
      rate: the learning rate at each training step.
      max_grad_norm: global norm to which the gradient is clipped; None for no clipping.
      rates: learning rates that replace ``rate`` for some of the parameters: those whose path, such as
        ``unet/conv_in/kernel``, the key matches (a regular expression, searched for); the first match counts.
      **settings: ``beta1``, ``beta2``, ``weight_decay``, ``epsilon``; the optimiser's defaults if omitted.

    Raises:
      ValueError: the name is unknown.
    """
    one_of(OPTIMIZERS, optimizer=name)
    optimizer = OPTIMIZERS[name](rate, **settings)
    if rates:
        parts = {f"rate_{n}": OPTIMIZERS[name](own, **settings) for n, own in enumerate(rates.values())}
        optimizer = optax.multi_transform({**parts, OTHERS: optimizer}, functools.partial(labels, tuple(rates)))
    return optimizer if max_grad_norm is None else optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)


OTHERS = "others"
"""The label of parameters that no pattern matches."""


def labels(patterns: Sequence[str], params: Any) -> Any:
    """The label of every parameter: ``rate_0`` if the first pattern matches its path, and so on, or ``others``."""

    def label(path: Any, _: Any) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return next((f"rate_{n}" for n, pattern in enumerate(patterns) if re.search(pattern, name)), OTHERS)

    return jax.tree_util.tree_map_with_path(label, params)


TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
"""Networks that ``text_encoder_lr`` applies to."""


def check_rates(settings: OptimizerSettings, trained: Iterable[str]) -> None:
    """Refuse a learning rate for text encoders if none is trained.

    Raises:
      ValueError: ``text_encoder_lr`` is set, but no text encoder is trained; the message names the missing flag.
    """
    if settings.text_encoder_lr is not None and not set(TEXT_ENCODERS) & set(trained):
        raise ValueError(f"--text_encoder_lr {settings.text_encoder_lr:g} has no effect without --train_text_encoder")


def check_rules(patterns: Sequence[str], params: Any) -> None:
    """Refuse a pattern of ``lr_rules`` that is no parameter's first match.

    Raises:
      ValueError: there is one; the message names paths of parameters.
    """
    found = {*jax.tree.leaves(labels(patterns, params))} if patterns else set()
    for n, pattern in enumerate(patterns):
        if f"rate_{n}" not in found:
            paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree.leaves_with_path(params)]
            raise ValueError(
                f"--lr_rules: {pattern!r} applies to no parameter (the first rule that matches counts); trained are, "
                f"for example, {', '.join(paths[:: max(1, len(paths) // 3)][:3])}"
            )


def optimizer_from(
    settings: OptimizerSettings, steps: int, images: int, trained: Any = ()
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser of a run, and its learning rate (that of the networks without a separate one).

    Args:
      settings: the settings of the optimiser.
      steps: total number of training steps.
      images: number of images per training step, for ``scale_lr``.
      trained: the trained parameters by network, or their shapes.

    Raises:
      ValueError: the warm-up is longer than the run, or a rate is set for parameters that are not trained.
    """
    scale = images if settings.scale_lr else 1

    def rate_up_to(peak: float) -> optax.Schedule:
        shape = {"cycles": settings.lr_num_cycles, "power": settings.lr_power, "rules": settings.lr_step_rules}
        return learning_rate(settings.lr_scheduler, peak * scale, settings.lr_warmup_steps, steps, **shape)  # type: ignore[arg-type]

    check_rates(settings, trained)
    peaks = dict(settings.rates)
    if settings.text_encoder_lr is not None:
        peaks.setdefault(f"^({'|'.join(TEXT_ENCODERS)})/", settings.text_encoder_lr)
    check_rules(tuple(settings.rates), trained)
    rate = rate_up_to(settings.learning_rate)
    wanted = {name: getattr(settings, f"adam_{name}") for name in ("beta1", "beta2", "weight_decay", "epsilon")}
    given = {name: value for name, value in wanted.items() if value is not None}
    rates = {pattern: rate_up_to(peak) for pattern, peak in peaks.items()}
    optimizer = make_optimizer(settings.optimizer, rate, max_grad_norm=settings.max_grad_norm, rates=rates, **given)
    return optimizer, rate
