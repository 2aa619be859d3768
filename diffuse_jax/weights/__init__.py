"""Reading, writing and renaming checkpoints: files, names and trees of shapes, independent of any architecture."""

from __future__ import annotations

from diffuse_jax.errors import WeightsError
from diffuse_jax.weights.files import read_json, weight_files, write_json
from diffuse_jax.weights.hub import resolve, resolve_file
from diffuse_jax.weights.index import Component, PipelineIndex, read_index, write_index
from diffuse_jax.weights.load import Checkpoint, check_params, load_params, match, place, read_checkpoint
from diffuse_jax.weights.save import save_params

__all__ = [
    "Checkpoint",
    "Component",
    "PipelineIndex",
    "WeightsError",
    "check_params",
    "load_params",
    "match",
    "place",
    "read_checkpoint",
    "read_index",
    "read_json",
    "resolve",
    "resolve_file",
    "save_params",
    "weight_files",
    "write_index",
    "write_json",
]
