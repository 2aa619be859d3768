"""Evaluate images by their features: which concept they show, whether they are copies, how close the set is to real.

Arrays in, arrays out; nothing here knows where features come from. Every mean takes weights ``[..., N]`` over the
images, so that a bootstrap is the same formula with the counts of a resample as weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Whitening:
    """Rotation onto the leading principal axes, each scaled to variance one."""

    mean: Array  # [D]
    axes: Array  # [D,n]

    def __call__(self, features: Array) -> Array:
        """float32 ``[N,n]`` of unit length, whose products are cosines."""
        white = (features - self.mean) @ self.axes
        return (white / np.maximum(np.linalg.norm(white, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def fit_whitening(features: Array, components: int) -> Whitening:
    """Whitening by the covariance of ``features [N,D]``.

    Raises:
      ValueError: the features span fewer dimensions than ``components``.
    """
    mean = features.mean(0, dtype=np.float64)
    centred = features - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / len(features))
    values, vectors = values[::-1][:components], vectors[:, ::-1][:, :components]
    if len(values) < components or values[-1] <= 1e-10 * values[0]:
        raise ValueError(f"{len(features)} features of width {features.shape[1]} span fewer than {components} axes")
    return Whitening(mean, vectors / np.sqrt(values))


@dataclasses.dataclass(frozen=True)
class Images:
    """Images to rank: unit features ``[N,n]``, and the concept and style family of each, integers ``[N]``."""

    features: Array
    concepts: Array
    families: Array


def concept_scores(queries: Images, gallery: Images, concepts: int) -> Array:
    """Cosine of each query with the best gallery image of each concept, ``[Q,concepts]``.

    Images of the query's style family are ignored; a concept without other images scores -inf.
    """
    order = np.argsort(gallery.concepts, kind="stable")
    present, first = np.unique(gallery.concepts[order], return_index=True)
    scores = np.full((len(queries.concepts), concepts), -np.inf, np.float32)
    for family in np.unique(queries.families):
        asked = queries.families == family
        cosines = queries.features[asked] @ gallery.features[order].T
        cosines[:, gallery.families[order] == family] = -np.inf
        scores[np.ix_(asked, present)] = np.maximum.reduceat(cosines, first, axis=1)
    return scores


def ranks(scores: Array, concepts: Array) -> Array:
    """Rank of the right concept, 0 for the best, ``[Q]``; concepts with the same score rank before it.

    Raises:
      ValueError: the right concept of a query is not in its gallery.
    """
    right = np.take_along_axis(scores, concepts[:, None], axis=1)
    if np.isneginf(right).any():
        raise ValueError(f"{np.isneginf(right).sum()} queries have no image of their concept in another family")
    return (scores >= right).sum(axis=1) - 1


def nearest_by_cosine(queries: Array, references: Array) -> tuple[Array, Array]:
    """(Index, cosine) of the reference nearest to each query; unit features ``[Q,n]`` and ``[R,n]``."""
    cosines = queries @ references.T
    return cosines.argmax(axis=1), cosines.max(axis=1)


def nearest_by_pixels(queries: Array, references: Array) -> tuple[Array, Array]:
    """(Index, distance) of the reference nearest to each query; uint8 ``[Q,H,W,3]`` and ``[R,H,W,3]``.

    The distance is the root mean squared difference of pixels in [0, 1].
    """
    # White becomes 0, so that the squares that cancel below are small for images that are mostly background.
    q, r = (images.reshape(len(images), -1).astype(np.float32) / 255 - 1 for images in (queries, references))
    squares = np.square(q).sum(1)[:, None] + np.square(r).sum(1) - 2 * q @ r.T
    return squares.argmin(axis=1), np.sqrt(np.maximum(squares.min(axis=1), 0) / q.shape[1])


def polynomial_kernel(x: Array, y: Array) -> Array:
    """(x y / D + 1)^3, the kernel of KID (Binkowski et al. 2018, arXiv:1801.01401, section 4)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distance(reference: Array) -> Callable[[Array, Array], Array]:
    """Unbiased squared maximum mean discrepancy to ``reference [R,D]`` (equation 4 of the same paper).

    Returns:
      A function of features ``[N,D]`` and weights ``[...,N]`` that gives the distances ``[...]``; each is 0 on average
      for samples of the same distribution, so it can be negative. Pairs of an image with itself are left out, even if
      a bootstrap draws it twice.
    """
    kernels = sum(polynomial_kernel(part, reference).sum(dtype=np.float64) for part in np.array_split(reference, 16))
    diagonal = ((np.square(reference).sum(1) / reference.shape[1] + 1) ** 3).sum(dtype=np.float64)
    within = (kernels - diagonal) / (len(reference) * (len(reference) - 1))

    def distance(samples: Array, weights: Array) -> Array:
        pairs = polynomial_kernel(samples, samples).astype(np.float64)
        np.fill_diagonal(pairs, 0)
        across = polynomial_kernel(samples, reference).mean(axis=1, dtype=np.float64)
        total = weights.sum(-1)
        among = (weights @ pairs * weights).sum(-1) / (total**2 - np.square(weights).sum(-1))
        return among + within - 2 * (weights @ across) / total

    return distance


def bootstrap(count: int, draws: int = 1000, seed: int = 0) -> Array:
    """How often each of ``count`` images occurs in each of ``draws`` resamples, ``[draws,count]``."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)


def estimate(statistic: Callable[[Array], Array], count: int) -> dict[str, Any] | None:
    """A statistic of weights ``[...,count]`` and the middle 95 % of its bootstrap; None where it is NaN."""
    value = float(statistic(np.ones(count)))
    if np.isnan(value):
        return None
    return {"value": value, "interval": np.nanquantile(statistic(bootstrap(count)), (0.025, 0.975)).tolist()}


def mean(values: Array) -> Callable[[Array], Array]:
    """The mean of ``values [N]`` as a function of weights."""
    return lambda weights: weights @ values / weights.sum(-1)


def ratio(values: Array, others: Array) -> Callable[[Array], Array]:
    """The mean of ``values [N]`` over that of ``others [N]``, paired, as a function of weights; NaN if that is 0."""

    def statistic(weights: Array) -> Array:
        below = weights @ others
        return np.where(below > 0, weights @ values / np.where(below > 0, below, 1), np.nan)

    return statistic
