"""What the settings of a training check about themselves."""

from __future__ import annotations

from collections.abc import Iterable


def at_least(least: float, **values: float | None) -> None:
    """Refuse values below ``least``; None, which stands for no limit or no wish, passes.

    Raises:
      ValueError: naming the first such setting.
    """
    for name, value in values.items():
        if value is not None and not value >= least:  # so that NaN is refused
            raise ValueError(f"{name} must be at least {least}, got {value}")


def one_of(choices: Iterable[str], **values: str | None) -> None:
    """Refuse values that are not among the choices; None, where a setting has no value, passes.

    Raises:
      ValueError: naming the first such setting, and the choices.
    """
    known = list(choices)
    for name, value in values.items():
        if value is not None and value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
