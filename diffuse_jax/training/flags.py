"""A parser with groups, configuration files, and flags of other libraries that are only noted or refused.

Flags end here: :func:`settings_from` makes settings of them, which is what everything below the scripts takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from diffuse_jax.training.configuration import arguments_of, names_of, nearest, read_config

Settings = TypeVar("Settings")


def settings_from(args: argparse.Namespace, kind: type[Settings]) -> Settings:
    """Settings of some kind, each field with the value of the flag of its name.

    Args:
      args: parsed flags.
      kind: a dataclass. Fields that hold settings are filled in the same way; those whose flag the script does not have
        keep their defaults.

    Raises:
      ValueError: the settings refuse a value.
    """
    return _filled(kind, vars(args))


def _filled(kind: Any, values: Mapping[str, Any]) -> Any:
    types, found = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(types[field.name]):
            found[field.name] = _filled(types[field.name], values)
        elif field.name in values:
            value = values[field.name]
            found[field.name] = tuple(value) if isinstance(value, list) else value  # settings are hashable
    return kind(**found)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown where there are any, and the description keeps its lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False or action.default == ""
        return action.help if nothing else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X"}.get(action.type, "TEXT")  # type: ignore[call-overload]


class Refused(argparse.Action):
    """A flag of other libraries that has no meaning here: an error that says what to do instead."""

    def __init__(self, option_strings: list[str], dest: str, advice: str, default: object = argparse.SUPPRESS) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.advice = advice

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error(f"{self.option_strings[0]}: {self.advice}")


class Accepted(argparse.Action):
    """A flag of other libraries that changes nothing here: a line that says why."""

    def __init__(self, option_strings: list[str], dest: str, note: str, nargs: int | None = 0) -> None:
        super().__init__(option_strings, dest, nargs=nargs, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.note = note

    def __call__(self, *_: Any) -> None:
        print(f"note: {self.option_strings[0]} has no effect: {self.note}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """``parse_args`` takes values from the command line first, then from ``--config FILE``, then the defaults.

    A switch of the file is turned off with ``--no-NAME``. Flags are never abbreviated, and one that is not known is an
    error that names the nearest.
    """

    def __init__(self, **options: Any) -> None:
        usage = "%(prog)s [--config FILE] [--NAME [VALUE] ...]"
        super().__init__(usage=usage, formatter_class=Help, allow_abbrev=False, **options)
        self._titles: dict[str, argparse._ArgumentGroup] = {}

    def group(self, title: str, *settings: type) -> Callable[..., argparse.Action]:
        """``add_argument`` of the group with this title, which is made when it is first asked for.

        Args:
          title: what the help calls the group.
          *settings: dataclasses; a flag with the name of one of their fields has that field's default, unless it is
            given another.
        """
        if title not in self._titles:
            self._titles[title] = self.add_argument_group(title)
        fields = [field for kind in settings for field in dataclasses.fields(kind)]
        defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}

        def add(*names: str, **options: Any) -> argparse.Action:
            name = names[0].removeprefix("--")
            if name in defaults:
                options.setdefault("default", defaults[name])
            return self._titles[title].add_argument(*names, **options)

        return add

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        line = list(sys.argv[1:] if args is None else args)
        switches = {name for action in self._actions if action.nargs == 0 for name in names_of(action)}
        negated = {word[5:] for word in line if word.startswith("--no-") and word[5:] in switches - self._both_ways()}
        line = [word for word in line if word[5:] not in negated or not word.startswith("--no-")]
        path = self._config_path(line)
        if path is not None:
            try:
                line = arguments_of(read_config(path), self, negated) + line
            except (ValueError, FileNotFoundError) as error:
                self.error(str(error))
        found, unknown = self.parse_known_args(line, namespace)
        if unknown:
            known = [f"--{name}" for action in self._actions for name in names_of(action)]
            flag = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{nearest(flag, known)}")
        return found

    def _both_ways(self) -> set[str]:
        """Switches that have a ``--no-NAME`` of their own."""
        return {
            name
            for action in self._actions
            if isinstance(action, argparse.BooleanOptionalAction)
            for name in names_of(action)
        }

    def _config_path(self, line: list[str]) -> str | None:
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        finder.add_argument("--config")
        try:
            return finder.parse_known_args(line)[0].config
        except argparse.ArgumentError as error:
            self.error(str(error))

    def error(self, message: str) -> NoReturn:
        """One line of usage is enough where there are a hundred flags."""
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists the flags\n")
