"""Commands of README and the documentation name scripts, commands and flags that exist."""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from diffuse_jax import cli
from diffuse_jax.training.flags import Parser
from tests.test_docs import PAGES, ROOT
from tests.train.helpers import load as load_trainer
from tpu import cli as tpu

FENCE = re.compile(r"^```(?:console|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Stop(Exception):
    """A parser, where a script wanted to use it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every ``diffuse-jax ...``, ``python script.py ...`` and ``python -m module ...`` of a page, also of
    those that ``python -m tpu`` starts."""
    for block in FENCE.finditer(page.read_text(encoding="utf-8")):
        text = re.sub(r"\\\n\s*", " ", block[1])
        text = re.sub(r"^\$ ", "", re.sub(r"(^|\s)#\s.*$", "", text, flags=re.MULTILINE), flags=re.MULTILINE)
        yield from in_shell(re.sub(r"\$\w+", "1", text))


def in_shell(text: str) -> Iterator[list[str]]:
    """Such commands in lines of a shell, also in a quoted ``--command="cd somewhere && python script.py"``."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";|&\n")
    lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t", "", True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) - set(";|&\n"):
            words.append(word)
            continue
        for quoted in (w.partition("=")[2] for w in words if w.startswith("--command=")):
            yield from in_shell(quoted)
        command = list(itertools.dropwhile(lambda w: w not in ("diffuse-jax", "python"), words))  # do, while, srun ...
        words = []
        if command[:3] == ["python", "-m", "tpu"] and "--" in command:
            yield from in_shell(shlex.join(command[command.index("--") + 1 :]))
        if command[:1] == ["diffuse-jax"] or (command[:1] == ["python"] and re.search(r"^-m$|\.py$", command[1])):
            yield command


FOUND = [(page.name, words) for page in PAGES for words in commands(page)]


def parser_of(path: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser that a script makes; it is stopped before it does anything else."""

    def stop(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        raise Stop(self)

    for kind in (argparse.ArgumentParser, Parser):
        monkeypatch.setattr(kind, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [path])
    monkeypatch.syspath_prepend(str((ROOT / path).parent))
    is_module = path.startswith("benchmarks/")
    script = importlib.import_module(path[:-3].replace("/", ".")) if is_module else load_trainer(f"../{path}")
    with pytest.raises(Stop) as stopped:
        script.main()
    return stopped.value.parser


def check(parser: argparse.ArgumentParser, words: Iterable[str]) -> None:
    """Parse as the script would; flags that are required may stand in the file of ``--config``."""
    words = list(words)
    if "--config" in words:
        for action in parser._actions:
            action.required = False
    found, unknown = parser.parse_known_args(words)
    assert not unknown, f"unknown: {unknown}"


@pytest.mark.parametrize(("page", "words"), FOUND, ids=[f"{page}-{' '.join(words[:3])}" for page, words in FOUND])
def test_the_command_exists(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "diffuse-jax":
        return check(cli.build_parser(), words[1:])
    if words[:3] == ["python", "-m", "tpu"]:
        return check(tpu.build_parser(), itertools.takewhile(lambda word: word != "--", words[3:]))
    path = words[1] if words[1] != "-m" else words[2].replace(".", "/") + ".py"
    rest = words[2:] if words[1] != "-m" else words[3:]
    if words[1] == "-m" and not path.startswith("benchmarks/"):
        return None  # another program, such as sphinx
    assert (ROOT / path).is_file(), f"{page}: no {path}"
    check(parser_of(path, monkeypatch), rest)


def test_commands_are_found() -> None:
    scripts = {words[1] for _, words in FOUND if words[0] == "python"}
    assert {f"train/{path.name}" for path in (ROOT / "train").glob("*.py")} <= scripts
    assert {words[1] for _, words in FOUND if words[0] == "diffuse-jax"} >= {"generate", "convert", "env"}
