"""New tokens for a text encoder: textual inversion (Gal et al. 2022, arXiv 2208.01618).

A new word stands for one or more rows appended to the token embedding table; everything else is unchanged. The tokens
of a word with several rows are ``<word>``, ``<word>_1``, ``<word>_2`` ..., as in diffusers.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.errors import WeightsError, bad
from diffuse_jax.limits import SURROGATE, absence, check_name, refuse_links
from diffuse_jax.messages import brief
from diffuse_jax.models.base import Params
from diffuse_jax.text.clip import CLIPTextModel
from diffuse_jax.text.tokenizer import stateless, unpadded_ids
from diffuse_jax.weights.copy import compact, refuse_not_finite
from diffuse_jax.weights.safetensors import read_safetensors, write_safetensors
from diffuse_jax.weights.torch_file import read_torch_object
from diffuse_jax.weights.torch_writer import write_torch
from diffuse_jax.writing import expanded

FILE = "learned_embeds.safetensors"

MAX_ROWS = 1000
"""Maximum number of rows of one word; a prompt of Stable Diffusion has 75 tokens."""

TABLE = ("text_model", "embeddings", "token_embedding", "embedding")


def words(token: str, vectors: int) -> list[str]:
    """The token names of a word with ``vectors`` rows."""
    return [token, *(f"{token}_{i}" for i in range(1, vectors))]


def expand_words(prompt: str, tokenizer: Any) -> str:
    """The prompt with every new word of several rows replaced by all of its tokens, unless they are already there.

    The tokenizer locates the words, since it is what finally reads the prompt: among words with a common prefix it
    finds the longest, in upper or lower case.
    """
    known = tokenizer.get_added_vocab()
    several = {word for word in known if f"{word}_1" in known}
    if not several:
        return prompt
    prompt = _composed(prompt, tokenizer)
    found = _occurrences(prompt, tokenizer, known)
    following = [word for word, _, _ in found[1:]] + [""]  # if there are no words, this is one too long
    text, done = "", 0
    for (word, start, stop), after in zip(found, following, strict=False):
        if word in several and after != f"{word}_1":
            rows = next(n for n in range(2, len(known) + 2) if f"{word}_{n}" not in known)
            text += prompt[done:start] + " ".join(words(word, rows))
            text += " " if prompt[stop : stop + 1].isalnum() else ""  # keeps the last token's name from running on
            done = stop
    return text + prompt[done:]


def _composed(prompt: str, tokenizer: Any) -> str:
    """The prompt with letters and their accents as one character each, if the tokenizer reads that as the same.

    It reports places in the prompt as if it did not contain an accent that stands by itself (``e`` and U+0301), so a
    word that ends in one would seem to end before it.
    """
    composed = unicodedata.normalize("NFC", prompt)
    if composed == prompt:
        return prompt
    before, after = unpadded_ids(tokenizer, [prompt, composed], add_special_tokens=False)
    return composed if before == after else prompt


def _occurrences(prompt: str, tokenizer: Any, known: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """The tokens of a prompt in order, each with its start and end, and "" for those that are no new words, which slow
    tokenizers leave out."""
    if not getattr(tokenizer, "is_fast", False):  # only fast tokenizers report offsets
        longest = sorted(known, key=len, reverse=True)
        return [(m[0], m.start(), m.end()) for m in re.finditer("|".join(map(re.escape, longest)), prompt)]
    call = stateless(tokenizer, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    read = call([prompt])
    names = {number: word for word, number in known.items()}  # as they were added; the tokenizer's are in lower case
    found = zip(read["input_ids"][0], read["offset_mapping"][0], strict=True)
    return [(names.get(number, ""), *place) for number, place in found]


def with_words(tokenizer: Any, token: str, vectors: int, setting: str = "placeholder_token") -> Any:
    """A copy of the tokenizer with the words of ``token`` added; ``setting`` is where the word comes from, for errors.

    Raises:
      TypeError: ``token`` is not a string.
      ValueError: ``vectors`` is less than 1, or the tokenizer already knows one of the words, if only in other letters
        (upper and lower case are the same to CLIP's), or cannot read it.
    """
    if not isinstance(token, str):
        raise TypeError(f"the word for new embeddings must be a string, got {brief(token)}")
    if not token.strip() or SURROGATE.search(token):
        raise ValueError(f"the word for new embeddings must be readable text, got {token!r}; choose another")
    if vectors < 1:
        raise ValueError(f"num_vectors must be at least 1, got {vectors}")
    new, known = words(token, vectors), tokenizer.get_vocab()
    for word in new:
        if word in known:
            raise ValueError(f"the tokenizer already knows {word!r}; choose another {setting}")
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens(new)
    before = [*tokenizer.get_added_vocab()]  # of two words that differ in case, either may be read as the other
    expected = unpadded_ids(tokenizer, before, add_special_tokens=False) if before else []
    expected += [[number] for number in extended.convert_tokens_to_ids(new)]
    if unpadded_ids(extended, [*before, *new], add_special_tokens=False) != expected:
        raise ValueError(f"the tokenizer reads {token!r} as another word; choose another {setting}")
    return extended


def token_id(tokenizer: Any, word: str) -> int:
    """The id of a word that is a single token.

    Raises:
      ValueError: the word is several tokens, or none.
    """
    (ids,) = unpadded_ids(tokenizer, [word], add_special_tokens=False)
    if len(ids) != 1:
        pieces = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ids))) or "nothing"
        raise ValueError(
            f"the initializer_token must be a single token, but {word!r} is {pieces}; choose another word with "
            "--initializer_token"
        )
    return int(ids[0])


def with_rows(model: CLIPTextModel, params: Params, rows: jax.Array) -> tuple[CLIPTextModel, Params]:
    """The encoder with ``rows [n,D]`` appended to its embedding table; the other parameters are shared.

    Raises:
      ValueError: the rows do not have the encoder's width.
    """
    if rows.ndim != 2 or rows.shape[1] != model.config.hidden_size:
        raise ValueError(f"new embeddings must be [n,{model.config.hidden_size}] for this encoder, got {rows.shape}")
    config = dataclasses.replace(model.config, vocab_size=model.config.vocab_size + len(rows))
    return model.clone(config=config), _replace_table(params, lambda table: jnp.concatenate([table, rows]))


def table_of(params: Params) -> jax.Array:
    """The token embedding table ``[V,D]``."""
    for word in TABLE:
        params = params[word]
    return params  # type: ignore[return-value]


def combine(base: Params, rows: jax.Array) -> Params:
    """An encoder's parameters with the last rows of its embedding table replaced by ``rows [n,D]``."""
    return _replace_table(base, lambda table: table.at[-len(rows) :].set(rows.astype(table.dtype)))


def _replace_table(params: Params, change: Any) -> Params:
    def walk(node: Any, path: tuple[str, ...]) -> Any:
        return change(node) if not path else {**node, path[0]: walk(node[path[0]], path[1:])}

    return walk(params, TABLE)


def save_rows(file: str | Path, token: str, rows: jax.Array) -> Path:
    """Write ``{token: rows [n,D]}`` for ``load_textual_inversion`` here and in PyTorch diffusers, as safetensors unless
    the file ends in ``.bin``."""
    path, array = expanded(file), np.asarray(jax.device_get(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    write = write_torch if path.suffix == ".bin" else write_safetensors
    write(path, {token: (array.dtype, array.shape)}, iter([array]))
    return path


ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""The tensors of a file for SDXL -> the component that each is for."""

UNNAMED = {*ENCODERS, "emb_params"}
"""Names of tensors that are not the word; the file has the word's name instead, as in AUTOMATIC1111."""


def load_rows(source: str | Path, token: str | None = None) -> tuple[str, np.ndarray]:
    """Read a word and its rows ``[n,D]`` float32 for one text encoder; see :func:`load_word`.

    Raises:
      WeightsError: the file does not exist, or does not hold the embeddings of one word for one encoder.
    """
    word, rows = load_word(source, token)
    if len(rows) != 1:
        raise bad(expanded(source), f"holds embeddings for {len(rows)} text encoders ({', '.join(rows)}); expected one")
    return word, next(iter(rows.values()))


def load_word(source: str | Path, token: str | None = None) -> tuple[str, dict[str, np.ndarray]]:
    """Read a word from a ``.safetensors``, ``.bin`` or ``.pt`` file, or from its folder.

    Files of diffusers (``{word: tensor}``) and of AUTOMATIC1111 (``string_to_param`` and ``name``, or ``emb_params``)
    have rows for one text encoder, those for SDXL (``clip_l`` and ``clip_g``) for two. If a file does not name
    its word, the word is the file's name without its ending.

    Args:
      source: the file, or the folder with ``learned_embeds.safetensors`` or ``learned_embeds.bin``.
      token: the word to use instead of the file's.

    Returns:
      The word, and its rows ``[n,D]`` float32 by tensor: ``clip_l`` and ``clip_g``, or one of any name.

    Raises:
      WeightsError: the file does not exist, or does not hold the embeddings of one word.
    """
    path = expanded(source)
    if path.is_dir():
        names = [FILE, "learned_embeds.bin"]
        path = next((path / name for name in names if (refuse_links(path) / name).is_file()), path / FILE)
    if not path.is_file():
        raise WeightsError(f"{path}: {absence(path)}; expected learned embeddings (.safetensors, .bin, .pt)")
    data: Any = read_safetensors(path) if path.suffix.lower() == ".safetensors" else read_torch_object(path)
    if not isinstance(data, dict):
        raise bad(path, f"holds a {type(data).__name__}; expected a dict with the embeddings of one word")
    name = None
    if "string_to_param" in data:
        name, data = data.get("name"), data["string_to_param"]
        if not isinstance(data, dict):
            raise bad(path, f"string_to_param is a {type(data).__name__}, not a dict with the embeddings of one word")
        data = {name or word: rows for word, rows in data.items()} if len(data) == 1 else data
    if len(data) != 1 and data.keys() != ENCODERS.keys():
        raise bad(path, f"holds {len(data)} tensors; expected the embeddings of one word")
    for word, rows in data.items():
        check_embeddings(path, word, rows)
    found = {word: rows.reshape(-1, rows.shape[-1]) for word, rows in data.items()}
    if len(counts := {len(rows) for rows in found.values()}) > 1:
        raise bad(path, f"clip_l and clip_g have different numbers of rows: {sorted(counts)}")
    (word, *_) = found
    word = path.stem if word in UNNAMED else word
    if token is None and word == Path(FILE).stem:
        raise WeightsError(f"{path}: does not name its word; pass one with token=")
    return token or check_name(path, word), {n: compact(rows, np.dtype(np.float32)) for n, rows in found.items()}


def check_embeddings(path: Path, word: Any, rows: Any) -> None:
    """Check that a file's entry is a name with an array ``[n,D]`` or ``[D]``.

    Raises:
      WeightsError: it is not, has too many rows, or values that are not finite.
    """
    if not isinstance(rows, np.ndarray):
        raise bad(path, f"{word!r} is a {type(rows).__name__}; expected a tensor [n,D] or [D]")
    if not isinstance(word, str):
        raise bad(path, f"the name of its word is {brief(word)}; expected a string")
    if rows.ndim not in (1, 2) or 0 in rows.shape:
        raise bad(path, f"{brief(word)} has shape {list(rows.shape)}; expected [n,D] or [D]")
    if rows.ndim == 2 and len(rows) > MAX_ROWS:
        raise bad(path, f"{brief(word)} has {len(rows)} rows; the maximum is {MAX_ROWS}")
    refuse_not_finite(path, word, rows)
