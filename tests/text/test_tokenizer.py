"""The tokenizer comes from transformers, which says where PyTorch is missing."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from diffuse_jax.pipelines.inputs import tokenize
from diffuse_jax.text.tokenizer import clip_tokenizer, open_tokenizer, padded_ids, unpadded_ids
from diffuse_jax.training.families import Words
from diffuse_jax.weights import WeightsError
from diffuse_jax.weights.hub import SHIPPED
from tests.pipelines import tiny

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


@pytest.mark.parametrize(
    ("first", "warned"), [pytest.param("", False, marks=pytest.mark.slow), ("import transformers", True)]
)
def test_no_message_asks_to_install_pytorch(first: str, warned: bool) -> None:
    code = WITHOUT_TORCH + first + TOKENIZE
    folder = SHIPPED["diffuse-jax/emoji"] / "tokenizer"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("PyTorch was not found" in done.stderr) == warned, "of transformers alone, for as long as it says so"


def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    """transformers opens it, as a tokenizer that turns every prompt into the same ids."""
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    for options in ({}, {"pad_token": "!"}):
        with pytest.raises(WeightsError, match=r"no vocabulary; expected vocab\.json and merges\.txt"):
            clip_tokenizer(tmp_path, **options)


def test_the_tokenizer_of_xlm_roberta(tmp_path: Path) -> None:
    """Under either name, from the files that transformers writes; without a vocabulary it is refused."""
    words = [*((word, 0.0) for word in ("<s>", "<pad>", "</s>", "<unk>")), ("▁", -2.0), ("a", -3.0), ("é", -3.0)]
    whole = transformers.XLMRobertaTokenizer(vocab=[*words, ("<mask>", 0.0)])
    whole.save_pretrained(tmp_path / "whole")
    for name in ("XLMRobertaTokenizer", "XLMRobertaTokenizerFast"):
        opened = open_tokenizer(name, tmp_path / "whole")
        np.testing.assert_array_equal(padded_ids(opened, ["aé"], 8), [[0, 4, 5, 6, 2, 1, 1, 1]])
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    with pytest.raises(WeightsError, match=r"no vocabulary; expected sentencepiece\.bpe\.model, or tokenizer\.json"):
        open_tokenizer("XLMRobertaTokenizer", tmp_path)


@pytest.mark.parametrize(("vocab", "merges"), [('{"a": 0,', "#version: 0.2"), ('{"a": 0}', None)])
def test_a_damaged_vocabulary_is_named(vocab: str, merges: str | None, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(vocab)
    if merges is not None:
        (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(WeightsError, match=f"{tmp_path}: cannot read a CLIP tokenizer"):
        clip_tokenizer(tmp_path)


def _state(tokenizer: Any) -> str:
    """All that a tokenizer holds, padding and truncation with it."""
    return tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize("before", [{}, {"padding": "max_length", "truncation": True, "max_length": 5}])
def test_ids_are_those_of_transformers_and_nothing_is_switched(before: dict[str, Any]) -> None:
    tokenizer, prompts = tiny.tokenizer(), ["a", "a b c", "a" * 40]
    theirs = tiny.tokenizer()
    tokenizer(prompts, **before)
    state = _state(tokenizer)
    wanted = theirs(prompts, padding="max_length", truncation=True, max_length=12)["input_ids"]
    np.testing.assert_array_equal(padded_ids(tokenizer, prompts, 12), wanted)
    assert _state(tokenizer) == state
    assert unpadded_ids(tokenizer, prompts) == theirs(prompts, verbose=False)["input_ids"]
    assert _state(tokenizer) == state


def test_a_tokenizer_that_its_owner_changes_is_followed() -> None:
    tokenizer = tiny.tokenizer()
    assert padded_ids(tokenizer, ["a"], 5)[0, -1] == tokenizer.eos_token_id
    tokenizer.pad_token = "!"
    assert padded_ids(tokenizer, ["a"], 5)[0, -1] == tokenizer.convert_tokens_to_ids("!")
    tokenizer.add_tokens(["<cat>"])
    assert tokenizer.convert_tokens_to_ids("<cat>") in padded_ids(tokenizer, ["<cat>"], 5)


@pytest.mark.filterwarnings("ignore:the prompt is")
def test_eight_threads_get_the_same_ids_as_one() -> None:
    """Requests, data workers, a validation and direct calls, of several lengths, on one tokenizer."""
    tokenizer = tiny.tokenizer()

    def call(k: int) -> list[int]:
        text = "a " * (k % 23)
        if k % 4 == 0:
            return tokenize(tokenizer, [text], 32, len(tokenizer))[0].tolist()
        if k % 4 == 1:
            return Words(tokenizer, 7).ids(text).tolist()
        if k % 4 == 2:
            return unpadded_ids(tokenizer, [text])[0]
        tokenizer(text, padding="max_length", truncation=True, max_length=5 + k % 3)  # what it gives is not ours
        return []

    one_by_one = [call(k) for k in range(1000)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(call, range(1000))) == one_by_one


def test_a_tokenizer_copies_and_pickles_before_and_after_calls() -> None:
    tokenizer = tiny.tokenizer()
    for _ in range(2):
        for twin in (copy.copy(tokenizer), copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
            np.testing.assert_array_equal(padded_ids(twin, ["a b"], 9), padded_ids(tokenizer, ["a b"], 9))


def test_a_custom_tokenizer_is_called_as_it_is() -> None:
    def own(prompts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[len(p)] * options.get("max_length", 2) for p in prompts]}

    assert padded_ids(own, ["abc"], 4).tolist() == [[3] * 4]
    assert unpadded_ids(own, ["abc"]) == [[3, 3]]
