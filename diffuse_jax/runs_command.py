"""The command ``runs``: compare runs of training. Building its parser imports nothing heavy."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from diffuse_jax.writing import path_flag, path_text

SORTED_BY = ("run", "step", "loss", "lowest loss", "steps/s", "minutes")


def runs(args: argparse.Namespace) -> None:
    """Print a table of runs; with ``--plot``, also draw their curves."""
    from diffuse_jax.columns import in_columns
    from diffuse_jax.training import runs as reading

    found = reading.find_runs(args.folders)
    if args.plot is not None:
        reading.plot(found, args.plot)
        print(args.plot, file=sys.stderr)
    rows = reading.comparison(found)
    if args.sort is not None:
        rows.sort(key=lambda row: (row[args.sort] is None, row[args.sort]))
    if args.json:
        print(json.dumps(rows, indent=2, default=str))
        return
    names = list(rows[0])
    text = [names, *([reading.cell(row[name]) for name in names] for row in rows)]
    print(in_columns(text, [all(isinstance(row[name], int | float | None) for row in rows) for name in names]))


def add_commands(commands: Any, add_command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to a parser's."""
    example = "diffuse-jax runs runs/ --sort loss --plot runs/curves.png"
    purpose = "compare runs of training: losses, speeds and the flags in which they differ"
    add = add_command(commands, "runs", runs, purpose, example).add_argument
    add("folders", type=path_text, nargs="+", metavar="DIR", help="--output_dir of a run, or a folder with such")
    add("--sort", choices=SORTED_BY, help="column to sort by, the lowest first (default: as they were found)")
    add("--json", action="store_true", help="print the rows as JSON")
    about = "draw loss and learning rate into this file (.png, .svg, .pdf); needs matplotlib"
    add("--plot", type=path_flag, metavar="FILE", help=about)
