"""The exception for files that cannot be used."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DAMAGE = (
    *(ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError),
    *(EOFError, NotImplementedError, RecursionError, RuntimeError, struct.error, zipfile.BadZipFile),
)
"""Exceptions that parsing unchecked bytes can raise."""


class WeightsError(ValueError):
    """Weights, or the folder, index or download that should hold them, cannot be used; names the file and the key."""


def bad(path: Path | str, problem: str) -> WeightsError:
    """An error whose message begins with the file."""
    return WeightsError(f"{path}: {problem}")


@contextmanager
def parsing(path: Path | str) -> Iterator[None]:
    """Turn what Python raises while parsing a damaged file into an error that names the file."""
    try:
        yield
    except WeightsError:
        raise
    except DAMAGE as error:
        raise bad(path, f"damaged ({type(error).__name__}: {str(error)[:200]})") from error
