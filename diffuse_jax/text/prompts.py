"""Prompts with weights: AUTOMATIC1111's syntax and Compel's, read as pieces of text, each with a weight.

Reading is separate from the arithmetic: what a weight does to the prompt embeddings is in
:mod:`diffuse_jax.pipelines.parts.text`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from diffuse_jax.messages import brief

MAX_WEIGHT = 1000.0
"""The largest absolute weight. Images fall apart far below; larger numbers are typing mistakes."""


class Piece(NamedTuple):
    """A text and its weight; 1 is neutral."""

    text: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class ParsedPrompt:
    """A prompt without its syntax.

    Attributes:
      texts: one or several texts, each as pieces; every text is encoded by itself.
      weights: one for each text.
      blend: whether the embeddings of the texts are mixed into one sequence; if not, they follow each other.
    """

    texts: tuple[tuple[Piece, ...], ...]
    weights: tuple[float, ...] = (1.0,)
    blend: bool = False


def parse_plain(prompt: str) -> ParsedPrompt:
    """The prompt as it is."""
    return ParsedPrompt(((Piece(prompt),),))


# AUTOMATIC1111

UP, DOWN = 1.1, 1 / 1.1
"""The factors of ``(...)`` and ``[...]``."""

A1111_TOKEN = re.compile(
    r"\\(?P<escaped>[\\()\[\]])"
    r"|:\s*(?P<weight>[+-]?(?:[.\d]+(?:e[+-]?\d+)?|nan|inf(?:inity)?))\s*\)"
    r"|[()\[\]]|[^\\()\[\]:]+|.",
    re.DOTALL | re.IGNORECASE,
)
A1111_BREAK = re.compile(r"\s*\bBREAK\b\s*")


def parse_a1111(prompt: str) -> ParsedPrompt:
    r"""Read AUTOMATIC1111's syntax.

    ``(text)`` multiplies the weight by 1.1, ``[text]`` divides it by 1.1, ``(text:1.3)`` multiplies it by a number;
    they nest. A backslash before a bracket or a backslash makes it text. ``BREAK`` ends a text. Brackets need not be
    balanced: one that is never closed reaches to the end, and a closing one without a partner is text.

    Raises:
      ValueError: a weight is not a number, or too large.
    """
    found: list[list[Piece]] = [[]]  # a list of pieces for each text
    starts: dict[str, list[tuple[int, int]]] = {"(": [], "[": []}  # the position of each open bracket

    def add(text: str) -> None:
        found[-1].append(Piece(text))

    def close(bracket: str, factor: float) -> None:
        text, piece = starts[bracket].pop()
        for n, pieces in enumerate(found[text:], text):
            first = piece if n == text else 0
            pieces[first:] = [Piece(p.text, p.weight * factor) for p in pieces[first:]]

    for token in A1111_TOKEN.finditer(prompt):
        word, weight = token[0], token["weight"]
        if token["escaped"]:
            add(token["escaped"])
        elif word in starts:
            starts[word].append((len(found) - 1, len(found[-1])))
        elif weight and starts["("]:
            close("(", to_weight(weight, prompt))
        elif word == ")" and starts["("]:
            close("(", UP)
        elif word == "]" and starts["["]:
            close("[", DOWN)
        else:
            first, *after = A1111_BREAK.split(word)
            add(first)
            for text in after:
                found.append([])
                add(text)
    for bracket, factor in (("(", UP), ("[", DOWN)):
        while starts[bracket]:
            close(bracket, factor)
    texts = [joined(pieces, prompt) for pieces in found]
    if len(texts) > 1 and not texts[-1]:  # a BREAK at the end begins nothing
        texts.pop()
    return ParsedPrompt(tuple(texts), (1.0,) * len(texts))


# Compel

COMPEL_PLUS, COMPEL_MINUS = 1.1, 0.9
"""The factor of each ``+`` and each ``-``."""

SIGNS = r"\++|-+"
ATTEND = rf"\.attend\(\s*(?P<explicit>{SIGNS}|[\d.]+)\s*\)"
AFTER_WORD = re.compile(rf"(?P<operator>{SIGNS})|{ATTEND}")
AFTER_GROUP = re.compile(rf"(?P<operator>{SIGNS}|\d+\.?\d*|\.\d+)|{ATTEND}")
ESCAPES = r"()\"+\-.,="
COMPEL_WORD = re.compile(rf"(?:\\[{ESCAPES}]|[^\s()\",.+\-=]|[-+](?=[^\s()\",.+\-=]))+")
COMPEL_ESCAPED = re.compile(rf"\\([{ESCAPES}])")
MAX_DEPTH = 100
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
SEVERAL = re.compile(r"\s*\((?P<texts>.*)\)\s*\.(?P<how>and|add|blend)\((?P<weights>[^()]*)\)\s*", re.DOTALL)
COMPEL_REFUSED = {
    r"\)\s*\.(?:and|add|blend)\(": '.and() and .blend() must be the whole prompt, as in ("a cat", "a dog").and(1, 0.5)',
    r"\.swap\(": "there is no .swap()",
    r"\b(?:with|use)Lora\(": "LoRA is not loaded by a prompt; use pipe.load_lora_weights",
}


def parse_compel(prompt: str) -> ParsedPrompt:
    r"""Read Compel's syntax.

    Each ``+`` after a word multiplies its weight by 1.1, each ``-`` by 0.9; after ``(several words)`` or
    ``"several words"`` a number may follow too: ``(several words)1.3``. They nest. ``("a", "b").and(1, 0.5)`` encodes
    texts one after the other, ``("a", "b").blend(0.7, 0.3)`` mixes them; weights of ``blend`` are divided by their sum
    unless ``no_normalize`` follows. A backslash before a bracket, quotation mark or sign makes it text.

    Raises:
      ValueError: brackets are not balanced, a weight is not a number or too large, their number is not that of the
        texts, or ``.and`` and ``.blend`` are only a part of the prompt.
    """
    several = SEVERAL.fullmatch(prompt)
    if several is None:
        return ParsedPrompt((compel_pieces(prompt, prompt),))
    texts = tuple(compel_pieces(text, prompt) for text in at_commas(several["texts"], prompt))
    given = [word.strip() for word in several["weights"].split(",") if word.strip()]
    blend = several["how"] == "blend"
    normalize = not (blend and given[-1:] == ["no_normalize"])
    weights = [to_weight(word, prompt) for word in given[: None if normalize else -1]] or [1.0] * len(texts)
    if len(weights) != len(texts):
        raise ValueError(f".{several['how']}() has {len(weights)} weights for {len(texts)} texts in {prompt!r}")
    if blend and normalize:
        if abs(sum(weights)) < 1e-6:
            raise ValueError(f"the weights of .blend() add up to 0 in {prompt!r}; add no_normalize after them")
        weights = [weight / sum(weights) for weight in weights]
    return ParsedPrompt(texts, tuple(weights), blend)


def compel_pieces(text: str, prompt: str, depth: int = 0) -> tuple[Piece, ...]:
    """The pieces of one text of a prompt, which may be quoted ``depth`` brackets deep."""
    for pattern, message in COMPEL_REFUSED.items():
        if re.search(pattern, text):
            raise ValueError(f"{message}; got {prompt!r}")
    pieces: list[Piece] = []
    end = read_compel(text, 0, 1.0, pieces, prompt, depth)
    if end < len(text):
        raise unbalanced(")", prompt)
    return joined(pieces, prompt)


def read_compel(text: str, at: int, weight: float, pieces: list[Piece], prompt: str, depth: int) -> int:
    """Append the pieces from ``at`` to the end of the text or to a bracket that closes, whose place is returned."""
    if depth > MAX_DEPTH:
        raise ValueError(f"brackets are nested more than {MAX_DEPTH} deep in {prompt[:80]!r}")
    while at < len(text) and text[at] != ")":
        inner: list[Piece] = []
        quoted, word = QUOTED.match(text, at), COMPEL_WORD.match(text, at)
        if text[at] == "(":
            at, operators = read_compel(text, at + 1, 1.0, inner, prompt, depth + 1) + 1, AFTER_GROUP
            if at > len(text):
                raise unbalanced("(", prompt)
        elif quoted:
            inner.extend(compel_pieces(quoted[1].replace('\\"', '"'), prompt, depth + 1))
            at, operators = quoted.end(), AFTER_GROUP
        elif word:
            inner.append(Piece(COMPEL_ESCAPED.sub(r"\1", word[0])))
            at, operators = word.end(), AFTER_WORD
        else:
            pieces.append(Piece(text[at], weight))
            at += 1
            continue
        operator = operators.match(text, at)
        factor = compel_factor(operator["operator"] or operator["explicit"], prompt) if operator else 1.0
        pieces.extend(Piece(piece.text, piece.weight * weight * factor) for piece in inner)
        if operator or operators is AFTER_GROUP:
            pieces.append(Piece(" ", weight))
        at = operator.end() if operator else at
    return at


def compel_factor(operator: str, prompt: str) -> float:
    """The factor of ``++``, ``--`` or a number."""
    bases = {"+": COMPEL_PLUS, "-": COMPEL_MINUS}
    if operator[0] not in bases:
        return to_weight(operator, prompt)
    return to_weight(math.pow(bases[operator[0]], min(len(operator), 1000)), prompt)


def at_commas(text: str, prompt: str) -> list[str]:
    """Split at the commas that are neither quoted nor in brackets."""
    parts, depth, at = [""], 0, 0
    while at < len(text):
        whole = QUOTED.match(text, at) or re.compile(r"\\.").match(text, at)
        token = whole[0] if whole else text[at]
        depth += {"(": 1, ")": -1}.get(token, 0)
        if depth < 0:
            raise unbalanced(")", prompt)
        if token == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
        at += len(token)
    return parts


def unbalanced(bracket: str, prompt: str) -> ValueError:
    """The error for a bracket without its partner."""
    return ValueError(f"a {bracket!r} has no partner in {prompt!r}; a bracket that is text is written \\{bracket}")


# Both

SYNTAXES: Mapping[str, Callable[[str], ParsedPrompt]] = MappingProxyType({"a1111": parse_a1111, "compel": parse_compel})
"""Name of a syntax -> its parser."""


@dataclasses.dataclass(frozen=True)
class Style:
    """How prompts are read.

    Attributes:
      syntax: a name in :data:`SYNTAXES`; None takes the text as it is.
      long: whether a text may have several chunks; if not, what does not fit into one is cut, with a warning.
    """

    syntax: str | None = None
    long: bool = dataclasses.field(default=False, compare=False)  # nothing that is compiled depends on it

    def __post_init__(self) -> None:
        if self.syntax is not None and not (isinstance(self.syntax, str) and self.syntax in SYNTAXES):
            raise ValueError(f"prompt_syntax must be None or one of {', '.join(SYNTAXES)}, got {brief(self.syntax)}")
        if not isinstance(self.long, bool):
            raise TypeError(f"long_prompts must be True or False, got {self.long!r}")

    @property
    def is_plain(self) -> bool:
        """Whether a prompt is a single chunk without weights."""
        return self.syntax is None and not self.long


PLAIN = Style()


def to_weight(given: str | float, prompt: str) -> float:
    """A weight as a number.

    Raises:
      ValueError: it is not one, or not finite, or too large.
    """
    try:
        weight = float(given)
    except ValueError:
        raise ValueError(f"a weight must be a number, got {given!r} in {prompt!r}") from None
    if not abs(weight) <= MAX_WEIGHT:
        raise ValueError(f"a weight must be from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}, got {given} in {prompt!r}")
    return weight


def joined(pieces: Iterable[Piece], prompt: str) -> tuple[Piece, ...]:
    """The pieces with neighbours of one weight joined, and without those that are only whitespace.

    Raises:
      ValueError: a weight is too large.
    """
    found: list[Piece] = []
    for piece in pieces:
        if found and (piece.weight == found[-1].weight or not piece.text.strip()):
            found[-1] = found[-1]._replace(text=found[-1].text + piece.text)
        else:
            found.append(piece)
    for piece in found:
        to_weight(piece.weight, prompt)
    return tuple(piece for piece in found if piece.text.strip())
