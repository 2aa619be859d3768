"""Flags in files: ``--config FILE`` reads them, and ``OUTPUT/training.yaml`` records those of a run."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffuse_jax.limits import parse_json, read_bounded

CONFIG_FILE = "training.yaml"
MAX_CONFIG = 1 << 16
"""Maximum size of a configuration file, in bytes."""

MAX_NESTING = 16
"""Maximum nesting depth of lists and mappings; flags need two."""

SECRETS = ("hub_token",)
OWN = ("config", "process_id", "debug")


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a mapping of flag names (without dashes) to values from a YAML or JSON file.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file has more than :data:`MAX_CONFIG` bytes, uses YAML aliases, or is not a mapping of names to
        values.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config {path} does not exist")
    text = read_bounded(Path(path), MAX_CONFIG)
    values = parse_json(Path(path), text) if Path(path).suffix == ".json" else _parse_yaml(path, text)
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path} must map names of flags to values, such as `learning_rate: 1e-4`")
    return values


def _parse_yaml(path: str | Path, text: bytes) -> Any:
    """The value of a YAML text; aliases are refused, since a few lines of them expand to billions of values."""
    import yaml

    try:
        depth = 0
        for token in yaml.scan(text):
            kind = type(token).__name__
            depth += kind.endswith(("SequenceStartToken", "MappingStartToken"))
            depth -= kind.endswith("EndToken") and not kind.startswith(("Stream", "Document"))
            if kind == "AliasToken":
                raise ValueError("it uses aliases (*name), which are not read; write the values out")
            if depth > MAX_NESTING:
                raise ValueError(f"its values are nested more than {MAX_NESTING} deep")
        return yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def arguments_of(values: dict[str, Any], parser: argparse.ArgumentParser, negated: Iterable[str]) -> list[str]:
    """The equivalent command line; flags whose value is ``None`` or ``false`` are omitted.

    Args:
      values: the result of :func:`read_config`.
      parser: the parser that defines the flags.
      negated: switches that stay off whatever the file says.

    Raises:
      ValueError: a name is not a flag (the message suggests the closest one), a switch is not true or false, or a flag
        has more values than it takes.
    """
    actions = {name: action for action in parser._actions for name in names_of(action)}
    line: list[str] = []
    for name, value in values.items():
        if name in OWN:
            raise ValueError(f"{name} cannot be set in a file; use --{name} on the command line")
        if name not in actions:
            raise ValueError(f"{name} is not a flag{nearest(name, actions)}")
        switch = actions[name].nargs == 0
        if isinstance(value, dict) or (isinstance(value, list) and actions[name].nargs not in ("+", "*")):
            many = "a list of values" if actions[name].nargs in ("+", "*") else "one value"
            raise ValueError(f"{name} takes {many}, got {value!r}")
        if switch and not isinstance(value, bool | None):
            raise ValueError(f"{name} must be true or false, got {value!r}")
        both_ways = isinstance(actions[name], argparse.BooleanOptionalAction)
        if value is None or name in negated or (value is False and not both_ways):
            continue
        if switch:
            line.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            line += [f"--{name}", *map(str, value)]
        else:
            line.append(f"--{name}={value}")
    return line


def names_of(action: argparse.Action) -> list[str]:
    """The names of a flag as they are written in a file."""
    return [option[2:] for option in action.option_strings if option.startswith("--") and option != "--help"]


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` if a known name is similar; otherwise empty."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def values_of(settings: Any) -> dict[str, Any]:
    """The values of a settings object by flag name: nested settings are flattened, and None is left out.

    Args:
      settings: a dataclass, such as :class:`~diffuse_jax.training.settings.RunSettings`.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            values |= values_of(value)
        elif value is not None:
            values[field.name] = value
    return values


def write_config(output: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Write the flags of a run to ``OUTPUT/training.yaml``, without secrets.

    Args:
      output: the folder of the run.
      values: values by flag name, so that the file can be passed to ``--config``.

    Returns:
      What was written.
    """
    import yaml

    kept = {name: _plain(value) for name, value in sorted(values.items()) if name not in (*OWN, *SECRETS)}
    output.mkdir(parents=True, exist_ok=True)
    new = output / f".{CONFIG_FILE}.new"
    new.write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
    new.replace(output / CONFIG_FILE)
    return kept


def _plain(value: Any) -> Any:
    """A value as a type that YAML can represent."""
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, int | float | str | bool | list | None) else str(value)
