"""The tokenizer comes from transformers, which says where PyTorch is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
