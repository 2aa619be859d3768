"""When a process of several decides that it cannot go on; processes that really die are in test_distributed.py."""

from __future__ import annotations

from diffuse_jax.training.watch import SILENCE, Sign, Watch

AT = "host-b"


def test_a_process_that_shows_signs_of_life_is_no_trouble() -> None:
    watch = Watch(0, 2, now=0.0)
    for beat in range(100):
        assert watch.trouble({0: Sign("a", "0"), 1: Sign(AT, str(beat))}, now=beat * SILENCE / 2) is None


def test_one_that_falls_silent_is_named_after_some_time() -> None:
    watch = Watch(0, 3, now=0.0)
    signs = {1: Sign("host-a", "1"), 2: Sign(AT, "7")}
    assert watch.trouble(signs, now=1.0) is None
    signs[1] = Sign("host-a", "2")
    assert watch.trouble(signs, now=SILENCE) is None
    message = watch.trouble(signs | {1: Sign("host-a", "3")}, now=SILENCE + 2)
    assert message == "process 2 of 3 on host-b has not been heard of for 25 s: it has died or is cut off"


def test_one_that_never_shows_up_is_named() -> None:
    message = Watch(0, 2, now=0.0).trouble({}, now=SILENCE + 1)
    assert message is not None
    assert message.startswith("process 1 of 2 has not been heard of")


def test_one_that_is_done_may_be_silent() -> None:
    watch, signs = Watch(1, 2, now=0.0), {0: Sign(AT, "done")}
    assert watch.trouble(signs, now=1.0) is None
    assert watch.trouble(signs, now=100 * SILENCE) is None


def test_one_that_fails_gives_its_reason_at_once() -> None:
    message = Watch(0, 2, now=0.0).trouble({1: Sign(AT, "failed: no space left")}, now=1.0)
    assert message == "process 1 of 2 on host-b failed: no space left"
