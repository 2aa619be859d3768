"""Text to image from end to end: this library against PyTorch diffusers and, on request, other JAX libraries.

Folders in diffusers layout with random weights (``tiny``, ``50m``, ``sd15``) and the shipped model (``emoji``), float32
on a CPU. Each contestant has its own process (``sides/``); they take turns, phase by phase::

    python benchmarks/pipeline.py                            # all folders; 20 GB of memory and 10 GB of disk for sd15
    python benchmarks/pipeline.py --folders tiny emoji
    python benchmarks/pipeline.py --folders tiny 50m --flax --dew --python312 /usr/bin/python3.12

``--flax`` and ``--dew`` create virtual environments under ``.cache/venvs``, with the last diffusers that had Flax and
with Dew.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -m benchmarks.pipeline

from common import RESULTS, make_venv, write
from folders import make_folder

ROOT = Path(__file__).resolve().parents[1]
SIDES = Path(__file__).resolve().parent / "sides"

REQUIREMENTS = {
    "flax": [
        "torch==2.13.0",  # without torch, diffusers does not import its Flax classes
        "diffusers==0.39.0",
        "transformers==4.57.6",
        "jax==0.10.2",
        "jaxlib==0.10.2",
        "flax==0.12.8",
        "optax==0.2.8",
    ],
    "dew": ["dewml[interop]==0.1.0"],
}

PROMPTS = ["a red apple, noto style", "a smiling cat, twemoji style", "a blue fish, fluent style", "a slice of pizza"]
OTHER_PROMPTS = ["a yellow taxi, noto style", "an old castle", "a green frog, fluent style", "a snowman, twemoji style"]

ABOUT = (
    "Seconds. `start` is from starting the process until its imports are done, `first image` includes compilation, "
    "`next image` is the fastest repetition of the same call, and each `other` call changes one thing: the number of "
    "steps (a fifth more; 2 to 3 for sd15), the guidance scale, the prompts, the seed. `compilations` counts the "
    "programs that XLA compiled up to the first image, `recompilations` those of all later calls. "
    "`until first image` is the sum of start, load and first image; `processor` counts CPU seconds on all cores (if it "
    "is far lower, other work kept the machine busy, which slows PyTorch's threads most). A next process gets its "
    "predecessor's programs, from JAX's compilation cache or from `save_compiled`. `peak GiB` includes pages of mapped "
    "files."
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One folder and what is generated with it; ``repeats`` is how often the call is repeated."""

    folder: str
    images: int
    steps: int
    repeats: int

    @property
    def call(self) -> dict[str, Any]:
        return {"do": "draw", "prompts": PROMPTS[: self.images], "steps": self.steps, "guidance": 7.5, "seed": 0}

    @property
    def phases(self) -> list[tuple[str, dict[str, Any]]]:
        """The calls in order, each with the name of its column."""
        call = self.call
        return [
            ("first_image", call),
            *[("next_image", call)] * self.repeats,
            ("other_steps", call | {"steps": self.steps + max(1, self.steps // 5)}),
            ("other_guidance", call | {"guidance": 5.0}),
            ("other_prompt", call | {"prompts": OTHER_PROMPTS[: self.images]}),
            ("other_seed", call | {"seed": 1}),
        ]


SETTINGS = {
    s.folder: s
    for s in (Setting("tiny", 4, 20, 3), Setting("emoji", 4, 20, 3), Setting("50m", 1, 20, 2), Setting("sd15", 1, 2, 1))
}


class Side:
    """A contestant's process. After its first error it gets no more commands, and its row says why."""

    def __init__(self, python: str | Path, script: str, cache: Path, folder: Path) -> None:
        self.python, self.script, self.cache, self.folder = python, script, cache, folder
        self.name = script.removesuffix(".py")
        self.answers: dict[str, list[dict[str, Any]]] = {}
        self.error: str | None = None
        begin = time.perf_counter()
        self._process = subprocess.Popen(
            [python, SIDES / script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(cache)
        )
        answer = self._read()
        self.name = answer.get("name", self.name)
        self._keep("start", answer | {"seconds": time.perf_counter() - begin})

    def ask(self, phase: str, command: dict[str, Any]) -> None:
        if self.error is None:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            self._keep(phase, self._read())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": f"the process ended with status {self._process.wait()}"}

    def _keep(self, phase: str, answer: dict[str, Any]) -> None:
        if answer.get("spread") == 0:
            answer = {"error": "the images have a single colour"}
        self.error = answer.get("error")
        print(f"{self.folder.name} {self.name} {phase}: {json.dumps(answer)}", file=sys.stderr)
        if self.error is None:
            self.answers.setdefault(phase, []).append(answer)


def environment(cache: Path) -> dict[str, str]:
    """A contestant's environment: this checkout, no Hub, JAX on the CPU with a separate compilation cache."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "DIFFUSERS_VERBOSITY": "error",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }


def row(setting: Setting, side: Side, suffix: str = "") -> dict[str, Any]:
    """The table row of one side; a phase that it did not reach is missing."""
    least = lambda phase, what: min((a[what] for a in side.answers.get(phase, [])), default=None)
    total = lambda what: None if "first_image" not in side.answers else sum(least(p, what) for p in until_first)
    until_first = ("start", "load", "first_image")
    counts = {p: [a["compilations"] for a in found if "compilations" in a] for p, found in side.answers.items()}
    first = [n for phase in until_first for n in counts.get(phase, [])]
    later = [n for phase, numbers in counts.items() if phase.startswith(("next", "other")) for n in numbers]
    peaks = [a["peak_gib"] for answers in side.answers.values() for a in answers if "peak_gib" in a]
    columns = {phase: least(phase, "seconds") for phase in ("start", "load", *dict(setting.phases))}
    columns |= {
        "until_first_image": total("seconds"),
        "until_first_image_processor": total("processor"),
        "next_image_processor": least("next_image", "processor"),
        "peak_GiB": max(peaks, default=None),
    }
    result: dict[str, Any] = {"folder": setting.folder, "images": setting.images, "steps": setting.steps}
    result |= {"side": side.name + suffix}
    result |= {name: None if value is None else round(value, 3) for name, value in columns.items()}
    result |= {"compilations": sum(first) if first else None, "recompilations": sum(later) if later else None}
    return result if side.error is None else result | {"note": side.error.splitlines()[0][:120]}


def compete(setting: Setting, sides: list[Side], programs: Path) -> list[dict[str, Any]]:
    """Run all phases with the sides taking turns, then a next process of each side that compiles; closes the sides."""
    for side in sides:
        side.ask("load", {"do": "load", "folder": str(side.folder)})
    for phase, command in setting.phases:
        for side in sides:
            side.ask(phase, command)
    rows = [row(setting, side) for side in sides]
    for side in sides:
        if side.script == "ours.py":
            side.ask("save", {"do": "save", "programs": str(programs)})
        side.close()
    for side in sides:
        compiles = any("compilations" in answer for answer in side.answers.get("first_image", []))
        if compiles and side.error is None:
            rows.append(next_process(setting, side, side.cache, ", next process, JAX's cache"))
        if "save" in side.answers:
            empty = programs.parent / "empty"
            rows.append(next_process(setting, side, empty, ", next process, saved programs", programs=str(programs)))
    return rows


def next_process(setting: Setting, before: Side, cache: Path, suffix: str, **options: str) -> dict[str, Any]:
    """The same first image in a new process."""
    side = Side(before.python, before.script, cache, before.folder)
    side.ask("load", {"do": "load", "folder": str(before.folder)} | options)
    side.ask("first_image", setting.call)
    side.close()
    return row(setting, side, suffix)


def contestants(args: argparse.Namespace) -> list[tuple[str | Path, str]]:
    """The interpreter and script of each side."""
    sides: list[tuple[str | Path, str]] = [(sys.executable, f"{side}.py") for side in args.sides]
    if args.flax:
        sides.append((make_venv("flax", args.python311, REQUIREMENTS["flax"]), "diffusers_flax.py"))
    if args.dew:
        sides.append((make_venv("dew", args.python312, REQUIREMENTS["dew"]), "dew_task.py"))
    return sides


def folder_for(script: str, folder: Path, cache: Path) -> Path:
    """The folder in a format that this side reads: the old Flax pipelines read msgpack only."""
    if script != "diffusers_flax.py":
        return folder
    converted = cache / f"{folder.name}-flax"
    if not converted.exists():
        from diffuse_jax.convert import convert

        convert(folder, converted, to="flax-msgpack")
    return converted


def measure(name: str, args: argparse.Namespace, sides: list[tuple[str | Path, str]]) -> list[dict[str, Any]]:
    """Every row of one folder."""
    setting = SETTINGS[name]
    setting = dataclasses.replace(setting, steps=args.steps or setting.steps, repeats=args.repeats or setting.repeats)
    folder = make_folder(name, args.cache)
    with tempfile.TemporaryDirectory(prefix="pipeline-") as temporary:
        fresh = Path(temporary)
        running = [
            Side(python, script, fresh / script, folder_for(script, folder, args.cache)) for python, script in sides
        ]
        return compete(setting, running, fresh / "programs")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folders", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--sides", nargs="*", choices=("pytorch", "ours"), default=["pytorch", "ours"])
    parser.add_argument("--flax", action="store_true", help="add diffusers 0.39 with Flax")
    parser.add_argument("--dew", action="store_true", help="add Dew")
    parser.add_argument("--python311", default="python3.11", help="interpreter for --flax")
    parser.add_argument("--python312", default="python3.12", help="interpreter for --dew")
    parser.add_argument("--steps", type=int, help="instead of each folder's number of sampling steps")
    parser.add_argument("--repeats", type=int, help="instead of each folder's number of repetitions")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "pipelines", help="where folders are written")
    parser.add_argument("--print-only", action="store_true", help="print rows, leave docs/results unchanged")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    sides = contestants(args)
    for name in args.folders:
        rows = measure(name, args, sides)
        for line in rows:
            print(json.dumps(line))
        if not args.print_only:
            keep(name, rows)
    return 0


def keep(name: str, rows: list[dict[str, Any]]) -> None:
    """Replace the earlier rows of one folder."""
    path = RESULTS / "pipeline.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    everything = [line for line in before if line["folder"] != name] + rows
    everything.sort(key=lambda line: list(SETTINGS).index(line["folder"]))
    write("pipeline", "Text to image", ABOUT, everything, "jax", "torch", "diffusers")


if __name__ == "__main__":
    raise SystemExit(main())
