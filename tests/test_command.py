"""The outermost layer of a command: lack of memory and warnings are one line; ``--debug`` shows the traceback."""

from __future__ import annotations

import os
import subprocess
import sys
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


@pytest.mark.parametrize(
    ("work", "stream"),
    [
        ("print('word')", "stdout"),
        ("print('word ' * 100_000)", "stdout"),
        ("(print('word'), 1 / 0)", "stdout"),
        ("sys.exit('word')", "stderr"),
        ("print('word', file=sys.stderr, flush=True)", "stderr"),
        ("[][0]", "stderr"),
        ("open('/no/file')", "stderr"),
    ],
)
def test_output_that_nobody_reads_ends_a_command_silently(work: str, stream: str) -> None:
    """As the system ends ``yes | head -1``, whether it is noticed at once or only when the rest is written."""
    code = f"import sys; from diffuse_jax.command import run_command; sys.exit(run_command('x', lambda: {work}, []))"
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: writer}
    ended = subprocess.run([sys.executable, "-c", code], **streams, text=True)  # type: ignore[call-overload]
    os.close(writer)
    if stream == "stdout" and "/" not in work:
        assert (ended.returncode, ended.stderr) == (141, "")
    assert ended.returncode != 0
    assert "Exception ignored" not in (ended.stderr or "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("work", ["print('word')", "print('word ' * 100_000)"])
@pytest.mark.parametrize("buffered", [True, False])
def test_a_full_disk_under_the_output_is_named(work: str, buffered: bool) -> None:
    code = f"import sys; from diffuse_jax.command import run_command; sys.exit(run_command('x', lambda: {work}, []))"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        words = [sys.executable, *([] if buffered else ["-u"]), "-c", code]
        ended = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, env=env)
    assert (ended.returncode, ended.stderr) == (1, "x: [Errno 28] No space left on device: 'standard output'\n")


def test_another_broken_pipe_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def to_a_worker() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        try:
            os.write(writer, b"task")
        finally:
            os.close(writer)

    assert run_command("draw", to_a_worker, []) == 1
    assert capsys.readouterr().err == "draw: [Errno 32] Broken pipe\n"
