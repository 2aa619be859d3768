"""How far the images of each pipeline are from PyTorch diffusers'.

    python benchmarks/pipeline_parity.py            # the tests that compare images: 15 minutes on two cores
    python benchmarks/pipeline_parity.py -k panorama --print-only
    python benchmarks/pipeline_parity.py -k unclip --merge    # the rows of these tests; others stay as they are

Runs the oracle tests that compare images (``tests/oracle/agreement.py``) and writes
``docs/results/pipeline_parity.json``; fails if one of them does.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common  # noqa: E402
from tests.oracle import agreement  # noqa: E402

ABOUT = (
    "Images of small networks with random weights, saved by PyTorch diffusers and opened by both libraries, with the "
    "same noise, in float32 on the CPU. `requests` counts the compared calls (arguments, samplers, adapters, "
    "modifiers); differences are in units of 1/255, over all pixels of a request's images; `in` is the test with the "
    f"largest mean. The tests fail above {agreement.TOLERANCE} (few-step models: 0.05)."
)


def files() -> list[str]:
    """The test files that compare images."""
    found = sorted((ROOT / "tests" / "oracle").glob("test_*.py"))
    texts = {str(path): path.read_text(encoding="utf-8") for path in found}
    marks = ("require_same", "test_editing_pipelines import", "oracle.kandinsky import")
    return [path for path, text in texts.items() if any(mark in text for mark in marks)]


def rows(found: Sequence[agreement.Comparison]) -> Iterator[dict[str, Any]]:
    """One row per pipeline class, by name."""
    for name in sorted({comparison.pipeline for comparison in found}):
        own = [comparison for comparison in found if comparison.pipeline == name]
        worst = max(own, key=lambda comparison: comparison.mean)
        where = worst.test.split(" ")[0].split("::")[-1].split("[")[0].removeprefix("test_").replace("_", " ")
        differences = {"largest_mean_difference": worst.mean, "largest_difference": max(c.largest for c in own)}
        yield {"pipeline": name, "requests": len(own)} | differences | {"in": where}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", help="only tests that pytest selects with this expression")
    parser.add_argument("--print-only", action="store_true", help="print rows, leave docs/results unchanged")
    parser.add_argument("--merge", action="store_true", help="keep the rows of pipelines that these tests do not run")
    args = parser.parse_args(argv)
    options = ["-q", "-p", "no:cacheprovider", "-n", "0", f"--rootdir={ROOT}", "-m", ""]  # slow tests too
    status = pytest.main([*options, "-k", args.k, *files()])
    table = list(rows(agreement.FOUND))
    for row in table:
        print(json.dumps(row))
    if status or not table:
        return int(status) or 1
    if args.merge:
        table = sorted(common.merged(common.table("pipeline_parity"), table, "pipeline"), key=lambda r: r["pipeline"])
    if not args.print_only:
        print(common.write("pipeline_parity", "Pipelines against PyTorch", ABOUT, table, "jax", "torch", "diffusers"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
