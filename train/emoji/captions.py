"""Captions of the emoji set and its division into training and held-out (concept, style) pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]
"""One image: ``label``, ``style``, ``tags``, ``group``, ``subgroup``, ``license``, ``source``, ``hexcode``."""

HELD_OUT_SHARE = 0.1

COMMON_GROUPS = {"smileys & emotion", "animals & nature", "food & drink"}
COMMON_STYLES = {"noto", "twemoji", "fluent", "fluent flat"}


def caption(label: str, style: str) -> str:
    """The main caption of an image, which is also the form of prompts: ``"red apple, noto style"``."""
    return f"{label}, {style} style"


def captions(record: Record) -> list[str]:
    """All captions of one image; training chooses one at random each time, so repetitions act as weights."""
    label, style = record["label"], record["style"]
    tags = [t for t in record["tags"] if t not in label.lower()]
    ends = [", ".join([label, *chosen]) for chosen in (tags[:2], tags[2:4]) if chosen] or [f"{label} emoji"]
    starts = [label, label, f"{article(label)} {label}", f"{label}, {record['group']}", *ends]
    return [caption(start, style) for start in starts] + [label]


def article(noun: str) -> str:
    """ "a" or "an", by the first letter."""
    return "an" if noun[:1].lower() in "aeiou" else "a"


def held_out(records: Sequence[Record]) -> list[bool]:
    """Whether a (concept, style) pair is held out of training: a tenth is, by a hash of the pair, independent of order.

    The pair of a concept with the largest hash always stays in training, so every concept is seen in some style.
    """
    kept = dict(sorted((pair_hash(r), r["label"]) for r in records))
    last = {label: value for value, label in kept.items()}
    return [pair_hash(r) < HELD_OUT_SHARE and pair_hash(r) != last[r["label"]] for r in records]


def is_common(record: Record) -> bool:
    """Whether an image is repeated in training: faces, animals and food with short names, in four styles."""
    short = len(record["label"].split()) <= 2
    return short and record["group"] in COMMON_GROUPS and record["style"] in COMMON_STYLES


def pair_hash(record: Record) -> float:
    """A fixed number in [0, 1) for a (concept, style) pair."""
    digest = hashlib.sha256(f"{record['label']}|{record['style']}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def training_texts(records: Iterable[Record]) -> list[str]:
    """All captions of all records, from which the tokenizer is learned."""
    return [text for record in records for text in captions(record)]
