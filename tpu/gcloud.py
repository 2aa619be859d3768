"""Running ``gcloud``, or printing what would run."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PROGRAM = "python -m tpu"
INSTALL = "https://cloud.google.com/sdk/docs/install"
HINTS = (
    ("gcloud auth login", "gcloud is not logged in; run: gcloud auth login"),
    ("Reauthentication", "gcloud's login has expired; run: gcloud auth login"),
    ("attribute [project]", "no project: give --project, or run: gcloud config set project PROJECT"),
    ("property [project]", "no project: give --project, or run: gcloud config set project PROJECT"),
    ("attribute [zone]", "no zone: give --zone, or run: gcloud config set compute/zone ZONE"),
    ("property [zone]", "no zone: give --zone, or run: gcloud config set compute/zone ZONE"),
)
"""What in gcloud's messages means that it is not set up, and the line for the user."""


class Failed(Exception):
    """A command cannot go on; the message is for the user, ``status`` the exit status of the process."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def say(message: str) -> None:
    """Print a message to the user on stderr."""
    print(message, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Gcloud:
    """How to call gcloud.

    Attributes:
      zone: the zone of the TPU; None for that of gcloud's own configuration.
      project: the project; None for that of gcloud's own configuration.
      dry_run: print the commands, and run nothing at all.
    """

    zone: str | None = None
    project: str | None = None
    dry_run: bool = False

    def command(self, *words: str) -> list[str]:
        """A command of ``gcloud compute tpus``, for this zone and project."""
        place = [f"--{name}={value}" for name in ("zone", "project") if (value := getattr(self, name))]
        return ["gcloud", "compute", "tpus", *words, *place]

    def run(self, command: Sequence[str], *, interactive: bool = False) -> None:
        """Run a command with its output on the terminal.

        Raises:
          Failed: it failed; its own message has been shown, and its exit status is passed on.
        """
        if self.dry_run:
            return print(shlex.join(command), flush=True)
        source = None if interactive else subprocess.DEVNULL
        status = subprocess.run(command, env=environment(interactive), stdin=source).returncode
        if status:
            raise Failed(f"{_short(command)} failed with exit status {status}", status)

    def read(self, command: Sequence[str]) -> str | None:
        """The output of a command; None if what it asks for does not exist, and in a dry run.

        Raises:
          Failed: it failed otherwise; the message has gcloud's own, the exit status is passed on.
        """
        if self.dry_run:
            print(shlex.join(command), flush=True)
            return None
        done = subprocess.run(command, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout
        if "NOT_FOUND" in done.stderr:
            return None
        for pattern, hint in HINTS:
            if pattern in done.stderr:
                raise Failed(hint, done.returncode)
        message = f"{_short(command)} failed with exit status {done.returncode}"
        raise Failed(f"{done.stderr.strip()}\n{message}".strip(), done.returncode)

    def describe(self, kind: str, name: str) -> dict[str, Any] | None:
        """What gcloud says of a ``queued-resources`` or ``tpu-vm`` of this name; None if there is none."""
        text = self.read(self.command(kind, "describe", name, "--format=json"))
        return None if text is None else json.loads(text)

    def note(self, text: str) -> None:
        """In a dry run, say when or why the next commands run, as a comment that a shell skips."""
        if self.dry_run:
            print(f"# {text}", flush=True)


def environment(interactive: bool = False) -> dict[str, str]:
    """The environment of gcloud, which must not stop to ask where nobody answers."""
    return dict(os.environ) if interactive else os.environ | {"CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}


def _short(command: Sequence[str]) -> str:
    """The verbs of a command, without its flags."""
    verbs = [word for word in command if not word.startswith("-")]
    return " ".join(verbs[:6])


def call(gcloud: Gcloud, verb: str, name: str) -> str:
    """This program's command for the same place, for a message."""
    place = [f"--{flag} {value}" for flag in ("zone", "project") if (value := getattr(gcloud, flag))]
    return " ".join([PROGRAM, verb, name, *place])
