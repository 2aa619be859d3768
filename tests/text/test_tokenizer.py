"""The tokenizer comes from transformers, which says where PyTorch is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diffuse_jax.text.tokenizer import clip_tokenizer
from diffuse_jax.weights import WeightsError
from diffuse_jax.weights.hub import SHIPPED

WITHOUT_TORCH = """
import importlib.util
import sys

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
"""
TOKENIZE = """
from diffuse_jax.text.tokenizer import clip_tokenizer

print(clip_tokenizer(sys.argv[1])("red heart").input_ids)
"""


@pytest.mark.parametrize(("first", "warned"), [("", False), ("import transformers", True)])
def test_nobody_is_told_to_install_pytorch(first: str, warned: bool) -> None:
    code = WITHOUT_TORCH + first + TOKENIZE
    folder = SHIPPED["diffuse-jax/emoji"] / "tokenizer"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("PyTorch was not found" in done.stderr) == warned, "of transformers alone, for as long as it says so"


def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    """transformers opens it, as a tokenizer that turns every prompt into the same ids."""
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    for options in ({}, {"pad_token": "!"}):
        with pytest.raises(WeightsError, match=r"no vocabulary there; expected vocab\.json and merges\.txt"):
            clip_tokenizer(tmp_path, **options)


@pytest.mark.parametrize(("vocab", "merges"), [('{"a": 0,', "#version: 0.2"), ('{"a": 0}', None)])
def test_a_damaged_vocabulary_is_named(vocab: str, merges: str | None, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(vocab)
    if merges is not None:
        (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(WeightsError, match=f"{tmp_path}: no tokenizer of CLIP can be read there"):
        clip_tokenizer(tmp_path)
