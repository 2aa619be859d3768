"""What all schedulers share: the configuration and its JSON, the choice of the steps to run, noising.

A scheduler is a frozen configuration plus two methods in float64 NumPy: ``grid`` (where the network is evaluated) and
``evaluations`` (one :class:`Row` per evaluation).
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from diffuse_jax.config import Config
from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers import settings as st
from diffuse_jax.schedulers import sigmas as sg
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.table import Evaluation, Grid, Level, Row, Table

if TYPE_CHECKING:
    import jax

    from diffuse_jax.schedulers.plan import Plan

logger = logging.getLogger(__name__)

CONFIG_NAME = "scheduler_config.json"

REGISTRY: dict[str, type[Scheduler]] = {}
"""Every scheduler class by name; filled as the classes are defined."""


class Settings:
    """The signature of a scheduler's class: its settings and their defaults, which ``__new__`` alone would hide."""

    def __get__(self, instance: Scheduler | None, owner: type[Scheduler]) -> inspect.Signature:
        parameters = inspect.signature(owner.__init__).parameters
        return inspect.Signature([p for name, p in parameters.items() if name in (*_field_names(owner), "extra")])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheduler(Config):
    """Base of all schedulers; its fields are the keys that every ``scheduler_config.json`` has.

    ``Scheduler.from_config`` and ``Scheduler.from_pretrained`` pick the class that the JSON names; the same methods of
    a subclass build that subclass from the configuration of any other.

    Attributes:
      num_train_timesteps: steps of the training schedule.
      beta_start, beta_end, beta_schedule: the training schedule; ``trained_betas`` gives it outright.
      prediction_type: what the network returns: ``epsilon``, ``v_prediction`` or ``sample``.
      timestep_spacing: ``leading``, ``linspace`` or ``trailing``; ``steps_offset`` is added to leading timesteps.
      given: names of fields that were set on purpose, which a scheduler built from this one inherits.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    given: tuple[str, ...] = dataclasses.field(init=False, compare=False, repr=False)

    __signature__ = Settings()
    absent: ClassVar[tuple[str, ...]] = ()
    """Common settings that this scheduler does not have: its algorithm fixes them. Not read, not written."""
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Allowed values of fields beyond the common ones."""
    renamed: ClassVar[dict[str, str]] = {}
    """Older names of settings."""
    aliases: ClassVar[dict[str, dict[str, str]]] = {}
    """Values of other schedulers (or older spellings) and what they mean here."""
    grid_options: ClassVar[tuple[str, ...]] = ()
    step_options: ClassVar[tuple[str, ...]] = ()
    """Keywords that :meth:`plan` hands to ``grid`` and to ``evaluations``."""
    coordinates: ClassVar[str] = "preserving"
    """The sampler's coordinates, one of ``noise_schedule.COORDINATES``."""
    sigma_data: ClassVar[float] = 1.0
    """Spread of clean samples that the network's preconditioning was made for (Karras et al. 2022)."""
    limits_steps: ClassVar[bool] = True
    """There are no more steps than ``num_train_timesteps``."""
    final_sigma_given: ClassVar[bool] = True
    """Explicit ``sigmas`` end with the level after the last step."""
    strength_in_grid: ClassVar[bool] = False
    """``grid`` itself takes ``strength`` (and then all of its steps are run)."""
    ascends: ClassVar[bool] = False
    """The run goes from a picture to noise: timesteps and sigmas ascend, and ``strength`` runs the first steps."""

    def __init_subclass__(cls, *, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.class_name = cls.__name__
        if not abstract:
            REGISTRY[cls.__name__] = cls

    def __new__(cls, **fields: Any) -> Self:
        # Only the call can tell a default from the same value passed on purpose.
        self = super().__new__(cls)
        object.__setattr__(self, "given", tuple(sorted({*fields} - {"extra"})))
        return self

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self):
            if field.name in self.absent and getattr(self, field.name) != field.default:
                has = ", ".join(_field_names(type(self)))
                raise ValueError(f"{self.class_name} has no setting {field.name}; it has {has}")
        aliases = {"prediction_type": {"original_sample": "sample"}} | self.aliases
        for name, table in aliases.items():
            object.__setattr__(self, name, table.get(getattr(self, name), getattr(self, name)))
        for name, allowed in (_COMMON_CHOICES | self.choices).items():
            if getattr(self, name) not in allowed:
                given = getattr(self, name)
                raise ValueError(f"{self.class_name}: {name} must be one of {list(allowed)}, got {given!r}")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(
                f"{self.class_name}: trained_betas has {len(self.trained_betas)} entries but num_train_timesteps is"
                f" {self.num_train_timesteps}; they must agree"
            )

    # ---- configuration ---------------------------------------------------------------------------------------------

    @property
    def config(self) -> Self:
        """The scheduler itself: it *is* its configuration (``X.from_config(pipe.scheduler.config)`` works)."""
        return self

    @property
    def ignored(self) -> dict[str, Any]:
        """Settings of the configuration that this scheduler has no use for; kept and written back."""
        return {k: v for k, v in super().to_json().items() if k in dict(self.extra) and not k.startswith("_")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Build from the object of a ``scheduler_config.json``; keys of other schedulers are kept."""
        data = st.modern_spelling(data, cls.renamed)
        names = _field_names(cls)
        fields = {k: v for k, v in data.items() if k in names}
        missing = [f.name for f in dataclasses.fields(cls) if f.init and f.default is dataclasses.MISSING]
        if not {*missing} <= {*fields}:
            raise ValueError(f"{cls.class_name} needs the setting {', '.join({*missing} - {*fields})}")
        extra = {k: v for k, v in data.items() if k not in names and k not in ("_class_name", "given")}
        try:
            return cls(**fields, extra=_freeze(extra))
        except TypeError as error:
            raise ValueError(f"{cls.class_name}: a setting has the wrong type: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """Every setting, the kept unknown ones and ``_class_name``: what PyTorch diffusers reads."""
        left_out = {"given", *self.absent} - set(dict(self.extra))
        return {k: v for k, v in super().to_json().items() if k not in left_out}

    def settings(self) -> dict[str, Any]:
        """What another scheduler inherits: the settings given on purpose, not the defaults of this class."""
        names = _field_names(type(self))
        return {k: v for k, v in self.to_json().items() if k not in names or k in self.given}

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed; the changed ones count as given on purpose."""
        new = dataclasses.replace(self, **changes)
        object.__setattr__(new, "given", tuple(sorted({*self.given, *changes} - {"extra"})))
        return new

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | Scheduler, **changes: Any) -> Self:
        """Build from a dict or from another scheduler, keeping every setting that both understand.

        Settings that only the other one has are kept in ``extra`` (see :attr:`ignored`). Those that make a difference
        are reported on the log: a clipping that this one does not do, but not the order of the other one's method.

        Raises:
          ValueError: a setting is not allowed here, or (on ``Scheduler`` itself) the class is unknown.
        """
        data = config.settings() if isinstance(config, Scheduler) else dict(config)
        source = str(data.get("_class_name", "")).removeprefix("Flax")
        target = cls if cls is not Scheduler else _class_named(source)
        scheduler = target.from_json(data | changes)
        unknown = sorted(set(changes) & set(scheduler.ignored))
        if unknown:
            has = ", ".join(_field_names(target))
            raise ValueError(f"{target.class_name} has no setting {', '.join(unknown)}; it has {has}")
        lost = st.worth_telling(scheduler.ignored, scheduler.to_json(), _defaults(target))
        if lost:
            logger.warning("%s built from %s ignores: %s", target.class_name, source or "a dict", lost)
        return scheduler  # type: ignore[return-value]

    @classmethod
    def from_pretrained(cls, source: str | Path, *, subfolder: str | None = None, **resolve_options: Any) -> Self:
        """Read ``scheduler_config.json`` from a folder (``source/subfolder``) or from a Hub repository.

        Args:
          source: a local folder, or a Hub id.
          subfolder: ``"scheduler"`` in a pipeline's folder.
          **resolve_options: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` for the Hub.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is not a JSON object or holds a value that is not allowed; the file is named.
        """
        if Path(source).is_dir():
            folder = Path(source) / (subfolder or "")
        else:
            from diffuse_jax.weights import resolve

            folder = resolve(source, subfolder=subfolder, **resolve_options)
        path = folder / CONFIG_NAME
        if not path.is_file():
            raise FileNotFoundError(f"no {CONFIG_NAME} in {folder}")
        try:
            data = json.loads(path.read_text())
            if not isinstance(data, dict):
                raise ValueError(f"expected a JSON object, got {type(data).__name__}")
            return cls.from_config(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``folder/scheduler_config.json`` (whole or not at all) and return its path."""
        from diffuse_jax.weights.files import write_json

        path = Path(folder) / CONFIG_NAME
        write_json(path, self.to_json())
        return path

    # ---- the training schedule -------------------------------------------------------------------------------------

    @cached_property
    def alpha_bar(self) -> Array:
        """Cumulative product of ``1 - beta``, float64 ``[num_train_timesteps]``."""
        return _alpha_bar(
            self.beta_schedule,
            self.beta_start,
            self.beta_end,
            self.num_train_timesteps,
            self.trained_betas,
            getattr(self, "rescale_betas_zero_snr", False),
        )

    @cached_property
    def sigma_table(self) -> Array:
        """``sqrt((1 - alpha_bar) / alpha_bar)``, ascending; zero terminal SNR is kept just finite."""
        alpha_bar = self.alpha_bar
        if alpha_bar[-1] == 0:
            # In long schedules the timestep before may have even less signal; then half of that.
            almost = ns.ALMOST_ZERO_SNR if alpha_bar[-2] > ns.ALMOST_ZERO_SNR else alpha_bar[-2] / 4
            alpha_bar = np.append(alpha_bar[:-1], almost)
        return np.sqrt((1 - alpha_bar) / alpha_bar)

    def train_levels(self) -> Array:
        """(alpha, sigma) of every training timestep in the sampler's coordinates, ``[num_train_timesteps, 2]``."""
        if self.coordinates == "exploding":
            return sg.with_alpha(self.sigma_table, "exploding")
        return np.stack([np.sqrt(self.alpha_bar), np.sqrt(1 - self.alpha_bar)], -1)

    def add_noise(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """``x0 [B, ...]`` noised to training timesteps ``t`` (``[B]`` or a scalar), in the sampler's coordinates.

        Computed in float32, returned in the dtype of ``x0``.
        """
        import jax.numpy as jnp

        alpha, sigma = columns(self._train_level(t), x0)
        return (alpha * x0.astype(jnp.float32) + sigma * noise.astype(jnp.float32)).astype(x0.dtype)

    def velocity(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """What a v-prediction network should return: ``alpha * noise - sigma * x0`` (Salimans and Ho 2022)."""
        import jax.numpy as jnp

        levels = np.stack([np.sqrt(self.alpha_bar), np.sqrt(1 - self.alpha_bar)], -1)
        alpha, sigma = columns(_lookup(levels, t), x0)
        return (alpha * noise.astype(jnp.float32) - sigma * x0.astype(jnp.float32)).astype(x0.dtype)

    def _train_level(self, t: jax.Array) -> jax.Array:
        """(alpha, sigma) at training timesteps, ``[*t.shape, 2]``."""
        return _lookup(self.train_levels(), t)

    # ---- sampling --------------------------------------------------------------------------------------------------

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        """The levels of a run of ``n`` steps, from explicit ``timesteps`` or ``sigmas`` if given."""
        raise TypeError(f"{type(self).__name__} does not sample; use one of {sorted(REGISTRY)}")

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        """One row per model evaluation, beginning with step ``begin`` of the grid."""
        raise TypeError(f"{type(self).__name__} does not sample; use one of {sorted(REGISTRY)}")

    def plan(self, num_inference_steps: int | None = None, **options: Any) -> Plan:
        """The run as a pytree for the device; arguments as for :meth:`table`."""
        from diffuse_jax.schedulers.plan import Plan

        return Plan.from_table(self.table(num_inference_steps, **options))

    def table(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        strength: float | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        **options: Any,
    ) -> Table:
        """The run as a float64 table.

        Args:
          num_inference_steps: number of steps; or else one of
          timesteps: descending training timesteps, one per step;
          sigmas: descending noise levels ``sigma / alpha``, one per step and the final one (samplers based on sigmas).
            Samplers that run from a picture to noise take both ascending.
          strength: in (0, 1], the share of the steps that is run, the last ones (image to image); the first ones of a
            run from a picture to noise.
          denoising_start, denoising_end: in (0, 1), the share of the training schedule to leave to the model before and
            after this one; the sample is handed over with its noise.
          **options: of the scheduler at hand, see ``grid_options`` and ``step_options``.

        Raises:
          ValueError: contradictory or impossible arguments; the message says what is possible.
        """
        n, t, s = self._check_request(num_inference_steps, timesteps, sigmas)
        if strength is not None and not 0 < strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], got {strength}")
        unknown = set(options) - {*self.grid_options, *self.step_options}
        if unknown:
            possible = [*self.grid_options, *self.step_options] or "none"
            raise ValueError(f"{self.class_name} has no option {', '.join(sorted(unknown))}; its options: {possible}")
        grid_options = {k: options[k] for k in self.grid_options if k in options}
        if self.strength_in_grid and strength is not None:
            grid_options["strength"] = strength
        if self.ascends and (denoising_start, denoising_end) != (None, None):
            raise ValueError(
                f"{self.class_name} runs from a picture to noise and has no part to leave to another model; give"
                " strength= to stop early instead of denoising_start= or denoising_end="
            )
        grid = self.grid(n, timesteps=t, sigmas=s, **grid_options)
        parts = (strength, denoising_start, denoising_end) != (None, None, None) and not self.strength_in_grid
        if parts and not self.ascends and np.any(np.diff(grid.timesteps) > 0):
            raise ValueError(
                f"{self.class_name} goes back to more noise between its steps and is run as a whole, without strength=,"
                " denoising_start= and denoising_end="
            )
        begin = 0 if self.ascends else self._begin(n, grid, strength, denoising_start)
        rows = self.evaluations(grid, begin, **{k: options[k] for k in self.step_options if k in options})
        learned = self.learned_variance
        table = Table.build(rows, grid.init_scale, grid.final, **self._correction(), learned_variance=learned)
        if self.ascends and strength is not None:
            return table.cut(steps_to_run(n, strength))
        return table if denoising_end is None else self._stop(table, denoising_end)

    def _check_request(
        self, n: int | None, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None
    ) -> tuple[int, Array | None, Array | None]:
        names = ("num_inference_steps", "timesteps", "sigmas")
        got = [name for name, value in zip(names, (n, timesteps, sigmas), strict=True) if value is not None]
        if len(got) != 1:
            raise ValueError(f"give exactly one of {', '.join(names)}; got {' and '.join(got) or 'none'}")
        if timesteps is not None:
            low, high = self.explicit_range
            array = ns.check_ordered(timesteps, "timesteps", ascending=self.ascends, lower=low, upper=high)
            return len(array), array, None
        if sigmas is not None:
            array = ns.check_ordered(sigmas, "sigmas", ascending=self.ascends)
            if self.final_sigma_given and len(array) < 2:
                raise ValueError(f"sigmas needs one entry per step and the final one, got {len(array)}")
            return len(array) - self.final_sigma_given, None, array
        most = self.num_train_timesteps if self.limits_steps else np.inf
        if not isinstance(n, int | np.integer) or isinstance(n, bool) or not 1 <= n <= most:
            limit = f"from 1 to {most} (num_train_timesteps)" if self.limits_steps else "above 0"
            raise ValueError(f"num_inference_steps must be a whole number {limit}, got {n!r}")
        return int(n), None, None

    def _begin(self, n: int, grid: Grid, strength: float | None, denoising_start: float | None) -> int:
        if denoising_start is None:
            return 0 if self.strength_in_grid or strength is None else n - steps_to_run(n, strength)
        if strength is not None:
            raise ValueError("give strength or denoising_start, not both: each says where to start")
        begin = int(np.sum(grid.timesteps >= self._cutoff("denoising_start", denoising_start)))
        if begin == len(grid.timesteps):
            raise ValueError(f"denoising_start={denoising_start} leaves none of {n} steps; use a smaller value")
        return begin

    @property
    def timestep_range(self) -> tuple[float, float]:
        """Lowest and highest timestep that the network may be told."""
        return 0.0, self.num_train_timesteps - 1.0

    @property
    def explicit_range(self) -> tuple[float, float]:
        """Lowest and highest of the ``timesteps`` that :meth:`plan` takes."""
        return self.timestep_range

    def _correction(self) -> dict[str, Any]:
        if getattr(self, "thresholding", False):
            return {"threshold": (self.dynamic_thresholding_ratio, self.sample_max_value)}  # type: ignore[attr-defined]
        return {"clip": self.clip_sample_range} if getattr(self, "clip_sample", False) else {}  # type: ignore[attr-defined]

    @property
    def learned_variance(self) -> str:
        """What the second half of the network's output says: "" (ignored), "learned" or "learned_range"."""
        return ""

    @property
    def corrects_x0(self) -> bool:
        """Whether predicted clean samples are clipped or thresholded."""
        return bool(self._correction())

    def evaluation(self, timestep: float, level: Level) -> Evaluation:
        """The unit vectors of one evaluation under this configuration."""
        return Evaluation(
            timestep,
            level,
            self.prediction_type,
            corrected=self.corrects_x0,
            sigma_data=self.sigma_data,
            input_scale=1.0 if self.coordinates == "flow" else None,
        )

    def _cutoff(self, name: str, share: float) -> float:
        if not 0 < share < 1:
            raise ValueError(f"{name} must lie strictly between 0 and 1, got {share}")
        low, high = self.timestep_range
        if (low, high) == (0, self.num_train_timesteps - 1):
            return round(self.num_train_timesteps - share * self.num_train_timesteps)
        return high - share * (high - low)

    def _stop(self, table: Table, share: float) -> Table:
        keep = int(np.sum(table.timesteps >= self._cutoff("denoising_end", share)))
        if keep == 0:
            raise ValueError(
                f"denoising_end={share} leaves no step: the first timestep is {table.timesteps[0]:g};"
                " use a larger value"
            )
        return table.cut(keep)


_COMMON_CHOICES: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ns.BETA_SCHEDULES,
    "prediction_type": ns.PREDICTION_TYPES,
    "timestep_spacing": ns.TIMESTEP_SPACINGS,
}


@lru_cache(maxsize=64)
def _alpha_bar(
    schedule: str, start: float, end: float, steps: int, trained: tuple[float, ...] | None, zero_snr: bool
) -> Array:
    betas = ns.beta_table(schedule, start, end, steps) if trained is None else np.asarray(trained, np.float64)
    if not np.all((betas >= 0) & (betas <= 1)):
        given = f"beta_start={start} and beta_end={end}" if trained is None else "trained_betas"
        low, high = betas.min(), betas.max()
        raise ValueError(f"betas must lie between 0 and 1; those of {given} run from {low:g} to {high:g}")
    alpha_bar = np.asarray(np.cumprod(1 - betas), np.float64)
    alpha_bar = ns.rescale_zero_terminal_snr(alpha_bar) if zero_snr else alpha_bar
    alpha_bar.setflags(write=False)
    return alpha_bar


def _lookup(levels: Array, t: Any) -> jax.Array:
    import jax.numpy as jnp

    return jnp.asarray(levels, jnp.float32)[jnp.asarray(t).astype(jnp.int32)]


def columns(levels: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """alpha and sigma of ``levels [..., 2]`` as factors of ``like``."""
    shape = levels.shape[:-1] + (1,) * (like.ndim + 1 - levels.ndim)
    return levels[..., 0].reshape(shape), levels[..., 1].reshape(shape)


def steps_to_run(n: int, strength: float) -> int:
    """How many of ``n`` steps ``strength`` leaves; an error if none."""
    run = min(int(n * strength), n)
    if run < 1:
        raise ValueError(
            f"strength={strength} of {n} steps leaves none to run; use a strength of at least {1 / n:g} or more steps"
        )
    return run


def _class_named(name: str) -> type[Scheduler]:
    if name not in REGISTRY:
        raise ValueError(
            f"unknown scheduler class {name or '(no _class_name)'!r}; known: {', '.join(sorted(REGISTRY))}"
        )
    return REGISTRY[name]


def scheduler_class(name: str) -> type[Scheduler]:
    return _class_named(name)


def _field_names(cls: type[Scheduler]) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.name not in ("extra", "given", *cls.absent)]


def _freeze(value: Mapping[str, Any]) -> Any:
    from diffuse_jax.config import freeze

    return freeze(value)


def _defaults(target: type[Scheduler]) -> dict[str, list[Any]]:
    """Setting -> its defaults in the classes that have it; of what ``target`` has fixed, only how."""
    found: dict[str, list[Any]] = {}
    for cls in REGISTRY.values():
        names = _field_names(cls)
        for field in dataclasses.fields(cls):
            if field.name in names:
                found.setdefault(field.name, []).append(field.default)
    return found | {f.name: [f.default] for f in dataclasses.fields(target) if f.name in target.absent}
