"""Parameter names and axis orders: Flax tree <-> PyTorch checkpoint, as tables that work in both directions.

The tree of shapes is the source of truth. The path ``down_blocks_0/attentions_1/to_out_0/kernel`` *is* the checkpoint's
``down_blocks.0.attentions.1.to_out.0.weight``: list indices are joined with ``_``, and the last word decides how axes
are permuted. From the tree to PyTorch is a rule; the way back is the same table inverted, so nothing can be lost.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Path = tuple[str, ...]
Renames = Sequence[tuple[str, str]]
"""``(regular expression, replacement)`` pairs, applied one after another."""

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
"""Last word of a path -> last word of the PyTorch key; other words are the same in both."""

AXES: dict[int, tuple[int, ...]] = {2: (1, 0), 3: (2, 1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}
"""Rank of a PyTorch ``weight`` -> its axes in a Flax ``kernel``'s order: [out, in, *window] -> [*window, in, out]."""

NOT_INDEXED = {"linear_1", "linear_2", "wi_0", "wi_1"}
"""Words that end in a digit in PyTorch too, where the digit is not a list index."""

IGNORED = re.compile(r"(^|\.)position_ids$|^encoder\.embed_tokens\.weight$|^time_proj\.W$")
"""Keys of buffers, which are not parameters, and second names of T5's ``shared.weight`` and of ``time_proj.weight`` of
NCSN++; they may be in a file and are ignored."""

ALIASES: Renames = (
    (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
    (r"^(embeddings|encoder\.layers|final_layer_norm)\.", r"text_model.\1."),
    (r"^time_proj\.W$", "time_proj.weight"),
)
"""PyTorch keys of other releases -> current ones (VAE attention before 2023; transformers 5; Fourier
features, in some files without the current name)."""

VISION_ALIASES: Renames = (
    (r"^(vision_model\.)?(?=(embeddings|encoder\.layers|pre_layrnorm|post_layernorm)\.)", r"\1vision_model."),
)
"""The same for vision encoders, some of whose keys transformers 5 writes like those of text encoders."""

FLAX_ALIASES: Renames = (
    (r"/layers/(\d+)/", r"/layers_\1/"),
    (r"(attentions_\d+)/query/", r"\1/to_q/"),
    (r"(attentions_\d+)/key/", r"\1/to_k/"),
    (r"(attentions_\d+)/value/", r"\1/to_v/"),
    (r"(attentions_\d+)/proj_attn/", r"\1/to_out_0/"),
)
"""Paths in old ``.msgpack`` files -> paths in our trees."""

FLAX_OLD: Renames = (
    (r"/layers_(\d+)/", r"/layers/\1/"),
    (r"(attentions_\d+)/to_q/", r"\1/query/"),
    (r"(attentions_\d+)/to_k/", r"\1/key/"),
    (r"(attentions_\d+)/to_v/", r"\1/value/"),
    (r"(attentions_\d+)/to_out_0/", r"\1/proj_attn/"),
)
"""The inverse of :data:`FLAX_ALIASES`, for files that old Flax releases must be able to open."""


def rename(name: str, table: Renames) -> str:
    """Apply every pair of a table to a name."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def known_name(name: str, wanted: Container[str], tables: Sequence[Renames] = (ALIASES, VISION_ALIASES)) -> str:
    """A checkpoint's name of a parameter as ``wanted`` has it; if no table of aliases helps, the name itself."""
    candidates = (name, *(rename(name, table) for table in tables))
    return next((candidate for candidate in candidates if candidate in wanted), name)


def flatten(tree: Mapping[str, Any], prefix: Path = ()) -> dict[Path, Any]:
    """Nested dicts -> ``{path: leaf}``."""
    flat: dict[Path, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, (*prefix, key)) if isinstance(value, Mapping) else {(*prefix, key): value}
    return flat


def unflatten(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """``{path: leaf}`` -> nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def torch_key(path: Path, renames: Renames = ()) -> str:
    """The checkpoint's key for a path of the tree."""
    words = [word if word in NOT_INDEXED else re.sub(r"_(\d+)$", r".\1", word) for word in path[:-1]]
    return rename(".".join((*words, LEAVES.get(path[-1], path[-1]))), renames)


def torch_keys(paths: Iterable[Path], renames: Renames = ()) -> dict[str, Path]:
    """``{PyTorch key: path}`` for a tree.

    Raises:
      ValueError: two paths have the same key, which is a mistake in the tree or the table.
    """
    table: dict[str, Path] = {}
    for path in paths:
        key = torch_key(path, renames)
        if key in table:
            raise ValueError(f"{'/'.join(path)} and {'/'.join(table[key])} are both {key!r} in PyTorch")
        table[key] = path
    return table


def from_torch(path: Path, array: np.ndarray) -> np.ndarray:
    """A view of a PyTorch tensor with its axes in Flax order."""
    return array.transpose(AXES[array.ndim]) if path[-1] == "kernel" and array.ndim in AXES else array


def to_torch(path: Path, array: np.ndarray) -> np.ndarray:
    """The inverse of :func:`from_torch`."""
    if path[-1] != "kernel" or array.ndim not in AXES:
        return array
    return array.transpose(np.argsort(AXES[array.ndim]))


def torch_tensors(views: Mapping[Path, np.ndarray]) -> dict[str, np.ndarray]:
    """A network's arrays under PyTorch's names and with its axis order, as views."""
    return {key: to_torch(path, views[path]) for key, path in torch_keys(views).items()}
