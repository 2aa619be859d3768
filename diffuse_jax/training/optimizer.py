"""Optimisers by name, and the learning rates over a run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import optax

from diffuse_jax.training.checks import one_of
from diffuse_jax.training.settings import OptimizerSettings
from diffuse_jax.training.settings.run import SCHEDULES, check_warmup

DECAY_SHARE = 1 / 3
"""Share of a ``warmup_stable_decay`` run in which the rate falls."""

LOWEST = 1e-7
"""Where ``polynomial`` ends."""

Factor = Callable[[jnp.ndarray], jnp.ndarray]


def learning_rate(
    name: str, peak: float, warmup: int, total: int, *, cycles: int = 1, power: float = 1.0, rules: str = ""
) -> optax.Schedule:
    """The rate at each update: a linear ramp to ``peak`` over ``warmup`` updates, then the named schedule to ``total``.

    With ``p`` the share of the run after the warm-up that is over, the factor on the peak is

    * ``constant`` (which has no warm-up) and ``constant_with_warmup``: 1,
    * ``linear``: ``1 - p``,
    * ``cosine``: half a period, from 1 to 0,
    * ``cosine_with_restarts``: that ``cycles`` times,
    * ``polynomial``: ``(1 - p) ** power``, down to a rate of 1e-7,
    * ``piecewise_constant`` (no warm-up): ``rules`` such as ``"1:10,0.1:20,0.01"``: 1 until update 10, 0.1 until 20,
      then 0.01,
    * ``warmup_stable_decay``: 1 until the last third, in which it falls to 0 in a line; such a run can be resumed with
      another ``total``.

    Raises:
      ValueError: the name is not known, the warm-up is longer than the run, or the rules cannot be read.
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
            f"lr_step_rules must look like '1:10,0.1:20,0.01' (factor:until update, ..., last factor), got {rules!r}"
        ) from None
    ends = [until for _, until in pairs]
    if ends != sorted(set(ends)):
        raise ValueError(f"the updates in lr_step_rules must ascend, got {ends}")
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
    """AdamW (Loshchilov and Hutter 2019): two moments, so twice the parameters' memory."""
    return optax.adamw(rate, b1=beta1, b2=beta2, eps=epsilon, weight_decay=weight_decay)


def lion(
    rate: optax.Schedule, *, beta1: float = 0.9, beta2: float = 0.99, weight_decay: float = 0.01, epsilon: float = 0.0
) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023): one moment; wants a rate 3 to 10 times below AdamW's. ``epsilon`` has no use."""
    del epsilon
    return optax.lion(rate, b1=beta1, b2=beta2, weight_decay=weight_decay)


def adafactor(
    rate: optax.Schedule, *, beta1: float = 0.0, beta2: float = 0.999, weight_decay: float = 0.0, epsilon: float = 1e-30
) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern 2018) with the given rate: row and column means of the second moment only.

    ``beta1=0`` keeps no first moment; ``beta2`` has no use, its decay approaches 1 by the paper's rule.
    """
    del beta2
    descent = optax.adafactor(None, multiply_by_parameter_scale=False, momentum=beta1 or None, eps=epsilon)
    # optax's own decay is not scaled by the rate: 0.01 would take a hundredth of every weight in every update.
    return optax.chain(descent, optax.add_decayed_weights(-weight_decay), optax.scale_by_schedule(rate))


def prodigy(
    rate: optax.Schedule,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    weight_decay: float = 0.01,
    epsilon: float = 1e-8,
) -> optax.GradientTransformation:
    """Prodigy (Mishchenko and Defazio 2023): Adam that finds its rate; ``rate``, a factor on that, is 1 at its peak.

    It estimates how far the solution is from the start, so it keeps the first parameters too: four times their memory.
    While the rate rises in a warm-up, the estimate is held back.
    """
    return optax.contrib.prodigy(
        rate, betas=(beta1, beta2), eps=epsilon, weight_decay=weight_decay, safeguard_warmup=True
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": adamw,
    "lion": lion,
    "adafactor": adafactor,
    "prodigy": prodigy,
}
"""Optimisers by the name that ``--optimizer`` takes."""


def make_optimizer(
    name: str,
    rate: optax.Schedule,
    *,
    max_grad_norm: float | None = 1.0,
    own_rates: Mapping[str, optax.Schedule] | None = None,
    **settings: float,
) -> optax.GradientTransformation:
    """An optimiser after clipping the gradient to a global norm (None: not clipped).

    Args:
      name: one of :data:`OPTIMIZERS`.
      rate: the learning rate by update.
      max_grad_norm: see above.
      own_rates: networks (first names in the tree of parameters) whose rate is another one.
      **settings: ``beta1``, ``beta2``, ``weight_decay``, ``epsilon``; those left out are the optimiser's own.

    Raises:
      ValueError: the name is not known.
    """
    one_of(OPTIMIZERS, optimizer=name)
    optimizer = OPTIMIZERS[name](rate, **settings)
    if own_rates:
        parts = {network: OPTIMIZERS[name](own, **settings) for network, own in own_rates.items()}
        optimizer = optax.multi_transform({**parts, "others": optimizer}, functools.partial(_labels, parts))
    return optimizer if max_grad_norm is None else optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)


def _labels(own: Collection[str], params: Mapping[str, Any]) -> dict[str, str]:
    """Which optimiser each network has."""
    return {network: network if network in own else "others" for network in params}


TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
"""Networks that ``text_encoder_lr`` is for."""


def check_rates(settings: OptimizerSettings, trained: Iterable[str]) -> None:
    """Refuse a learning rate of text encoders that are not trained.

    Raises:
      ValueError: it says which flag is missing.
    """
    if settings.text_encoder_lr is not None and not set(TEXT_ENCODERS) & set(trained):
        raise ValueError(f"--text_encoder_lr {settings.text_encoder_lr:g} has no use without --train_text_encoder")


def optimizer_from(
    settings: OptimizerSettings, steps: int, images: int, trained: Collection[str] = ()
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser of a run, and its learning rate (that of the networks without one of their own).

    Args:
      settings: which optimiser.
      steps: training steps of the whole run.
      images: images of a step, for ``scale_lr``.
      trained: names of the trained networks.

    Raises:
      ValueError: the warm-up is longer than the run, or text encoders have a rate but are not trained.
    """
    scale = images if settings.scale_lr else 1

    def rate_up_to(peak: float) -> optax.Schedule:
        shape = {"cycles": settings.lr_num_cycles, "power": settings.lr_power, "rules": settings.lr_step_rules}
        return learning_rate(settings.lr_scheduler, peak * scale, settings.lr_warmup_steps, steps, **shape)  # type: ignore[arg-type]

    rate, own = rate_up_to(settings.learning_rate), {}
    if settings.text_encoder_lr is not None:
        check_rates(settings, trained)
        own = dict.fromkeys(TEXT_ENCODERS, rate_up_to(settings.text_encoder_lr))
    wanted = {name: getattr(settings, f"adam_{name}") for name in ("beta1", "beta2", "weight_decay", "epsilon")}
    given = {name: value for name, value in wanted.items() if value is not None}
    return make_optimizer(settings.optimizer, rate, max_grad_norm=settings.max_grad_norm, own_rates=own, **given), rate
