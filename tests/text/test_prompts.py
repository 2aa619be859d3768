"""The syntaxes of weighted prompts, parsed into pieces of text with weights."""

from __future__ import annotations

import pytest

from diffuse_jax.text.prompts import ParsedPrompt, Style, parse_a1111, parse_compel


def pieces(parsed: ParsedPrompt) -> list[list[tuple[str, float]]]:
    return [[(" ".join(text.split()), round(weight, 4)) for text, weight in part] for part in parsed.texts]


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an", 1.0), ("important", 1.1), ("word", 1.0)]),
        ("(abc:3.12) [x]", [("abc", 3.12), ("x", 0.9091)]),
        (r"\(literal\] \\ \x", [(r"(literal] \ \x", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("un)balanced]", [("un)balanced]", 1.0)]),
        ("((a) b [c", [("a", 1.21), ("b", 1.1), ("c", 1.0)]),
        ("(a [b) c]", [("a", 1.1), ("b", 1.0), ("c", 0.9091)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [("a", 1.0), ("house", 1.573), ("on", 1.0), ("a", 1.1), ("hill", 0.55), (", sun,", 1.1)]
            + [("sky", 1.4641), (".", 1.1)],
        ),
        ("ratio 3:4, (a:b)", [("ratio 3:4,", 1.0), ("a:b", 1.1)]),
        ("a:1.2)", [("a:1.2)", 1.0)]),
        ("(a:-0.5)", [("a", -0.5)]),
        ("", []),
        ("()", []),
        ("a++ \\", [("a++ \\", 1.0)]),
    ],
)
def test_a1111(prompt: str, wanted: list[tuple[str, float]]) -> None:
    parsed = parse_a1111(prompt)
    assert pieces(parsed) == [wanted]
    assert parsed.weights == (1.0,)


def test_a_break_separates_texts_in_brackets_too() -> None:
    assert pieces(parse_a1111("a BREAK b  BREAK")) == [[("a", 1.0)], [("b", 1.0)]]
    assert pieces(parse_a1111("BREAK a BREAKER break")) == [[], [("a BREAKER break", 1.0)]]
    assert pieces(parse_a1111("(a BREAK b:1.5) c")) == [[("a", 1.5)], [("b", 1.5), ("c", 1.0)]]
    assert parse_a1111("a BREAK BREAK b").weights == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a cat++ b-", [("a", 1.0), ("cat", 1.21), ("b", 0.9)]),
        ("a+ b+ (c d)1.1", [("a b c d", 1.1)]),
        ("(a (b)1.5 c)0.5", [("a", 0.5), ("b", 0.75), ("c", 0.5)]),
        ('"a b"+ "c"', [("a b", 1.1), ("c", 1.0)]),
        ("C++ x-ray T-shirt-, 1+1 - b", [("C", 1.21), ("x-ray", 1.0), ("T-shirt", 0.9), (", 1+1 - b", 1.0)]),
        (r"\(a\)+ \"b\" c\+", [("(a)", 1.1), ('"b" c+', 1.0)]),
        ("(a, b. c)1.2, d", [("a, b. c", 1.2), (", d", 1.0)]),
        ('a 5" screen', [('a 5" screen', 1.0)]),
        ("word++more", [("word", 1.21), ("more", 1.0)]),
        ("a.attend(1.5) (b).attend(--)", [("a", 1.5), ("b", 0.81)]),
        ("--ar 16:9 <s1>+", [("--ar 16:9", 1.0), ("<s1>", 1.1)]),
        ("( )++ ()", []),
    ],
)
def test_compel(prompt: str, wanted: list[tuple[str, float]]) -> None:
    parsed = parse_compel(prompt)
    assert pieces(parsed) == [wanted]
    assert (parsed.weights, parsed.blend) == ((1.0,), False)


def test_compel_of_several_texts() -> None:
    parsed = parse_compel(' ("a, (b)++", c, (d e)).and(1, 0.5, 2) ')
    assert pieces(parsed) == [[("a,", 1.0), ("b", 1.21)], [("c", 1.0)], [("d e", 1.0)]]
    assert (parsed.weights, parsed.blend) == ((1.0, 0.5, 2.0), False)
    assert parse_compel('("a", "b").and()').weights == (1.0, 1.0)
    assert parse_compel('("a", "b").blend(1, 3)') == ParsedPrompt(
        parse_compel('("a", "b").and()').texts, (0.25, 0.75), True
    )
    assert parse_compel('("a", "b").blend(1, -3, no_normalize)').weights == (1.0, -3.0)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("(a b", r"a '\(' has no partner in '\(a b'; a bracket that is text is written \\\("),
        ("a :)", r"a '\)' has no partner"),
        ('("a) b", c).and()', "has no partner"),
        ('("a") x ("b").and()', "has no partner"),
        ('x ("a", "b").and()', "must be the whole prompt"),
        ('("a", "b").and() x', "must be the whole prompt"),
        ('("a", "b").blend(0.7)', r"\.blend\(\) has 1 weights for 2 texts"),
        ('("a", "b").and(1, x)', "a weight must be a number, got 'x'"),
        ('("a", "b").and(1, nan)', "from -1000 to 1000, got nan"),
        ('("a", "b").blend(1, -1)', "add up to 0"),
        ("(a)99999", "from -1000 to 1000, got 99999"),
        ("a" + "+" * 200, "from -1000 to 1000"),
        ("a.attend(1.2.3)", "a weight must be a number, got '1.2.3'"),
        ("cat.swap(dog)", r"there is no \.swap\(\)"),
        ("a withLora(x, 1)", "load_lora_weights"),
        ("(" * 3000 + "a" + ")" * 3000, "nested more than 100 deep"),
    ],
)
def test_what_compel_cannot_mean_is_refused(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_compel(prompt)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("(a:1.2.3)", "a weight must be a number, got '1.2.3'"),
        ("(a:nan)", "from -1000 to 1000, got nan"),
        ("(a: -inf )", "got -inf"),
        ("(a:1e9)", "from -1000 to 1000, got 1e9"),
        ("(" * 100 + "a", "from -1000 to 1000"),
    ],
)
def test_weights_that_a1111_cannot_have_are_refused(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_a1111(prompt)


def test_a_style_is_checked() -> None:
    with pytest.raises(ValueError, match="prompt_syntax must be None or one of a1111, compel, got 'comfy'"):
        Style("comfy")
    with pytest.raises(TypeError, match="long_prompts must be True or False, got 'yes'"):
        Style(long="yes")  # type: ignore[arg-type]
    assert Style(long=True) == Style(), "a program does not depend on it"
