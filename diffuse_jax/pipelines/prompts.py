"""Prompts as rows of tokens and weights: chunks of a text encoder's length, however long the prompt is."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffuse_jax.adapters.tokens import expand_words
from diffuse_jax.pipelines.inputs import check_vocabulary, warn_of_cut
from diffuse_jax.pipelines.method import Rows
from diffuse_jax.rounding import power_of_two
from diffuse_jax.text.prompts import SYNTAXES, ParsedPrompt, Piece, Style, parse_plain
from diffuse_jax.text.tokenizer import padded_ids, unpadded_ids

BACKTRACK = 20
"""A chunk ends at a comma if at most so many tokens follow it, as in AUTOMATIC1111."""


class Token(NamedTuple):
    """A token of a prompt. ``group`` numbers the weighted pieces of a text; -1 is outside of all."""

    id: int
    weight: float
    group: int


Chunk = list[Token]


class Encoded(NamedTuple):
    """One prompt for one encoder: its embeddings are ``sum over V of weights * states``, the ``K`` chunks in sequence.

    Attributes:
      ids: int32 ``[V,K,L]``: ``V`` versions of the prompt, which for Compel are masked ones and the empty prompt.
      weights: float32 ``[V,K,L]``.
      mask: bool ``[V,K,L]``, false where a token is masked.
    """

    ids: np.ndarray
    weights: np.ndarray
    mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an encoder takes tokens: a start, the tokens, an end, and padding.

    Attributes:
      tokenizer: a transformers tokenizer.
      length: tokens of a chunk, ``L``, including start and end.
      vocabulary: the encoder's number of token embeddings.
      hide_padding: whether padding is masked.
    """

    tokenizer: Any
    length: int
    vocabulary: int
    hide_padding: bool

    @functools.cached_property
    def empty(self) -> np.ndarray:
        """The ids of the empty prompt, ``[L]``."""
        return padded_ids(self.tokenizer, [""], self.length)[0]

    @functools.cached_property
    def end(self) -> int:
        """The id that ends a text."""
        return unpadded_ids(self.tokenizer, [""])[0][-1]

    def row(self, tokens: Chunk) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Ids, weights, mask and groups of a chunk, each ``[L]``."""
        n = len(tokens)
        ids, weights, groups = self.empty.copy(), np.ones(self.length), np.full(self.length, -1)
        ids[1 : n + 1] = [token.id for token in tokens]
        ids[n + 1] = self.end
        weights[1 : n + 1] = [token.weight for token in tokens]
        groups[1 : n + 1] = [token.group for token in tokens]
        return ids, weights, np.arange(self.length) < (n + 2 if self.hide_padding else self.length), groups

    def rows(self, chunks: Sequence[Chunk]) -> list[np.ndarray]:
        """The arrays of several chunks, each ``[K,L]``."""
        return [np.stack(arrays) for arrays in zip(*map(self.row, chunks), strict=True)]

    def blank(self, versions: int, chunks: int) -> Encoded:
        """Empty chunks without weight."""
        shape = (versions, chunks, self.length)
        ids, _, mask, _ = (np.broadcast_to(array, shape).copy() for array in self.row([]))
        return Encoded(ids, np.zeros(shape, np.float32), mask)


def encoded(prompt: str, layout: Layout, style: Style) -> Encoded:
    """A prompt in the style's syntax, for one encoder.

    Raises:
      ValueError: a weight or a bracket is wrong, or the encoder has no embedding for an id.
    """
    parsed = SYNTAXES[style.syntax](prompt) if style.syntax else parse_plain(prompt)
    texts = [chunks_of(text, layout, long=style.long) for text in parsed.texts]
    found = (compel_versions if style.syntax == "compel" else one_version)(parsed, texts, layout)
    check_vocabulary(found.ids, layout.vocabulary)
    return found


# Chunks


def chunks_of(text: Sequence[Piece], layout: Layout, *, long: bool) -> list[Chunk]:
    """The tokens of a text in chunks, at least one; if not ``long``, one, and the rest is cut with a warning.

    A chunk ends before a word, a learned word or a weighted group that does not fit into it any more, or at a comma
    shortly before. Only what is longer than a whole chunk is cut in two.
    """
    tokenizer, room = layout.tokenizer, layout.length - 2
    units: list[Chunk] = []
    for piece, group in numbered(text):
        words = [[Token(i, piece.weight, group) for i in word] for word in words_of(piece.text, tokenizer)]
        whole = flat(words)
        units += [whole] if group >= 0 and len(whole) <= room else words
    tokens = flat(units)
    if not long:
        warn_of_cut(tokenizer, [token.id for token in tokens], layout.length, " (long_prompts=True keeps it)")
        return [tokens[:room]]
    return packed(units, room, comma=unpadded_ids(tokenizer, [","], add_special_tokens=False)[0][-1])


def numbered(text: Sequence[Piece]) -> list[tuple[Piece, int]]:
    """Each piece with its number among those that have a weight; -1 for those that have none."""
    count, found = 0, []
    for piece in text:
        weighted = piece.weight != 1
        found.append((piece, count if weighted else -1))
        count += weighted
    return found


def words_of(text: str, tokenizer: Any) -> list[list[int]]:
    """The token ids of each word of a text; a learned word has all its rows."""
    (ids,) = unpadded_ids(tokenizer, [expand_words(text, tokenizer)], add_special_tokens=False)
    names, learned = tokenizer.convert_ids_to_tokens(ids), tokenizer.get_added_vocab()
    words: list[list[int]] = []
    first, ended = "", True  # the name of the current word's first token, and whether the word is complete
    for name, token in zip(names, ids, strict=True):
        next_row = first in learned and name == f"{first}_{len(words[-1])}"
        if next_row or not (ended or name in learned):
            words[-1].append(token)
        else:
            words.append([token])
            first = name
        ended = name in learned or name.endswith("</w>")
    return words


def flat(units: Iterable[Chunk]) -> Chunk:
    """The tokens of several units."""
    return [token for unit in units for token in unit]


def packed(units: Sequence[Chunk], room: int, comma: int) -> list[Chunk]:
    """Units of tokens in chunks of at most ``room`` tokens, each in one if it fits."""
    chunks: list[list[Chunk]] = [[]]
    pieces = [unit[at : at + room] for unit in units for at in range(0, len(unit), room)]
    for unit in pieces:
        size = lambda units: sum(map(len, units))
        if size(chunks[-1]) + len(unit) > room:
            last = max((n for n, u in enumerate(chunks[-1], 1) if u[-1].id == comma), default=len(chunks[-1]))
            rest = chunks[-1][last:]
            if size(rest) > BACKTRACK or size(rest) + len(unit) > room:
                last, rest = len(chunks[-1]), []
            chunks[-1] = chunks[-1][:last]
            chunks.append(rest)
        chunks[-1].append(unit)
    return [flat(chunk) for chunk in chunks]


# Versions


def one_version(parsed: ParsedPrompt, texts: Sequence[list[Chunk]], layout: Layout) -> Encoded:
    """Each token with its own weight; the texts follow each other."""
    ids, weights, mask, _ = layout.rows([chunk for text in texts for chunk in text])
    return Encoded(ids[None], weights[None].astype(np.float32), mask[None])


def compel_versions(parsed: ParsedPrompt, texts: Sequence[list[Chunk]], layout: Layout) -> Encoded:
    """Compel's arithmetic as weights of versions of the prompt: whole, empty, and without each of its weighted groups.

    With ``z`` the states of the whole prompt, ``e`` those of the empty one, and ``z_j`` those with group ``j`` masked,
    a token of weight ``w`` becomes ``e + w (y - e)``; ``y`` is the mean of ``z``, with weight 1, and of the ``z_j``
    of groups of weight ``w_j < 1``, with weight ``tan((1 - w_j) pi / 2)``. Groups of a larger weight have a version
    too, of weight 0, so that changing weights does not change shapes.

    The texts of ``.blend()`` are added with their weights ``a``; those of ``.and()`` follow each other, each as
    ``e + a (text - e)``.
    """
    groups = [[piece.weight for piece, group in numbered(text) if group >= 0] for text in parsed.texts]
    counts, chunks = [len(weights) for weights in groups], [len(text) for text in texts]
    if parsed.blend:  # all texts fill the same chunks, so each has versions of its own
        found = layout.blank(1 + len(texts) + sum(counts), max(chunks))
    else:
        found = layout.blank(2 + max(counts), sum(chunks))
    chunk, free = 0, 2
    for k, (text, factor, weights) in enumerate(zip(texts, parsed.weights, groups, strict=True)):
        more = int(parsed.blend and k > 0)
        versions = [free if more else 0, *range(free + more, free + more + len(weights))]
        filled = text + [[] for _ in range(max(chunks) - len(text) if parsed.blend else 0)]
        ids, each, mask, group = layout.rows(filled)
        where = slice(chunk, chunk + len(filled))
        shares = np.array([1.0, *(math.tan((1 - max(w, 1e-5)) * math.pi / 2) if w < 1 else 0.0 for w in weights)])
        for n, (version, share) in enumerate(zip(versions, shares / shares.sum(), strict=True)):
            found.ids[version, where] = ids
            found.mask[version, where] = mask & ((group != n - 1) | (n == 0))
            found.weights[version, where] = factor * share * each
        found.weights[1, where] += factor * (1 - each) + (0 if parsed.blend else 1 - factor)
        if parsed.blend:
            free = versions[-1] + 1 if weights or more else free
        else:
            chunk += len(filled)
    return found


# Rows

FIELDS = {"ids": "ids", "text_weights": "weights", "attention_mask": "mask"}
"""Row -> the field of :class:`Encoded` that it holds, by encoder."""


def rows_of(prompts: Mapping[str, Sequence[str]], layouts: Mapping[str, Layout], style: Style) -> Rows:
    """The rows of prompts, given by encoder as the result is: ``ids`` and, where needed, ``text_weights`` and
    ``attention_mask``, each ``[B,V,K,L]``."""
    needed = {
        "ids": [*layouts],
        "text_weights": [name for name in layouts if style.syntax is not None],
        "attention_mask": [n for n, layout in layouts.items() if layout.hide_padding or style.syntax == "compel"],
    }
    number = len(next(iter(prompts.values())))
    each = []
    for k in range(number):
        found = {name: encoded(prompts[name][k], layout, style) for name, layout in layouts.items()}
        row = {r: {n: getattr(found[n], FIELDS[r])[None] for n in names} for r, names in needed.items() if names}
        each.append(row)
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *aligned(each, layouts))


def aligned(several: Sequence[Rows], layouts: Mapping[str, Layout], chunks: int = 1) -> list[Rows]:
    """Rows of the same names with as many versions and chunks as the largest has, and at least ``chunks``.

    A missing chunk is the empty prompt's. The number of versions is a power of two, so that few shapes are compiled.
    """
    shapes = [array.shape[-3:-1] for rows in several for array in rows["ids"].values()]
    versions, chunks = max(v for v, _ in shapes), max(chunks, *(k for _, k in shapes))
    versions = power_of_two(versions)
    blanks = {name: layout.blank(versions, chunks) for name, layout in layouts.items()}
    for blank in blanks.values():
        blank.weights[0] = 1

    def fill(row: str, name: str, array: np.ndarray) -> np.ndarray:
        blank = getattr(blanks[name], FIELDS[row])
        filled = np.broadcast_to(blank, (*array.shape[:-3], *blank.shape)).copy()
        filled[..., : array.shape[-3], : array.shape[-2], :] = array
        return filled

    return [
        {
            row: {n: fill(row, n, array) for n, array in value.items()} if row in FIELDS else value
            for row, value in rows.items()
        }
        for rows in several
    ]
