"""Prompts with their settings, one at a time, from a file of any length: text, JSON lines, CSV or Parquet."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

MAX_LINE = 1 << 20
"""Maximum length of a line in bytes."""

PARQUET_ROWS = 1024
"""Rows of a Parquet file that are in memory at once."""


class Row(NamedTuple):
    """A prompt as it was read: its number, from 1, and what stands there, not yet understood.

    In ``.txt`` and ``.jsonl`` files the number is that of the line, so empty lines count; in tables, that of the row.
    """

    number: int
    raw: Any


class Lines(NamedTuple):
    """Prompts that can be read several times.

    Attributes:
      rows: starts reading: a new iterator over the rows.
      fields: ``raw -> {name: value}``; a ``ValueError`` says what is wrong with the row.
      name: what errors call them.
    """

    rows: Callable[[], Iterator[Row]]
    fields: Callable[[Any], Mapping[str, Any]]
    name: str


def lines_of(source: Any, known: Sequence[str]) -> Lines:
    """The prompts of a file, or of a list (or any other iterable that can be read again) of texts and dicts.

    Args:
      source: the path of a ``.txt``, ``.jsonl``, ``.csv`` or ``.parquet`` file, or an iterable.
      known: the names that a row may have; columns of a table with other names are refused here.

    Raises:
      ValueError: the file is of another kind, or its columns are not those of prompts.
      TypeError: the source can be read only once.
      ImportError: Parquet needs pyarrow.
      OSError: the file cannot be read.
    """
    if not isinstance(source, str | Path):
        if not isinstance(source, Iterable) or isinstance(source, Mapping) or iter(source) is source:
            raise TypeError(
                "the prompts must be a file, or a list of texts and dicts: they are read twice, which an iterator "
                f"cannot be; got {type(source).__name__}"
            )
        return Lines(lambda: (Row(k, raw) for k, raw in enumerate(source, 1)), _object, "the prompts")
    path = Path(source).expanduser()
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path}: prompts are read from {', '.join(READERS)} files")
    with path.open("rb"):  # a missing file is an error now, not when the first row is asked for
        pass
    return READERS[path.suffix.lower()](path, known)


def _text(path: Path, known: Sequence[str]) -> Lines:
    return Lines(lambda: _lines(path), lambda raw: {"prompt": _decoded(raw)}, str(path))


def _json_lines(path: Path, known: Sequence[str]) -> Lines:
    def fields(raw: bytes) -> Mapping[str, Any]:
        text = _decoded(raw)
        try:
            value = json.loads(text, parse_constant=_no_number)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"it is not JSON ({error})") from None
        return _object(value)

    return Lines(lambda: _lines(path), fields, str(path))


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is not a number")


def _csv(path: Path, known: Sequence[str]) -> Lines:
    def rows() -> Iterator[Row]:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            next(reader, None)
            for number, cells in enumerate(_surviving(reader), 1):
                if cells:
                    yield Row(number, cells)

    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        header: Any = next(_surviving(csv.reader(file, strict=True)), [])
    if isinstance(header, csv.Error):
        raise ValueError(f"{path}: its header is not a row of CSV ({header})")
    names = [name.strip() for name in header]
    check_columns(names, known, path)

    def fields(raw: list[str] | csv.Error) -> Mapping[str, Any]:
        if isinstance(raw, csv.Error):
            raise ValueError(f"it is not a row of CSV ({raw})")
        if len(raw) != len(names):
            raise ValueError(f"it has {len(raw)} cells for {len(names)} columns; quote cells that contain commas")
        if any("\udc80" <= letter <= "\udcff" for cell in raw for letter in cell):
            raise ValueError("it is not UTF-8")
        return {name: cell for name, cell in zip(names, raw, strict=True) if cell != ""}

    return Lines(rows, fields, str(path))


def _surviving(reader: Any) -> Iterator[Any]:
    """The rows of a CSV reader, with an error in the place of a row that is damaged."""
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield error


def _parquet(path: Path, known: Sequence[str]) -> Lines:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ImportError(
            f"{path}: Parquet files are read with pyarrow; pip install 'diffusejax[parquet]', or give .jsonl or .csv"
        ) from None
    try:
        names = parquet.read_schema(path).names
    except ValueError as error:
        raise ValueError(f"{path} is not a Parquet file, or is damaged: {error}") from None
    check_columns(names, known, path)

    def rows() -> Iterator[Row]:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches(PARQUET_ROWS)
            tables = (batch.to_pylist() for batch in batches)
            try:
                yield from (Row(k, row) for k, row in enumerate(itertools.chain.from_iterable(tables), 1))
            except (OSError, ValueError) as error:  # pyarrow's
                raise ValueError(f"{path} is damaged: {error}") from None

    return Lines(rows, _object, str(path))


READERS: Mapping[str, Callable[[Path, Sequence[str]], Lines]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""The suffix of a file -> what opens it."""


def check_columns(names: Sequence[str], known: Sequence[str], path: Path) -> None:
    """Check the columns of a table.

    Raises:
      ValueError: there is no column ``prompt``, or one is unknown or there twice.
    """
    if "prompt" not in names:
        raise ValueError(f"{path} has no column 'prompt'; it has {', '.join(names) or 'none'}")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"{path} has a column {unknown[0]!r}, which is no setting; there are {', '.join(known)}. To store it with "
            f"the images, say --keep {unknown[0]} (keep=)"
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path} has the column {twice[0]!r} twice")


def _lines(path: Path) -> Iterator[Row]:
    """The lines of a text file that are not empty, as bytes; of one that is too long, the beginning."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE + 1):
            number += 1
            rest = raw
            while rest and not rest.endswith(b"\n"):  # the end of a line that is too long, or of the file
                rest = file.readline(MAX_LINE)
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if raw.strip():
                yield Row(number, raw)


def _decoded(raw: bytes) -> str:
    if len(raw) > MAX_LINE:
        raise ValueError(f"it is longer than {MAX_LINE} bytes")
    try:
        return raw.decode().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error.reason} at byte {error.start})") from None


def _object(value: Any) -> Mapping[str, Any]:
    """A row as a dict; a text alone is a prompt, and what is null is left out."""
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, Mapping):
        raise ValueError(f'it must be a JSON object such as {{"prompt": "a cat"}}, got {type(value).__name__}')
    nothing = lambda inner: inner is None or (isinstance(inner, Real) and math.isnan(inner))  # as in tables with gaps
    return {name: inner for name, inner in value.items() if not nothing(inner)}
