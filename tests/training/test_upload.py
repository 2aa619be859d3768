"""What goes to the Hub, with the Hub's client replaced."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import numpy as np
import pytest
from PIL import Image

from diffuse_jax.training.data import cached
from diffuse_jax.training.flags import settings_from
from diffuse_jax.training.interruption import Interrupted
from diffuse_jax.training.settings import UploadSettings
from diffuse_jax.training.upload import push_to_hub
from tests.training.line import arguments, train_line


class Hub:
    """Records what it is asked for."""

    asked: ClassVar[dict[str, Any]] = {}

    def __init__(self, token: str | None) -> None:
        Hub.asked |= {"token": token}

    def create_repo(self, name: str, **options: Any) -> SimpleNamespace:
        Hub.asked |= {"name": name, **options}
        return SimpleNamespace(repo_id=f"somebody/{name}")

    def upload_folder(self, folder_path: Path, ignore_patterns: list[str], **options: Any) -> str:
        files = [str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()]
        kept = huggingface_hub.utils.filter_repo_objects(files, ignore_patterns=ignore_patterns)
        Hub.asked |= {"files": sorted(kept), **options}
        return "https://hub/commit"


def test_the_model_its_images_and_its_flags_are_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    flags = {"max_train_steps": 4, "checkpointing_steps": 2, "validation_steps": 2, "hub_token": "secret"}
    args = arguments("--push_to_hub", output_dir=tmp_path / "my-line", report_to="tensorboard", **flags)
    train_line(args, validate=lambda params: [("a line", Image.new("RGB", (4, 4)))])
    cached(tmp_path / "my-line" / "cache" / "latents", {}, 3, lambda rows: {"moments": np.zeros(len(rows))})
    assert push_to_hub(settings_from(args, UploadSettings), args.output_dir) == "https://hub/commit"
    assert Hub.asked["repo_id"] == "somebody/my-line"
    assert Hub.asked["token"] == "secret"
    expected = ["README.md", "line/params.npz", "log.jsonl", "training.yaml"]
    images = [f"validation/step-{n}/00-a-line.png" for n in (2, 4)]
    assert Hub.asked["files"] == sorted(expected + images)
    assert "](validation/step-4/00-a-line.png)" in (tmp_path / "my-line" / "README.md").read_text()
    assert "secret" not in "".join(p.read_text() for p in (tmp_path / "my-line").glob("*.*") if p.is_file())


def test_a_signal_during_the_upload_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Slow(Hub):
        def upload_folder(self, *_: Any, **options: Any) -> str:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("went on")

    monkeypatch.setattr(huggingface_hub, "HfApi", Slow)
    with pytest.raises(Interrupted) as ended:
        push_to_hub(UploadSettings(push_to_hub=True), tmp_path)
    assert ended.value.code == 143
    said = capfd.readouterr().err
    assert f"uploading {tmp_path} to somebody/{tmp_path.name}" in said
    assert f"SIGTERM received: the upload ends; the trained model is complete in {tmp_path}" in said


def test_a_hub_that_refuses_is_noticed_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(Hub):
        def create_repo(self, name: str, **options: Any) -> SimpleNamespace:
            raise OSError("401 Unauthorized")

    monkeypatch.setattr(huggingface_hub, "HfApi", Closed)
    with pytest.raises(ConnectionError, match=r"no repository 'mine' .*401 Unauthorized.*hf auth login"):
        train_line(arguments("--push_to_hub", output_dir=tmp_path / "mine", max_train_steps=1))
    assert not (tmp_path / "mine").exists()


def test_nothing_is_uploaded_without_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: pytest.fail("asked the Hub"))
    assert push_to_hub(UploadSettings(), tmp_path) is None
