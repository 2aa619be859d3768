"""A parser with groups, configuration files, and flags of other libraries that are ignored with a note, or refused.

Only the scripts deal with flags: :func:`settings_from` turns them into the settings that all other code takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from diffuse_jax.bounds import Number, number
from diffuse_jax.training.checks import numbers_of, paths_of
from diffuse_jax.training.configuration import arguments_of, names_of, nearest, read_config
from diffuse_jax.writing import path_text

Settings = TypeVar("Settings")


def settings_from(args: argparse.Namespace, kind: type[Settings]) -> Settings:
    """Build settings in which each field has the value of the flag of the same name.

    Args:
      args: parsed flags.
      kind: a dataclass. Nested settings are built in the same way; fields without a flag in the script keep their
        defaults.

    Raises:
      ValueError: a value is invalid.
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


FIRST = (
    "pretrained_model_name_or_path",
    "instance_data_dir",
    "instance_prompt",
    "train_data_dir",
    "dataset_name",
    "placeholder_token",
    "initializer_token",
    "output_dir",
    "max_train_steps",
    "resolution",
    "train_batch_size",
    "learning_rate",
    "mixed_precision",
    "validation_prompt",
)
"""The flags that the help lists first, if the script has them."""


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults where there are any, and keeps the line breaks of the description."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required:
            return f"{action.help} (required)"
        nothing = action.default is None or action.default is False or action.default == ""
        return action.help if nothing else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "TEXT"


class Refused(argparse.Action):
    """A flag that other scripts or libraries have: an error that says what to do instead, with a value or without."""

    def __init__(self, option_strings: list[str], dest: str, advice: str, default: object = argparse.SUPPRESS) -> None:
        super().__init__(option_strings, dest, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.advice = advice

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error(f"{self.option_strings[0]}: {self.advice}")


class Accepted(argparse.Action):
    """A flag of other libraries that has no effect here: prints a line that says why."""

    def __init__(self, option_strings: list[str], dest: str, note: str, nargs: int | str = 0) -> None:
        super().__init__(option_strings, dest, nargs=nargs, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.note = note

    def __call__(self, *_: Any) -> None:
        print(f"note: {self.option_strings[0]} has no effect: {self.note}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """A parser that takes values from the command line, then from ``--config FILE``, then from the defaults.

    ``--no-NAME`` turns off a switch that the file sets, or that is on by default. Flags cannot be abbreviated, and an
    unknown flag is an error that suggests the closest one.
    """

    def __init__(self, **options: Any) -> None:
        usage = "%(prog)s [--config FILE] [--NAME [VALUE] ...]"
        super().__init__(usage=usage, formatter_class=Help, allow_abbrev=False, **options)
        self._titles: dict[str, argparse._ArgumentGroup] = {}

    def group(self, title: str, *settings: type) -> Callable[..., argparse.Action]:
        """``add_argument`` of the group with this title; the group is created at the first call.

        Args:
          title: title of the group in the help.
          *settings: dataclasses; a flag with the name of one of their fields has that field's default, and its range or
            that it is a path, unless others are given. ``type`` may be a :class:`~diffuse_jax.bounds.Number`.
        """
        if title not in self._titles:
            self._titles[title] = self.add_argument_group(title)
        fields = [field for kind in settings for field in dataclasses.fields(kind)]
        defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
        types: dict[str, Any] = dict.fromkeys((name for kind in settings for name in paths_of(kind)), path_text)
        types |= {name: found for kind in settings for name, found in numbers_of(kind).items()}

        def add(*names: str, **options: Any) -> argparse.Action:
            name = names[0].removeprefix("--")
            if name in defaults:
                options.setdefault("default", defaults[name])
            if name in types:
                options.setdefault("type", types[name])
            if isinstance(kind := options.get("type"), Number):
                options |= {"type": number(kind), "metavar": "N" if kind.kind is int else "X"}
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
        off = {a.dest: False for a in self._actions if a.default is True and negated & {*names_of(a)}}
        found, unknown = self.parse_known_args(line, argparse.Namespace(**off) if namespace is None else namespace)
        if unknown:
            offered = [action for action in self._actions if not isinstance(action, Refused)]
            known = [f"--{name}" for action in offered for name in names_of(action)]
            flag = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{nearest(flag, known)}")
        return found

    def drop(self, name: str) -> None:
        """Remove a flag, for a script that gives it another meaning."""
        self._handle_conflict_resolve(self._option_string_actions[name], [(name, self._option_string_actions[name])])

    def refuse(self, flags: Mapping[str, str]) -> None:
        """Add flags that are refused: name -> what to do instead. Those that the script has are left alone."""
        for name, advice in flags.items():
            if f"--{name}" not in self._option_string_actions:
                self.add_argument(f"--{name}", action=Refused, advice=advice)

    def accept(self, flags: Mapping[str, tuple[int | str, str]]) -> None:
        """Add flags that have no effect: name -> the number of values as for ``nargs``, and why."""
        for name, (values, note) in flags.items():
            self.add_argument(f"--{name}", action=Accepted, nargs=values, note=note)

    def hide(self, names: Iterable[str]) -> None:
        """Leave flags out of the help, namely those that the script refuses with an explanation."""
        hidden = {*names}
        for action in self._actions:
            if action.dest in hidden:
                action.help = argparse.SUPPRESS

    def format_help(self) -> str:
        """The help text: first the flags that a first run needs, then the others in their groups."""
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        known = {action.dest: action for action in shown}
        first = [known[name] for name in FIRST if name in known]
        first += [action for action in shown if action.required and action not in first]
        options, *groups = [group for group in self._action_groups if group is not self._positionals]
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        sections = [("most used", first), *((g.title, g._group_actions) for g in (*groups, options))]
        for place, (title, actions) in enumerate(sections):
            formatter.start_section(title)
            formatter.add_arguments([action for action in actions if place == 0 or action not in first])
            formatter.end_section()
        return formatter.format_help()

    def _both_ways(self) -> set[str]:
        """Switches that already have a ``--no-NAME``."""
        return {
            name
            for action in self._actions
            if isinstance(action, argparse.BooleanOptionalAction)
            for name in names_of(action)
        }

    def _config_path(self, line: list[str]) -> str | None:
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        finder.add_argument("--config", type=path_text)
        try:
            return finder.parse_known_args(line)[0].config
        except argparse.ArgumentError as error:
            self.error(str(error))

    def error(self, message: str) -> NoReturn:
        """Exit with a message of one line; the usage of a hundred flags would bury it."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n{self.prog} --help lists the flags\n")
