"""New words: tokenizers, rows of the table, files, and a pipeline that knows them."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffuse_jax.adapters import tokens
from diffuse_jax.weights import WeightsError
from tests.bounds import bounded
from tests.pipelines import tiny


def test_a_new_word_of_several_rows_becomes_tokens_with_the_last_ids() -> None:
    old = tiny.tokenizer()
    new = tokens.with_words(old, "<cat>", 3)
    assert new("x <cat> y")["input_ids"] != old("x <cat> y")["input_ids"]
    assert tokens.expand_words("x <cat> y", new) == "x <cat> <cat>_1 <cat>_2 y"
    ids = new(tokens.expand_words("<cat>", new), add_special_tokens=False)["input_ids"]
    assert ids == [len(old), len(old) + 1, len(old) + 2]
    assert tokens.expand_words("x <cat> y", old) == "x <cat> y", "the tokenizer given is not changed"
    assert tokens.token_id(old, "a") == old("a", add_special_tokens=False)["input_ids"][0]


@pytest.mark.parametrize("order", [("mystyle", "mystylev2"), ("mystylev2", "mystyle")])
@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("mystylev2", ["mystylev2", "mystylev2_1", "mystylev2_2"]),
        ("mystyle", ["mystyle", "mystyle_1"]),
        ("MyStyle", ["mystyle", "mystyle_1"]),
        ("mystylev2 mystyle", ["mystylev2", "mystylev2_1", "mystylev2_2", "mystyle", "mystyle_1"]),
        ("mystyle, mystyle", ["mystyle", "mystyle_1", ",</w>", "mystyle", "mystyle_1"]),
        ("mystyle0", ["mystyle", "mystyle_1", "0</w>"]),
        ("mystyle mystyle_1 x", ["mystyle", "mystyle_1", "x</w>"]),
        ("x", ["x</w>"]),
        ("", []),
    ],
)
def test_of_words_that_begin_alike_the_longest_is_meant(order: tuple[str, str], prompt: str, wanted: list[str]) -> None:
    tokenizer = tiny.tokenizer()
    for word in order:
        tokenizer = tokens.with_words(tokenizer, word, {"mystyle": 2, "mystylev2": 3}[word])
    ids = tokenizer(tokens.expand_words(prompt, tokenizer), add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == wanted


@pytest.mark.parametrize("word", ["EasyNegative", "a\nb", "\u00e9", "two words", "日本"])
def test_all_rows_of_a_word_are_used_however_the_tokenizer_normalises_it(word: str) -> None:
    tokenizer = tokens.with_words(tiny.tokenizer(), word, 3)
    for prompt in (word, word.upper(), word.lower()):
        ids = tokenizer(tokens.expand_words(prompt, tokenizer), add_special_tokens=False)["input_ids"]
        assert ids == list(range(len(tokenizer) - 3, len(tokenizer)))


@pytest.mark.parametrize("word", ["caf\u00e9", "\u00e9t\u00e9", "\u1ed9", "\ud55c\uae00", "\u304c"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("prompt", ["{}", "x {} x", "{}, {}x", "e\u0301{}"])
def test_words_and_prompts_may_have_their_accents_as_characters_of_their_own(word: str, form: str, prompt: str) -> None:
    tokenizer = tokens.with_words(tiny.tokenizer(), unicodedata.normalize(form, word), 3)
    text = prompt.format(*[word] * prompt.count("{}"))
    read = lambda text: tokenizer(tokens.expand_words(text, tokenizer), add_special_tokens=False)["input_ids"]
    composed, apart = (read(unicodedata.normalize(kind, text)) for kind in ("NFC", "NFD"))
    assert composed == apart
    rows = list(range(len(tokenizer) - 3, len(tokenizer)))
    assert [number for number in apart if number in rows] == rows * prompt.count("{}")


def test_the_name_of_the_last_row_does_not_go_on_into_what_follows() -> None:
    tokenizer = tokens.with_words(tiny.tokenizer(), "<a>", 2)
    assert tokens.expand_words("<a>0 <a>, <a>", tokenizer) == "<a> <a>_1 0 <a> <a>_1, <a> <a>_1"


def test_a_tokenizer_that_cannot_say_where_words_are() -> None:
    class Own:
        def get_added_vocab(self) -> dict[str, int]:
            return {"mystyle": 0, "mystyle_1": 1, "mystylev2": 2, "mystylev2_1": 3}

    assert tokens.expand_words("a mystylev2 mystyle", Own()) == "a mystylev2 mystylev2_1 mystyle mystyle_1"
    assert tokens.expand_words("mystyle mystyle_1", Own()) == "mystyle mystyle_1"


def test_impossible_words_are_refused() -> None:
    old = tiny.tokenizer()
    with pytest.raises(ValueError, match="already knows '<cat>'"):
        tokens.with_words(tokens.with_words(old, "<cat>", 1), "<cat>", 1)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        tokens.with_words(old, "<cat>", 0)
    with pytest.raises(ValueError, match="reads 'MyStyle' as another word"):
        tokens.with_words(tokens.with_words(old, "mystyle", 2), "MyStyle", 2)
    for word in ("", " ", "\ud800"):
        with pytest.raises(ValueError, match="must be readable text, got"):
            tokens.with_words(old, word, 2)
    with pytest.raises(TypeError, match=r"must be a string, got \['a'\]"):
        tokens.with_words(old, ["a"], 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="single token, but 'toy' is 't', 'o', 'y</w>'"):
        tokens.token_id(old, "toy")


def test_rows_are_added_and_replaced_without_touching_the_others(rng: np.random.Generator) -> None:
    pipe = tiny.pipeline()
    model, params = pipe.components["text_encoder"], pipe.params["text_encoder"]
    rows = jnp.asarray(rng.standard_normal((2, model.config.hidden_size)), jnp.float32)
    larger, extended = tokens.with_rows(model, params, rows)
    assert larger.config.vocab_size == model.config.vocab_size + 2
    np.testing.assert_array_equal(tokens.table_of(extended)[-2:], rows)
    again = tokens.combine(extended, 2 * rows)
    np.testing.assert_array_equal(tokens.table_of(again)[-2:], 2 * rows)
    np.testing.assert_array_equal(tokens.table_of(again)[:-2], tokens.table_of(params))
    with pytest.raises(ValueError, match="must be \\[n,16\\]"):
        tokens.with_rows(model, params, rows[:, :3])


def test_files_of_several_programs_are_read(tmp_path: Path, rng: np.random.Generator) -> None:
    rows = rng.standard_normal((2, 16)).astype(np.float32)
    file = tokens.save_rows(tmp_path / "ours" / tokens.FILE, "<cat>", jnp.asarray(rows))
    for source in (file, file.parent):
        word, read = tokens.load_rows(source)
        assert word == "<cat>"
        np.testing.assert_array_equal(read, rows)
    save_file({"emb": rows[0]}, tmp_path / "one.safetensors")
    word, read = tokens.load_rows(tmp_path / "one.safetensors", "<dog>")
    assert word == "<dog>"
    assert read.shape == (1, 16)
    save_file({"a": rows, "b": rows}, tmp_path / "two.safetensors")
    with pytest.raises(WeightsError, match="holds 2 tensors"):
        tokens.load_rows(tmp_path / "two.safetensors")
    with pytest.raises(WeightsError, match="no such file"):
        tokens.load_rows(tmp_path / "none.bin")
    save_file({"a": np.full((1, 16), np.nan, np.float16)}, tmp_path / "nan.safetensors")
    with pytest.raises(WeightsError, match="'a' holds NaN or infinity"):
        tokens.load_rows(tmp_path / "nan.safetensors")
    torch = pytest.importorskip("torch")
    several = {"name": "a", "string_to_param": {"*": torch.ones(1, 16), "+": torch.ones(1, 16)}}
    for content, message in [
        ([1, 2], "holds a list"),
        ({"<cat>": "x"}, "'<cat>' is a str; expected a tensor"),
        ({"string_to_param": torch.ones(1, 16)}, "string_to_param is a ndarray, not a dict"),
        (several, "holds 2 tensors"),
    ]:
        torch.save(content, tmp_path / "odd.pt")
        with pytest.raises(WeightsError, match=message):
            tokens.load_rows(tmp_path / "odd.pt")


def test_a_pipeline_that_knows_a_new_word_and_has_lora(tmp_path: Path, rng: np.random.Generator) -> None:
    import jax

    from diffuse_jax.adapters import lora
    from diffuse_jax.adapters.lora_file import save_lora

    pipe = tiny.pipeline()
    options = {"num_inference_steps": 2, "seed": 0, "output_type": "np"}
    row = tokens.table_of(pipe.params["text_encoder"])[tokens.token_id(pipe.components["tokenizer"], "a")]
    tokens.save_rows(tmp_path / tokens.FILE, "<same>", row[None])
    word = pipe.load_textual_inversion(tmp_path)
    plain = pipe("a", **options).images
    np.testing.assert_allclose(word("<same>", **options).images, plain, atol=1e-5)
    with pytest.raises(ValueError, match="already knows '<same>'"):
        word.load_textual_inversion(tmp_path)

    pairs = lora.init(pipe.components["unet"].shapes(), 2, jax.random.key(0))
    pairs = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), pairs)
    save_lora(tmp_path, {"unet": pairs})
    changed = pipe.load_lora_weights(tmp_path, scale=0.5)
    before = pipe.programs.compilations
    assert np.abs(changed("a", **options).images - plain).max() > 1e-3
    back = changed.load_lora_weights(tmp_path, scale=-0.5)
    np.testing.assert_allclose(back("a", **options).images, plain, atol=1e-4)
    assert pipe.programs.compilations == before, "nothing is compiled for other weights"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3_000_000, 1), "has 3000000 rows; the maximum is 1000"),
        ((0, 16), "shape .0, 16."),
        ((2, 0), "shape"),
    ],
)
def test_more_rows_than_a_prompt_holds_are_refused(shape: tuple[int, int], message: str, tmp_path: Path) -> None:
    save_file({"<cat>": np.zeros(shape, np.int8)}, tmp_path / "many.safetensors")
    with (
        bounded(5),
        pytest.raises(WeightsError, match=rf"many\.safetensors: '<cat>' has .*{message.removeprefix('has ')}"),
    ):
        tokens.load_rows(tmp_path / "many.safetensors")


def test_rows_of_another_width_are_refused_before_the_tokenizer_learns_the_word(tmp_path: Path) -> None:
    save_file({"<cat>": np.zeros((2, 5), np.float32)}, tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match=r"narrow.*: embeddings of size 5 do not fit a text encoder of width 16"):
        tiny.pipeline().load_textual_inversion(tmp_path / "narrow.safetensors")
