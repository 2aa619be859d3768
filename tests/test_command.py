"""The outermost layer of a command: lack of memory and warnings are one line; ``--debug`` shows the traceback."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import pytest

from diffuse_jax.command import run_command


def too_large() -> None:
    jax.block_until_ready(jnp.zeros(2**45, jnp.uint8))


def test_a_lack_of_device_memory_is_one_line_that_says_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("draw", too_large, [], smaller="try a smaller --batch-size") == 1
    said = capsys.readouterr().err
    assert said == "draw: out of memory (Out of memory allocating 35184372088832 bytes); try a smaller --batch-size\n"
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        run_command("draw", too_large, ["--debug"])


def test_a_lack_of_host_memory_and_other_faults(capsys: pytest.CaptureFixture[str]) -> None:
    def of_python() -> None:
        bytearray(2**60)

    def other() -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault")

    assert run_command("draw", of_python, [], smaller="try less") == 1
    assert capsys.readouterr().err == "draw: out of memory (MemoryError); try less\n"
    assert run_command("draw", other, []) == 1  # raised here, so on purpose
    assert capsys.readouterr().err == "draw: INTERNAL: a fault\n"


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.showwarning
    assert run_command("draw", lambda: warnings.warn("it is late", stacklevel=1), []) == 0
    assert capsys.readouterr().err == "warning: it is late\n"
    assert warnings.showwarning is before
