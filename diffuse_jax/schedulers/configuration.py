"""The configuration of a scheduler: its settings, their JSON, and one scheduler's settings taken over by another."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from diffuse_jax.allowed import Index, Length, Signed
from diffuse_jax.config import Config, freeze
from diffuse_jax.habits import refuse_habits
from diffuse_jax.limits import refuse_links
from diffuse_jax.registry import Registry
from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers import settings as st
from diffuse_jax.writing import expanded

logger = logging.getLogger(__name__)

CONFIG_NAME = "scheduler_config.json"
SCHEDULERS = Registry("scheduler")
"""Every scheduler class by the name that a ``scheduler_config.json`` has for it."""

HUB_OPTIONS = {"revision", "token", "cache_dir", "local_files_only"}

COMMON_CHOICES: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ns.BETA_SCHEDULES,
    "prediction_type": ns.PREDICTION_TYPES,
    "timestep_spacing": ns.TIMESTEP_SPACINGS,
}
"""Allowed values of the settings that all schedulers have, unless a class allows others."""


class Settings:
    """The signature of a scheduler's class: its settings and their defaults, which ``__new__`` alone would hide."""

    def __get__(self, instance: SchedulerConfig | None, owner: type[SchedulerConfig]) -> inspect.Signature:
        parameters = inspect.signature(owner.__init__).parameters
        return inspect.Signature([p for name, p in parameters.items() if name in (*setting_names(owner), "extra")])


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig(Config):
    """The settings of a scheduler; its fields are the keys that every ``scheduler_config.json`` has.

    ``from_config`` and ``from_pretrained`` of an abstract class, such as ``Scheduler``, pick the class that the JSON
    names; those of any other build that class from the configuration of any scheduler.

    Attributes:
      num_train_timesteps: steps of the training schedule.
      beta_start, beta_end, beta_schedule: the training schedule; ``trained_betas`` gives it outright.
      prediction_type: what the network returns: ``epsilon``, ``v_prediction`` or ``sample``.
      timestep_spacing: ``leading``, ``linspace`` or ``trailing``; ``steps_offset`` is added to leading timesteps.
      given: names of fields that were set on purpose, which a scheduler built from this one inherits.
    """

    num_train_timesteps: int = 1000
    beta_start: Signed = 0.0001
    beta_end: Signed = 0.02
    beta_schedule: str = "linear"
    trained_betas: Annotated[tuple[Signed, ...], Length(65_536)] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: Index = 0
    given: tuple[str, ...] = dataclasses.field(init=False, compare=False, repr=False)

    __signature__ = Settings()
    abstract: ClassVar[bool] = True
    """Whether the class is not a sampler itself and not in the registry; declared with ``abstract=True``."""
    absent: ClassVar[tuple[str, ...]] = ()
    """Common settings that this scheduler does not have: its algorithm fixes them. Not read, not written."""
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Allowed values of fields beyond the common ones."""
    renamed: ClassVar[dict[str, str]] = {}
    """Older names of settings."""
    aliases: ClassVar[dict[str, dict[str, str]]] = {}
    """Values of other schedulers (or older spellings) and what they mean here."""

    def __init_subclass__(cls, *, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.class_name = cls.__name__
        cls.abstract = abstract
        if not abstract:
            SCHEDULERS.register(cls)

    def __new__(cls, **fields: Any) -> Self:
        # Only the call can tell a default from the same value passed on purpose.
        self = super().__new__(cls)
        object.__setattr__(self, "given", tuple(sorted({*fields} - {"extra"})))
        return self

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self):
            if field.name in self.absent and getattr(self, field.name) != field.default:
                has = ", ".join(setting_names(type(self)))
                raise ValueError(f"{self.class_name} has no setting {field.name}; it has {has}")
        aliases = {"prediction_type": {"original_sample": "sample"}} | self.aliases
        for name, table in aliases.items():
            object.__setattr__(self, name, table.get(getattr(self, name), getattr(self, name)))
        for name, allowed in (COMMON_CHOICES | self.choices).items():
            if getattr(self, name) not in allowed:
                given = getattr(self, name)
                raise ValueError(f"{self.class_name}: {name} must be one of {list(allowed)}, got {given!r}")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(
                f"{self.class_name}: trained_betas has {len(self.trained_betas)} entries but num_train_timesteps is"
                f" {self.num_train_timesteps}; they must agree"
            )

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
        names = setting_names(cls)
        fields = {k: v for k, v in data.items() if k in names}
        missing = [f.name for f in dataclasses.fields(cls) if f.init and f.default is dataclasses.MISSING]
        if not {*missing} <= {*fields}:
            raise ValueError(f"{cls.class_name} needs the setting {', '.join({*missing} - {*fields})}")
        extra = {k: v for k, v in data.items() if k not in names and k not in ("_class_name", "given")}
        try:
            return cls(**fields, extra=freeze(extra))
        except TypeError as error:
            raise ValueError(f"{cls.class_name}: a setting has the wrong type: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """All settings, the preserved unknown ones and ``_class_name``, as PyTorch diffusers reads them."""
        left_out = {"given", *self.absent} - set(dict(self.extra))
        return {k: v for k, v in super().to_json().items() if k not in left_out}

    def settings(self) -> dict[str, Any]:
        """What another scheduler inherits: the settings given on purpose, not the defaults of this class."""
        names = setting_names(type(self))
        return {k: v for k, v in self.to_json().items() if k not in names or k in self.given}

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed; the changed ones count as given on purpose."""
        new = dataclasses.replace(self, **changes)
        object.__setattr__(new, "given", tuple(sorted({*self.given, *changes} - {"extra"})))
        return new

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | SchedulerConfig, **changes: Any) -> Self:
        """Build from a dict or from another scheduler, keeping every setting that both understand.

        Settings that only the other one has are kept in ``extra`` (see :attr:`ignored`). Those that make a difference
        are reported on the log: a clipping that this one does not do, but not the order of the other one's method.

        Raises:
          ValueError: a setting is not allowed here, or (on an abstract class) the class that the configuration names is
            unknown, ambiguous or no subclass; see :func:`diffuse_jax.schedulers.scheduler_class`.
        """
        data = config.settings() if isinstance(config, SchedulerConfig) else dict(config)
        source = str(data.get("_class_name", "")).removeprefix("Flax")
        target = cls._named(source) if cls.abstract else cls
        scheduler = target.from_json(data | changes)
        unknown = sorted(set(changes) & set(scheduler.ignored))
        if unknown:
            has = ", ".join(setting_names(target))
            raise ValueError(f"{target.class_name} has no setting {', '.join(unknown)}; it has {has}")
        lost = st.worth_telling(scheduler.ignored, scheduler.to_json(), _defaults(target))
        if lost:
            logger.warning("%s built from %s ignores: %s", target.class_name, source or "a dict", lost)
        return scheduler

    @classmethod
    def _named(cls, name: str) -> type[Self]:
        """The class of this name, which must be of this kind."""
        found = SCHEDULERS.find(name)
        if not issubclass(found, cls):
            raise ValueError(f"{name} is not a {cls.__name__}; use {name}.from_config or Scheduler.from_config")
        return found

    @classmethod
    def from_pretrained(cls, source: str | Path, *, subfolder: str | None = None, **resolve_options: Any) -> Self:
        """Read ``scheduler_config.json`` from a folder (``source/subfolder``) or from a Hub repository.

        Args:
          source: a local folder, or a Hub id.
          subfolder: ``"scheduler"`` in a pipeline's folder.
          **resolve_options: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` for the Hub.

        Raises:
          TypeError: an unknown option.
          FileNotFoundError: there is no such file.
          ValueError: the file is not a JSON object or holds a value that is not allowed; the file is named.
        """
        refuse_habits(resolve_options)
        if unknown := sorted(resolve_options.keys() - HUB_OPTIONS):
            known = ", ".join(sorted(HUB_OPTIONS))
            raise TypeError(f"{cls.__name__}.from_pretrained has no argument {', '.join(unknown)}; it has {known}")
        from diffuse_jax.weights.files import read_json  # imports JAX

        if expanded(source).is_dir():
            folder = expanded(source) / (subfolder or "")
        else:
            from diffuse_jax.weights import resolve  # imports JAX

            folder = resolve(source, subfolder=subfolder, **resolve_options)
        path = folder / CONFIG_NAME
        if not path.exists():
            raise FileNotFoundError(f"no {CONFIG_NAME} in {folder}")
        data = read_json(refuse_links(folder) / CONFIG_NAME)
        try:
            return cls.from_config(data)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``folder/scheduler_config.json`` (whole or not at all) and return its path."""
        from diffuse_jax.weights.files import write_json  # imports JAX

        path = expanded(folder) / CONFIG_NAME
        write_json(path, self.to_json())
        return path


def setting_names(cls: type[SchedulerConfig]) -> list[str]:
    """The settings that a class has, those of all schedulers first."""
    return [f.name for f in dataclasses.fields(cls) if f.name not in ("extra", "given", *cls.absent)]


def _defaults(target: type[SchedulerConfig]) -> dict[str, list[Any]]:
    """Setting -> its defaults in the classes that have it; of what ``target`` has fixed, only how."""
    found: dict[str, list[Any]] = {}
    for cls in SCHEDULERS.classes():
        names = setting_names(cls)
        for field in dataclasses.fields(cls):
            if field.name in names:
                found.setdefault(field.name, []).append(field.default)
    return found | {f.name: [f.default] for f in dataclasses.fields(target) if f.name in target.absent}


def scheduler_class(name: str) -> type[Any]:
    """The scheduler class of this name, the package's or one that was defined elsewhere.

    Raises:
      ValueError: no module that has been imported defines the name, or two do.
    """
    return SCHEDULERS.find(name)
