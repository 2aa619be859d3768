"""The exception of files that cannot be used."""

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
"""What parsing bytes that nobody has checked may raise."""


class WeightsError(ValueError):
    """Weights, or the folder, index or download that should hold them, cannot be used; the text names file and key."""


def bad(path: Path | str, problem: str) -> WeightsError:
    """An error that begins with the file it is about."""
    return WeightsError(f"{path}: {problem}")


@contextmanager
def parsing(path: Path | str) -> Iterator[None]:
    """While a file is parsed: what damage makes Python raise becomes an error that names the file."""
    try:
        yield
    except WeightsError:
        raise
    except DAMAGE as error:
        raise bad(path, f"damaged ({type(error).__name__}: {str(error)[:200]})") from error
