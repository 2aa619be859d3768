"""Flags in files: ``--config FILE`` reads them, ``OUTPUT/training.yaml`` keeps those of a run."""

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
"""Bytes of a file of flags."""

MAX_NESTING = 16
"""Lists and mappings inside each other; flags need two."""

SECRETS = ("hub_token",)
OWN = ("config", "process_id", "debug")


def read_config(path: str | Path) -> dict[str, Any]:
    """Flag names (without dashes) -> values, from YAML or JSON.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it has more than :data:`MAX_CONFIG` bytes, uses YAML's aliases, or does not hold one mapping of names
        to values.
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
    """The value of a YAML text without aliases, a few lines of which stand for billions of values."""
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
    """The command line that says the same; ``None`` and ``false`` mean that a flag is left out.

    Args:
      values: of :func:`read_config`.
      parser: knows the flags.
      negated: switches that stay off whatever the file says.

    Raises:
      ValueError: a name is not a flag (the text has the nearest one), or a switch is not true or false.
    """
    actions = {name: action for action in parser._actions for name in names_of(action)}
    line: list[str] = []
    for name, value in values.items():
        if name in OWN:
            raise ValueError(f"{name} cannot stand in a file; say --{name} on the command line")
        if name not in actions:
            raise ValueError(f"{name} is not a flag{nearest(name, actions)}")
        switch = actions[name].nargs == 0
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
    """Of a flag, as a file spells them."""
    return [option[2:] for option in action.option_strings if option.startswith("--") and option != "--help"]


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` if something known looks alike."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def values_of(settings: Any) -> dict[str, Any]:
    """What a settings object says, by the names of flags: settings within it are spread out, None is left out.

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
    """Write what a run is to ``OUTPUT/training.yaml``, without secrets; returns what was written.

    Args:
      output: the folder of the run.
      values: by the names of flags, so that the file can be given to ``--config``.
    """
    import yaml

    kept = {name: _plain(value) for name, value in sorted(values.items()) if name not in (*OWN, *SECRETS)}
    output.mkdir(parents=True, exist_ok=True)
    new = output / f".{CONFIG_FILE}.new"
    new.write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
    new.replace(output / CONFIG_FILE)
    return kept


def _plain(value: Any) -> Any:
    """A value as YAML can hold it."""
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, int | float | str | bool | list | None) else str(value)
