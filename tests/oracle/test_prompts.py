"""Weighted and long prompts against the formulas of each program, in PyTorch on the encoders of diffusers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from diffuse_jax import pipelines
from diffuse_jax.adapters import tokens
from diffuse_jax.pipelines.parts.text import TOKEN_ROWS
from diffuse_jax.pipelines.running import apply

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
torch, diffusers = folders.torch, folders.diffusers

LENGTH = 16
KINDS = {
    "sd1": (folders.stable_diffusion, "StableDiffusionPipeline"),
    "sdxl": (folders.stable_diffusion_xl, "StableDiffusionXLPipeline"),
}


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Our pipeline and PyTorch's."""
    make, name = KINDS[request.param]
    folder = make(tmp_path_factory.mktemp(request.param) / "model")
    return getattr(pipelines, name).from_pretrained(folder), getattr(diffusers, name).from_pretrained(folder)


def ours(pipe: Any, prompt: Any, **call: Any) -> dict[str, np.ndarray]:
    """The prompt embeddings of a call, ``[B, branches, ...]`` with guidance and ``[B, ...]`` without."""
    request = pipe.request(prompt, seed=0, num_inference_steps=1, **{"guidance_scale": 1.0} | call)
    (part,), names = request.method.conditions, (*TOKEN_ROWS, "embeds_mask")
    rows = {name: value for name, value in request.rows.items() if name in names}
    found = apply(pipe, prepared, part, rows)
    return {name: np.asarray(getattr(value, "values", value)) for name, value in found.items()}


def prepared(part: Any, params: Any, rows: Any) -> Any:
    return {name: part.prepare(params, rows, None)[name] for name in part.adds}


def encoders(twin: Any) -> list[tuple[Any, Any]]:
    names = ["", "_2"] if hasattr(twin, "text_encoder_2") else [""]
    return [(getattr(twin, f"tokenizer{n}"), getattr(twin, f"text_encoder{n}")) for n in names]


def states(twin: Any, text: str, hidden: Sequence[int] = ()) -> list[Any]:
    """``[L,D]`` of a chunk for each encoder, with some positions masked."""
    found = []
    for tokenizer, encoder in encoders(twin):
        ids = tokenizer(text, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
        mask = torch.tensor([[position not in hidden for position in range(LENGTH)]]).long()
        with torch.no_grad():
            out = encoder(ids, attention_mask=mask, output_hidden_states=True)
        found.append((out.hidden_states[-2] if len(encoders(twin)) == 2 else out.last_hidden_state)[0])
    return found


def token_weights(weights: dict[int, float]) -> Any:
    return torch.tensor([weights.get(position, 1.0) for position in range(LENGTH)])[:, None]


def a1111(twin: Any, text: str, weights: dict[int, float]) -> Any:
    found = [z * token_weights(weights) * (z.mean() / (z * token_weights(weights)).mean()) for z in states(twin, text)]
    return torch.cat(found, -1).numpy()


def compel(twin: Any, text: str, weights: dict[int, float], groups: dict[tuple[int, ...], float]) -> Any:
    """Groups are positions with a weight below 1."""
    versions = [(states(twin, text), 1.0)]
    versions += [(states(twin, text, where), math.tan((1 - w) * math.pi / 2)) for where, w in groups.items()]
    total = sum(share for _, share in versions)
    whole = [sum(share / total * z[k] for z, share in versions) for k in range(len(encoders(twin)))]
    return torch.cat([e + token_weights(weights) * (z - e) for z, e in zip(whole, states(twin, ""))], -1).numpy()


def plain(twin: Any, *chunks: str) -> np.ndarray:
    return np.concatenate([torch.cat(states(twin, chunk), -1).numpy() for chunk in chunks])


def test_weights_of_a1111(both: tuple[Any, Any]) -> None:
    pipe, twin = both
    found = ours(pipe, "a (bc:1.5) [d], e", prompt_syntax="a1111")
    np.testing.assert_allclose(found["states"][0], a1111(twin, "a bc d, e", {2: 1.5, 3: 1.5, 4: 1 / 1.1}), atol=2e-5)
    neutral = ours(pipe, "a bc d, e", prompt_syntax="a1111")["states"]
    np.testing.assert_allclose(neutral, ours(pipe, "a bc d, e")["states"], atol=2e-5)
    if "pooled" in found:
        np.testing.assert_allclose(found["pooled"], ours(pipe, "a bc d, e")["pooled"], atol=2e-5)


def test_a_break_starts_a_chunk(both: tuple[Any, Any]) -> None:
    pipe, twin = both
    found = ours(pipe, "a (b:2) BREAK c", prompt_syntax="a1111")["states"][0]
    np.testing.assert_allclose(found, np.concatenate([a1111(twin, "a b", {2: 2.0}), plain(twin, "c")]), atol=2e-5)
    np.testing.assert_allclose(ours(pipe, "a BREAK c")["states"][0], plain(twin, "a BREAK c"), atol=2e-5)


def test_weights_of_compel(both: tuple[Any, Any]) -> None:
    pipe, twin = both
    found = ours(pipe, "a (bc)0.5 d++ e-", prompt_syntax="compel")["states"][0]
    weights = {2: 0.5, 3: 0.5, 4: 1.21, 5: 0.9}
    wanted = compel(twin, "a bc d e", weights, {(2, 3): 0.5, (5,): 0.9})
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert np.abs(found - plain(twin, "a bc d e")).max() > 0.1
    none = ours(pipe, "a (bc)0", prompt_syntax="compel")["states"][0]
    assert np.isfinite(none).all()


def test_several_texts_of_compel(both: tuple[Any, Any]) -> None:
    pipe, twin = both
    parts = [compel(twin, "a b", {2: 1.1}, {}), compel(twin, "c d", {1: 0.8}, {(1,): 0.8})]
    empty = plain(twin, "")
    found = ours(pipe, '("a b+", "(c)0.8 d").and(1, 0.5)', prompt_syntax="compel")["states"][0]
    np.testing.assert_allclose(found, np.concatenate([parts[0], empty + 0.5 * (parts[1] - empty)]), atol=2e-5)
    found = ours(pipe, '("a b+", "(c)0.8 d").blend(3, 1)', prompt_syntax="compel")
    np.testing.assert_allclose(found["states"][0], 0.75 * parts[0] + 0.25 * parts[1], atol=2e-5)
    if "pooled" in found:
        one, half = (ours(pipe, text, prompt_syntax="compel")["pooled"] for text in ("a b+", "(c)0.8 d"))
        np.testing.assert_allclose(found["pooled"], 0.75 * one + 0.25 * half, atol=2e-5)
    found = ours(pipe, '("a", "b").blend(1, 0.5, no_normalize)', prompt_syntax="compel")["states"][0]
    np.testing.assert_allclose(found, plain(twin, "a") + 0.5 * plain(twin, "b"), atol=2e-5)


def test_long_prompts_are_encoded_in_chunks_of_whole_words(both: tuple[Any, Any]) -> None:
    """Letters are tokens here, so a chunk has 14 of them."""
    pipe, twin = both
    found = ours(pipe, ["abcde fghij klmno p", "x"], long_prompts=True, guidance_scale=5.0, negative_prompt="bad")
    wanted = [("bad", ""), ("abcde fghij", "klmno p"), ("bad", ""), ("x", "")]
    flat = found["states"].reshape(4, 2 * LENGTH, -1)
    for states, chunks in zip(flat, wanted):
        np.testing.assert_allclose(states, plain(twin, *chunks), atol=2e-5)
    if "pooled" in found:
        short = ours(pipe, ["abcde fghij", "x"], guidance_scale=5.0, negative_prompt="bad")["pooled"]
        np.testing.assert_allclose(found["pooled"], short, atol=2e-5)
    at_comma = ours(pipe, "abcde, fg hi klmno p", long_prompts=True)["states"][0]
    np.testing.assert_allclose(at_comma, plain(twin, "abcde,", "fg hi klmno p"), atol=2e-5)
    group = ours(pipe, "abcde fg (hi klmno p:1.2)", prompt_syntax="a1111", long_prompts=True)["states"][0]
    wanted_group = a1111(twin, "hi klmno p", dict.fromkeys(range(1, 9), 1.2))
    np.testing.assert_allclose(group, np.concatenate([plain(twin, "abcde fg"), wanted_group]), atol=2e-5)
    word = ours(pipe, "abcdefghijklmnopqr", long_prompts=True)["states"][0]
    assert word.shape == (2 * LENGTH, flat.shape[-1])


def test_the_layers_skipped_are_those_of_the_prompt(both: tuple[Any, Any]) -> None:
    pipe, _ = both
    call = {"guidance_scale": 5.0, "negative_prompt": "bad", "clip_skip": 1}
    found = ours(pipe, "a b", prompt_syntax="a1111", num_images_per_prompt=2, **call)["states"]
    expected = np.repeat(ours(pipe, "a b", **call)["states"], 2, 0)
    # Another batch size rounds differently (1e-6 here), and so does the mean that A1111's syntax restores.
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(expected - np.repeat(ours(pipe, "a b", **call | {"clip_skip": None})["states"], 2, 0)).max() > 0.1


def test_prompts_that_are_cut_give_a_warning(both: tuple[Any, Any]) -> None:
    pipe, twin = both
    for syntax in (None, "a1111", "compel"):
        with pytest.warns(UserWarning, match=r"4 tokens too long \(16 fit\); cut: 'klmn' \(long_prompts=True"):
            found = ours(pipe, "abcdefghijzzzz klmn", prompt_syntax=syntax)["states"][0]
        np.testing.assert_allclose(found[:-1], plain(twin, "abcdefghijzzzz")[:-1], atol=2e-5)


def test_a_learned_word_with_a_weight(both: tuple[Any, Any], tmp_path: Path, rng: np.random.Generator) -> None:
    """One file for both encoders of SDXL, as PyTorch diffusers learns it from one tensor each."""
    pipe, twin = both
    several = len(encoders(twin)) == 2
    rows = {n: torch.tensor(rng.standard_normal((3, 32)), dtype=torch.float32) for n in tokens.ENCODERS}
    save_file(rows if several else {"emb_params": rows["clip_l"]}, tmp_path / "easy.safetensors")
    taught = pipe.load_textual_inversion(tmp_path / "easy.safetensors")
    for tensor, (tokenizer, encoder) in zip(rows.values(), encoders(twin), strict=False):
        if "easy" not in tokenizer.get_vocab():
            twin.load_textual_inversion(tensor, token="easy", tokenizer=tokenizer, text_encoder=encoder)
    found = ours(taught, "a (easy:1.3) b", prompt_syntax="a1111")["states"][0]
    expanded = "a easy easy_1 easy_2 b"
    np.testing.assert_allclose(found, a1111(twin, expanded, dict.fromkeys((2, 3, 4), 1.3)), atol=2e-5)
    found = ours(taught, "a easy++ b", prompt_syntax="compel")["states"][0]
    np.testing.assert_allclose(found, compel(twin, expanded, dict.fromkeys((2, 3, 4), 1.21), {}), atol=2e-5)
    long = ours(taught, "abcdefghijkl easy b", long_prompts=True)["states"][0]
    np.testing.assert_allclose(long, plain(twin, "abcdefghijkl", "easy easy_1 easy_2 b"), atol=2e-5)
    save_file({"emb_params": rows["clip_l"]} if several else rows, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="a word for SDXL has clip_l and clip_g, any other a single tensor"):
        pipe.load_textual_inversion(tmp_path / "other.safetensors")
