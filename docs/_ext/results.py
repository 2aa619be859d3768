"""Tables from ``docs/results/*.json``: nothing in a table is typed by hand.

A result is a JSON object, written by a test or a benchmark::

    {"title": "UNet step", "about": "What was measured and how.", "machine": {"device": "2 CPU cores"},
     "rows": [{"model": "SD 1.5", "seconds": 1.25}, ...]}

The columns of the table are the keys of the rows, in the order in which they appear. ``python docs/_ext/results.py``
rewrites the tables of README.md, which stand between ``<!-- results: NAME COLUMN ... -->`` and
``<!-- end results -->``; without columns the table has all of them. ``COLUMN=VALUE,VALUE`` leaves only such rows, and
shows the column.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MOST_COLUMNS = 12
"""Wider tables leave out the columns whose values are all the same."""
BLOCK = re.compile(r"(<!-- results: (?P<name>[\w-]+)(?P<columns>( [\w=,]+)*) -->\n).*?<!-- end results -->", re.DOTALL)


def cell(value: Any) -> str:
    """A JSON value as it stands in a table: floats with three significant digits, missing values as a dash.

    ``{"value": ..., "interval": [low, high]}`` is an estimate with its interval.
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, dict):
        return f"{cell(value['value'])} ({'–'.join(map(cell, value['interval']))})"
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    return str(value).replace("|", "\\|")


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """Rows as a Markdown table of the given columns (all if none); a row that lacks a column shows a dash there."""
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    lines = [[name.replace("_", " ") for name in columns], ["---"] * len(columns)]
    lines += [[cell(row.get(name)) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(result: Mapping[str, Any]) -> str:
    """What a page includes: what was measured, on what, and the table.

    A table of many columns would not fit on a page: there, what is the same in every row is said once, above it.
    """
    rows = result["rows"]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    same = [name for name in columns if len({cell(row.get(name)) for row in rows}) == 1 < len(rows)]
    same = same if len(columns) > MOST_COLUMNS else []
    once = "; ".join(f"{name.replace('_', ' ')}: {cell(rows[0][name])}" for name in same)
    machine = ", ".join(f"{key.replace('_', ' ')} {cell(value)}" for key, value in result.get("machine", {}).items())
    parts = [
        result.get("about", ""),
        f"The same in every row: {once}." if once else "",
        table(rows, [name for name in columns if name not in same]),
        f"Measured on: {machine}." if machine else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Every result of ``folder`` by the name of its file; an object without title and rows is an error."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        found[path.stem] = data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not {"title", "rows"} <= data.keys():
            raise ValueError(f"{path}: a result is an object with 'title' and 'rows' (see docs/_ext/results.py)")
    return found


def write_pages(source: Path, target: Path) -> None:
    """One ``NAME.md`` to include for each result, and ``all.md`` with all of them under their titles."""
    target.mkdir(exist_ok=True)
    found = read(source)
    for name, result in found.items():
        (target / f"{name}.md").write_text(section(result), encoding="utf-8")
    everything = [f"## {result['title']}\n\n{section(result)}" for result in found.values()]
    (target / "all.md").write_text("\n".join(everything) or "Nothing has been measured yet.\n", encoding="utf-8")


def fill(page: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of a page with the tables between its marks made anew."""
    return BLOCK.sub(lambda m: f"{m[1]}{chosen(found[m['name']]['rows'], m['columns'])}\n<!-- end results -->", page)


def chosen(rows: Sequence[Mapping[str, Any]], columns: str) -> str:
    """The table of the columns ``"name seconds"``; ``"name=a,b seconds"`` leaves the rows whose name is a or b.

    Raises:
      ValueError: no such row.
    """
    split = [word.partition("=") for word in columns.split()]
    for name, _, values in split:
        if values:
            rows = [row for row in rows if str(row.get(name)) in values.split(",")]
    if not rows:
        raise ValueError(f"no row is {columns!r}")
    return table(rows, [name for name, _, _ in split])


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    readme = Path(sys.argv[1]) if len(sys.argv) > 1 else root / "README.md"
    readme.write_text(fill(readme.read_text(encoding="utf-8"), read(root / "docs" / "results")), encoding="utf-8")
