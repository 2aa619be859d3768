"""Patterns of PEFT's settings: equal to regular expressions where they are harmless, bounded where they are not."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffuse_jax.layouts.patterns import matches
from tests.bounds import bounded

NAMES = ["down_blocks.0.attn1.to_q", "up_blocks.1.attn2.to_out.0", "to_q", "x.to_k", "attn1_to_q", ""]
PATTERNS = [
    *(
        "to_q",
        "attn1.to_q",
        r"attn\d.to_[a-z]+(.0)?",
        r".*to_(q|k)",
        r"^to_q$",
        "^x",
        "(?:a|down).*q",
        "q",
        r"attn1\.to_q",
    ),
    *(r"[^.]+", "(x?)*", "(a*)*b|to_q", r"\w+", "", "to_out.0", r"(down|up)_blocks.[01].attn[12].to_.*", "()"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_means_what_its_regular_expression_means(pattern: str) -> None:
    for name in NAMES:
        assert matches(pattern, name) == bool(re.fullmatch(rf"(.*\.)?({pattern})", name)), name


@given(
    pattern=st.lists(
        st.sampled_from(["a", "b", ".", r"\.", r"\w", "[ab]", "a*", "b+", "a?", "(a|b)", "(ab)*"]), max_size=6
    ),
    name=st.text("ab.", max_size=8),
)
def test_any_pattern_means_what_its_regular_expression_means(pattern: list[str], name: str) -> None:
    text = "".join(pattern)
    assert matches(text, name) == bool(re.fullmatch(rf"(.*\.)?({text})", name))


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(a|a)*b", "(a?){0}".replace("{0}", "") * 40 + "b", "(((a*)*)*)*b", "a*" * 200]
)
def test_patterns_that_hang_elsewhere_finish(pattern: str) -> None:
    with bounded():
        found, refused = False, "more than 2000 steps"
        try:
            found = matches(pattern, "a" * 60 + "c")
        except ValueError as error:
            refused = str(error)
        assert not found
        assert "more than 2000 steps" in refused


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "not closed"),
        (")", "no meaning"),
        ("*a", "no meaning"),
        ("a{2}", "no meaning"),
        (r"\1", "no meaning"),
        ("(?P<a>b)", "no meaning"),
        ("[z-a]", "not a valid character class"),
        ("(" * 50 + ")" * 50, "nested more than 8"),
        ("a|" * 300, "600 characters"),
    ],
)
def test_other_expressions_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matches(pattern, "a")
