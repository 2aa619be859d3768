"""Reads the text of a program that XLA compiled for a TPU: the compiler's estimated cycles, and collectives.

``compiled.as_text()`` has, beside most instructions, ``"estimated_cycles"``: what the compiler's cost model expects.
Instructions inside fusions are part of their fusion's estimate; a loop's body counts as often as it runs. Custom calls
(Pallas kernels) have no estimate.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "s16": 16, "u16": 16, "f16": 16}
BITS |= {"bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"([a-z][a-z0-9\-]*)\(")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in its computation.
      opcode: such as "fusion", "convolution", "while".
      shape: of its result, as text without layouts: ``bf16[2,64]``, ``(f32[2], s32[])``.
      operands: names of the instructions that it takes.
      called: names of the computations that it calls.
      cycles: the compiler's estimate; None if it gives none.
      trips: how often a loop runs; 1 if the text does not say.
      operation: the JAX operation that it came from (``op_name``), "" if unknown.
      target: the target of a custom call, else "".
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    cycles: int | None
    trips: int
    operation: str
    target: str


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, and the name of the one that is run."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    def executed(self) -> Iterator[tuple[Instruction, int]]:
        """Every instruction that runs on its own, with how often; bodies of fusions are left out."""
        yield from self._executed(self.entry, 1)

    def _executed(self, name: str, times: int) -> Iterator[tuple[Instruction, int]]:
        for one in self.computations[name]:
            yield one, times
            if one.opcode in ("while", "call", "conditional", "async-start"):
                for inner in one.called:
                    yield from self._executed(inner, times * one.trips)

    def body(self, one: Instruction) -> Iterator[Instruction]:
        """The instructions inside a fusion, with those of nested ones; only itself if it is none."""
        if one.opcode != "fusion":
            yield one
            return
        for name in one.called:
            for inner in self.computations.get(name, ()):
                yield from self.body(inner)


def parse(text: str) -> Program:
    """The program of ``compiled.as_text()``.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name, lines = "", "", []
    for line in _logical(text):
        if not name and (head := _HEAD.match(line)):
            name, lines = head[2], []
            entry = name if head[1] else entry
        elif name and line.startswith("}"):
            computations[name], name = tuple(lines), ""
        elif name and (found := _INSTRUCTION.match(line)):
            lines.append(_instruction(found[1], found[2]))
    if not entry:
        raise ValueError("no ENTRY computation in the text; give compiled.as_text() of a compiled program")
    return Program(computations, entry)


def _logical(text: str) -> Iterator[str]:
    """The lines, each instruction on one: the settings of some kernels contain line breaks, after which a brace may
    stand where only the end of a computation has one."""
    whole, depth = "", 0
    for line in text.splitlines():
        if not whole and not _INSTRUCTION.match(line):
            yield line
            continue
        whole, depth = whole + line, depth + _depth(line)
        if depth <= 0:
            yield whole
            whole, depth = "", 0


def _depth(line: str) -> int:
    """How many more braces a line opens than it closes, outside of texts."""
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", line)
    return bare.count("{") - bare.count("}")


def _instruction(name: str, rest: str) -> Instruction:
    shape, after = _shape(rest)
    opcode = _OPCODE.match(after)
    cycles = re.search(r'"estimated_cycles":"(\d+)"', rest)
    trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest)
    operation, target = re.search(r'op_name="([^"]*)"', rest), re.search(r'custom_call_target="([^"]*)"', rest)
    called = re.findall(r"(?:calls|body|to_apply|called_computations=\{?|branch_computations=\{?)=?%?([\w.\-]+)", rest)
    return Instruction(
        name,
        opcode[1] if opcode else "",
        shape,
        tuple(re.findall(r"%([\w.\-]+)", after[: _closing(after)])),
        tuple(called),
        int(cycles[1]) if cycles else None,
        int(trips[1]) if trips else 1,
        operation[1] if operation else "",
        target[1] if target else "",
    )


def _shape(rest: str) -> tuple[str, str]:
    """The result's shape without layouts, and what follows it."""
    depth = 0
    for at, letter in enumerate(rest):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if letter == " " and depth == 0:
            return re.sub(r"\{[^{}]*\}", "", rest[:at]), rest[at + 1 :]
    return rest, ""


def _closing(text: str) -> int:
    """Where the first parenthesis of a text closes."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == ")" and depth == 0:
            return at
    return len(text)


def size(shape: str) -> int:
    """Bytes of a shape such as ``bf16[2,64]`` or a tuple of them, without padding."""
    found = re.findall(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]", shape)
    count = lambda axes: math.prod(int(n.strip("<=")) for n in axes.split(",") if n)
    return sum(BITS.get(kind, 0) * count(axes) for kind, axes in found) // 8


def cycles(program: Program) -> int:
    """The estimated cycles of one run."""
    return sum(times * (one.cycles or 0) for one, times in program.executed())


class Collective(NamedTuple):
    """An instruction that moves data between devices.

    Attributes:
      kind: one of :data:`COLLECTIVES`.
      bytes: size of its result on one device.
    """

    kind: str
    bytes: int


def collectives(text: str) -> list[Collective]:
    """The collectives in ``compiled.as_text()``, those of a loop's body once; one that is started and waited for
    counts once."""
    instructions = (found for line in text.splitlines() if (found := _INSTRUCTION.match(line)))
    return [found for one in instructions if (found := _collective(_instruction(one[1], one[2])))]


def _collective(one: Instruction) -> Collective | None:
    kind = one.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    # The result of one that is only started holds its operand beside what it will be.
    sizes = [size(array) for array in re.findall(r"\w+\[[\d,<=]*\]", one.shape)]
    return Collective(kind, max(sizes, default=0) if one.opcode.endswith("-start") else sum(sizes))


def sent(program: Program) -> dict[str, tuple[int, int]]:
    """Collectives by kind: how many one run makes, and the bytes of their results.

    A reduction whose result is scattered is a fusion around an all-reduce; it counts as a "reduce-scatter", with the
    bytes of what is reduced.
    """
    found: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for one, times in program.executed():
        for inner in program.body(one):
            if each := _collective(inner):
                scattered = inner is not one and each.kind == "all-reduce"
                kind = "reduce-scatter" if scattered else each.kind
                found[kind][0] += times
                found[kind][1] += times * each.bytes
    return {kind: (count, moved) for kind, (count, moved) in sorted(found.items())}


def axes(shape: str) -> tuple[int, ...]:
    """The axes of the first array of a shape."""
    found = re.search(r"\[([\d,]*)\]", shape)
    return tuple(int(n) for n in found[1].split(",") if n) if found else ()


def attention_flops(program: Program, lanes: int = 128) -> float:
    """Operations of the Pallas flash attention calls, which carry no estimate, heads padded to whole lanes.

    A forward call has two products of queries, keys and head; of the two backward calls, that for keys and values has
    four and that for queries three (scores and probabilities are computed again).
    """
    total = 0.0
    for computation in program.computations.values():
        shapes = {one.name: one.shape for one in computation}
        for one in computation:
            if "tpu_custom_call" not in one.target:
                continue
            # Masks and the like come before them, but are integers.
            given = [shape for name in one.operands if (shape := shapes.get(name, "")).startswith(("bf16", "f32"))]
            given = [found for shape in given if len(found := axes(shape)) >= 3]
            if len(given) < 3:
                continue
            query, key = given[:2]
            called = f"{one.name} {one.operation}"
            products = 4 if "dkv" in called else 3 if "dq" in called else 2
            *images_and_heads, rows, depth = query
            padded = -(-depth // lanes) * lanes
            times = sum(n for ran, n in program.executed() if ran is one)
            total += times * products * 2.0 * math.prod(images_and_heads) * rows * key[-2] * padded
    return total


KINDS = (
    ("convolution", r"conv_general_dilated"),
    ("matrix product", r"dot_general"),
    ("sum, mean", r"reduce_|/mean|cumsum"),
    ("copy, transpose", r"transpose|reshape|concatenate|/pad|squeeze|broadcast|gather|slice|copy"),
    ("cast", r"convert_element_type"),
)
"""Kinds of a profile, first match wins on the operation's last part."""


def kind(program: Program, one: Instruction) -> str:
    """The kind of work that an instruction does: what its fusion contains decides before what it ends with."""
    opcodes = {inner.opcode for inner in program.body(one)}
    if "convolution" in opcodes:
        names = [inner.operation for inner in program.body(one) if inner.opcode == "convolution"]
        return "matrix product" if any("dot_general" in name for name in names) else "convolution"
    if opcodes & {"dot"}:
        return "matrix product"
    if opcodes & {"reduce", "reduce-window"}:
        return "sum, mean"
    if one.opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
        return "collective"
    if one.opcode in ("copy", "copy-start", "transpose", "bitcast", "reshape", "concatenate", "pad", "slice"):
        return "copy, transpose"
    last = one.operation.rsplit("/", 1)[-1]
    return next((name for name, pattern in KINDS if re.search(pattern, last)), "elementwise")


def profile(program: Program) -> dict[str, int]:
    """Estimated cycles by kind, largest first."""
    found: collections.Counter[str] = collections.Counter()
    for one, times in program.executed():
        if one.cycles:
            found[kind(program, one)] += times * one.cycles
    return dict(found.most_common())
