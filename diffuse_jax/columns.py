"""Tables as text, for people who read them in a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def in_columns(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """The rows, the heading first, with their cells under each other.

    Args:
      rows: cells of equally long rows.
      right: for each column, whether its cells are aligned on the right, as numbers are.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.rjust if number else str.ljust for number in right]
    lines = ([side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in lines)
