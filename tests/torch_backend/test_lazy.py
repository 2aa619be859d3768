"""The package can be imported without torch, and says what is missing when it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from diffuse_jax import torch_backend

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; "
"""The entry of ``sys.modules`` that hides a package."""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_rows_and_flags_need_no_torch() -> None:
    code = "from diffuse_jax.torch_backend import command, compare; import sys; print('torch' in sys.modules)"
    assert run_python(code).stdout.strip() == "False"


def test_a_missing_torch_is_an_error_that_names_the_extra() -> None:
    done = run_python(WITHOUT_TORCH + "from diffuse_jax.torch_backend import from_pretrained")
    assert done.returncode
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: the PyTorch side needs torch, which is not installed; install the extra:"
        ' pip install "diffusejax[torch]"'
    )


def test_the_command_says_so_in_one_line() -> None:
    done = run_python(
        WITHOUT_TORCH + "from diffuse_jax.cli import main; sys.exit(main(['parity', 'diffuse-jax/emoji']))"
    )
    assert done.returncode == 1
    assert done.stderr.startswith("diffuse-jax parity: the PyTorch side needs torch")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", torch_backend.__all__)
def test_public_names_resolve_and_are_documented(name: str) -> None:
    pytest.importorskip("torch")
    assert name in dir(torch_backend)
    assert (getattr(torch_backend, name).__doc__ or "").strip()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'StableDiffusionPipeline'"):
        torch_backend.StableDiffusionPipeline  # noqa: B018
