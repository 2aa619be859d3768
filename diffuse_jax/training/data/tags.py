"""Captions that are lists of tags: another order, and some tags less, each time."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import numpy as np

from diffuse_jax.bounds import NATURAL, SHARE
from diffuse_jax.training.checks import Checked


@dataclasses.dataclass(frozen=True, kw_only=True)
class TagSettings(Checked):
    """How captions are changed that are lists of tags, such as ``"emoji, cat face, noto style"``.

    Attributes:
      shuffle_tags: put the tags into another order each time.
      tag_dropout: probability of leaving out each tag.
      keep_tags: the number of tags at the beginning that stay where they are.
      tag_separator: what stands between two tags; white space around a tag does not count.

    Raises:
      ValueError: a number is out of range, or the separator is empty or blank.
    """

    shuffle_tags: bool = False
    tag_dropout: Annotated[float, SHARE] = 0.0
    keep_tags: Annotated[int, NATURAL] = 0
    tag_separator: str = ","

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tag_separator.strip():
            raise ValueError(f"--tag_separator must have a character that is not blank, got {self.tag_separator!r}")
        if self.keep_tags and not self.changes:
            raise ValueError(f"--keep_tags {self.keep_tags} has no effect without --shuffle_tags or --tag_dropout")

    @property
    def changes(self) -> bool:
        """Whether captions are changed at all."""
        return self.shuffle_tags or self.tag_dropout > 0

    def arrange(self, caption: str, rng: np.random.Generator) -> str:
        """The caption with its tags as the settings want them this time."""
        tags = [tag.strip() for tag in caption.split(self.tag_separator)]
        first, rest = tags[: self.keep_tags], tags[self.keep_tags :]
        rest = [tag for tag, u in zip(rest, rng.random(len(rest)), strict=True) if u >= self.tag_dropout]
        if self.shuffle_tags:
            rest = [rest[i] for i in rng.permutation(len(rest))]
        bare = self.tag_separator.strip() == self.tag_separator
        return (self.tag_separator + " " * bare).join(first + rest)
