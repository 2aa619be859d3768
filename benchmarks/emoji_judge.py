"""Real emoji images, their features, and the measures for comparing other images with them; see
``emoji_retrieval.py``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import mobilenet_v2, retrieval
from benchmarks.common import ROOT

Array = np.ndarray
Row = dict[str, Any]

CACHE = ROOT / ".cache" / "emoji_retrieval"
COMMAND = "python train/emoji/make_dataset.py --output_dir"
FAMILIES = {"blob": "noto", "fluent flat": "fluent", "emojione": "twemoji"}
"""Styles with similar drawings -> a common family; every other style is a family of its own."""

COMPONENTS = 256
COPY_PIXELS, COPY_COSINE = 0.05, 0.9
"""Thresholds of pixel distance and feature cosine to a training image, beyond which an image is a near-copy."""


@dataclasses.dataclass(frozen=True)
class Data:
    """All real images, training pairs first, then held-out ones; a pair's index here is its number."""

    records: list[dict[str, Any]]
    images: Array  # uint8 [N,H,W,3]
    held: Array  # bool [N]

    def caption(self, number: int) -> str:
        """The main caption of a pair, such as "red apple, noto style"."""
        return f"{self.records[number]['label']}, {self.records[number]['style']} style"

    def column(self, key: str) -> Array:
        return np.array([record[key] for record in self.records])

    @cached_property
    def families(self) -> Array:
        return np.array([FAMILIES.get(style, style) for style in self.column("style")])

    @cached_property
    def labels(self) -> Array:
        return np.unique(self.column("label"))

    @cached_property
    def concepts(self) -> Array:
        return np.searchsorted(self.labels, self.column("label"))

    def families_of(self, among: Array) -> list[set[str]]:
        """The families in which each concept has images, among those selected by the mask ``among``."""
        found: list[set[str]] = [set() for _ in self.labels]
        for concept, family in zip(self.concepts[among], self.families[among], strict=True):
            found[concept].add(family)
        return found

    def choose(self, held: bool, count: int, seed: int) -> Array:
        """Numbers of at most ``count`` pairs, in random order, whose concept has an image in another family."""
        families = self.families_of(np.ones(len(self.held), bool))
        judged = np.array([len(families[concept]) > 1 for concept in self.concepts])
        return np.random.default_rng(seed).permutation(np.flatnonzero(judged & (self.held == held)))[:count]

    def without_sister(self, chosen: Array) -> Array:
        """A mask of ``chosen``: pairs whose concept has no training image in the same family."""
        trained = self.families_of(~self.held)
        return np.array([self.families[i] not in trained[self.concepts[i]] for i in chosen], bool)


def load_data(folder: Path) -> Data:
    """Read the data set that ``make_dataset.py`` wrote to ``folder``.

    Raises:
      SystemExit: it does not exist.
    """
    records, images = [], []
    for split in ("train", "heldout"):
        lines = folder / split / "metadata.jsonl"
        if not lines.is_file():
            raise SystemExit(f"{lines} does not exist; make the data with: {COMMAND} {folder}")
        for record in map(json.loads, lines.read_text(encoding="utf-8").splitlines()):
            records.append(record | {"held": split == "heldout"})
            with Image.open(folder / split / record["file_name"]) as image:
                images.append(np.asarray(image.convert("RGB")))
    return Data(records, np.stack(images), np.array([record["held"] for record in records]))


def real_features(images: Array, params: mobilenet_v2.Params) -> Array:
    """Features of the real images, cached in a file whose name is a hash of the images, the network and its code."""
    digest = hashlib.sha256(images.tobytes() + mobilenet_v2.SHA256.encode())
    digest.update(Path(mobilenet_v2.__file__).read_bytes())
    file = CACHE / f"features-{digest.hexdigest()[:16]}.npy"
    if not file.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part.npy")
        np.save(part, mobilenet_v2.features(params, images))
        part.rename(file)
    return np.load(file)


class Judge:
    """Real images and their features, for comparison with other images that have the same captions."""

    def __init__(self, data: Data, features: Array, components: int = COMPONENTS) -> None:
        self.data, self.features = data, features
        self.whiten = retrieval.fit_whitening(features[~data.held], components)
        self.families = np.unique(data.families, return_inverse=True)[1]
        self.real = retrieval.Images(self.whiten(features), data.concepts, self.families)
        group_of = dict(zip(data.concepts, data.column("group"), strict=True))
        self.groups = np.array([group_of[concept] for concept in range(len(data.labels))])
        self.distance = retrieval.kernel_distance(features[~data.held])

    def hits(self, features: Array, chosen: Array) -> dict[str, Array]:
        """Whether each image of the pairs ``chosen`` is a hit, by measure."""
        queries = retrieval.Images(self.whiten(features), self.data.concepts[chosen], self.families[chosen])
        scores = retrieval.concept_scores(queries, self.real, len(self.data.labels))
        places = retrieval.ranks(scores, queries.concepts)
        same_group = self.groups[scores.argmax(axis=1)] == self.groups[queries.concepts]
        return {"R@1": places < 1.0, "R@5": places < 5.0, "group": same_group}

    def chance(self, chosen: Array) -> dict[str, float]:
        """Expected hits if the concepts of each gallery are ranked at random."""
        found: list[tuple[float, float, float]] = []
        for family, concept in zip(self.families[chosen], self.data.concepts[chosen], strict=True):
            present = self._galleries[family]
            same = (self.groups[present] == self.groups[concept]).mean()
            found.append((1 / len(present), min(1.0, 5 / len(present)), same))
        return dict(zip(("R@1", "R@5", "group"), np.mean(found, axis=0).tolist(), strict=True))

    @cached_property
    def _galleries(self) -> list[Array]:
        """The concepts in the gallery for the queries of each family."""
        families = range(self.families.max() + 1)
        return [np.unique(self.data.concepts[self.families != family]) for family in families]

    def copies(self, images: Array, features: Array, chosen: Array) -> Row:
        """Distances to the nearest training images, fractions of near-copies, and MobileNetV2-KID."""
        train = np.flatnonzero(~self.data.held)
        by_cosine, cosine = retrieval.nearest_by_cosine(self.whiten(features), self.real.features[train])
        _, pixels = retrieval.nearest_by_pixels(images, self.data.images[train])
        own = None if self.data.held[chosen].any() else float((train[by_cosine] == chosen).mean())
        return {
            "pixel_distance_median": float(np.median(pixels)),
            "near_copies_by_pixels": float((pixels < COPY_PIXELS).mean()),
            "cosine_median": float(np.median(cosine)),
            "near_copies_by_features": float((cosine > COPY_COSINE).mean()),
            "own": own,
            "MobileNetV2-KID": retrieval.estimate(lambda weights: self.distance(features, weights), len(features)),
        }
