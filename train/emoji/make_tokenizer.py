"""Learn a small byte-pair tokenizer with CLIP's layout from the captions of an image folder.

Writes ``vocab.json``, ``merges.txt`` and ``tokenizer_config.json``, which transformers' ``CLIPTokenizer`` opens: 256
byte symbols, the same with ``</w>`` (end of word), the learned merges, ``<|startoftext|>`` and ``<|endoftext|>``
(Sennrich et al. 2016; Radford et al. 2021). Example:

    python train/emoji/make_tokenizer.py --train_data_dir runs/emoji/data/train --output_dir runs/emoji/start/tokenizer
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path

from diffuse_jax.bounds import COUNT, number
from diffuse_jax.writing import path_text

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+|_+", re.IGNORECASE)
"""How CLIP cuts text before merging: contractions, runs of letters, single digits, runs of anything else."""

Word = tuple[str, ...]
Pair = tuple[str, str]


def main() -> None:
    args = parse_args()
    lines = (Path(args.train_data_dir) / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [text for line in lines for text in json.loads(line)["text"]]
    merges = learn_merges(texts, args.vocab_size - 2 * 256 - 2)
    folder = write_tokenizer(Path(args.output_dir), merges, args.model_max_length)
    print(f"{folder}: {len(merges)} merges from {len(texts)} captions")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--train_data_dir",
        type=path_text,
        required=True,
        help="image folder whose metadata.jsonl has lists of captions",
    )
    parser.add_argument("--output_dir", type=path_text, required=True, help="folder to write")
    parser.add_argument(
        "--vocab_size", type=number(COUNT), default=1800, help="number of symbols, at least 514 (default 1800)"
    )
    parser.add_argument(
        "--model_max_length",
        type=number(COUNT),
        default=24,
        help="number of tokens, including start and end (default 24)",
    )
    args = parser.parse_args()
    if args.vocab_size < 514:
        parser.error(f"--vocab_size {args.vocab_size}: the bytes and the two special symbols alone are 514")
    return args


def byte_symbols() -> dict[int, str]:
    """Byte -> one printable character, in the order of CLIP's vocabulary: itself where visible, others from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def learn_merges(texts: Iterable[str], count: int) -> list[Pair]:
    """The ``count`` most frequent merges, found greedily; ties go to the pair that sorts first."""
    table = byte_symbols()
    words: collections.Counter[Word] = collections.Counter()
    for word in (match for text in texts for match in WORDS.findall(text.lower())):
        symbols = [table[byte] for byte in word.encode()]
        words[(*symbols[:-1], symbols[-1] + "</w>")] += 1
    merges: list[Pair] = []
    while len(merges) < count:
        pairs: collections.Counter[Pair] = collections.Counter()
        for word, times in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += times
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = collections.Counter({merge(word, best): times for word, times in words.items()})
    return merges


def merge(word: Word, pair: Pair) -> Word:
    """``word`` with every occurrence of ``pair`` merged into one symbol, from the left."""
    result, i = [], 0
    while i < len(word):
        step = 2 if word[i : i + 2] == pair else 1
        result.append("".join(word[i : i + step]))
        i += step
    return tuple(result)


def write_tokenizer(folder: Path, merges: list[Pair], max_length: int) -> Path:
    """Write the three files and return their folder."""
    symbols = list(byte_symbols().values())
    vocabulary = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges), START, END]
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "add_prefix_space": False,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
        "model_max_length": max_length,
    }
    folder.mkdir(parents=True, exist_ok=True)
    ids = {symbol: i for i, symbol in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    main()
