"""Links that leave a model's folder are refused wherever they would be followed; those of the Hub's cache are not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffuse_jax import weights
from diffuse_jax.convert import convert
from diffuse_jax.images import find_images
from diffuse_jax.limits import refuse_links
from diffuse_jax.models import AutoencoderKL
from diffuse_jax.schedulers import Scheduler
from diffuse_jax.text.tokenizer import clip_tokenizer
from diffuse_jax.training.data.sources import FolderSource
from diffuse_jax.training.latent_model import copy_component
from diffuse_jax.weights import WeightsError
from tests.weights.tiny import NETWORKS, views


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A pipeline of an autoencoder, a scheduler and a tokenizer, with a secret beside it."""
    (tmp_path / "secret.json").write_text('{"_class_name": "DDIMScheduler"}')
    folder = tmp_path / "model"
    params = weights.names.unflatten(views(NETWORKS["vae"], np.random.default_rng(0)))
    NETWORKS["vae"].save_pretrained(folder / "vae", params)
    weights.write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler"})
    weights.write_json(folder / "tokenizer" / "vocab.json", {"a": 0})
    entries: dict[str, tuple[str | None, str | None]] = {
        "vae": ("diffusers", "AutoencoderKL"),
        "scheduler": ("diffusers", "DDIMScheduler"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
    }
    weights.write_index(folder, "StableDiffusionPipeline", entries)
    return folder


OPENED: dict[str, Callable[[Path], object]] = {
    "vae/config.json": lambda model: AutoencoderKL.from_pretrained(model, subfolder="vae"),
    "vae/diffusion_pytorch_model.safetensors": lambda model: AutoencoderKL.from_pretrained(model / "vae"),
    "vae": lambda model: AutoencoderKL.from_pretrained(model, subfolder="vae"),
    "scheduler/scheduler_config.json": lambda model: Scheduler.from_pretrained(model, subfolder="scheduler"),
    "tokenizer/vocab.json": lambda model: clip_tokenizer(model / "tokenizer"),
    "tokenizer": lambda model: convert(model, model.with_name("out")),
    "tokenizer/below/secret.json": lambda model: convert(model, model.with_name("out")),
    "tokenizer/secret.json": lambda model: copy_component(model / "tokenizer", model.with_name("out")),
    "model_index.json": weights.read_index,
}


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("name", OPENED)
def test_a_link_that_leaves_the_folder_is_refused(name: str, absolute: bool, model: Path, tmp_path: Path) -> None:
    path, target = model / name, tmp_path / "elsewhere"
    if path.is_dir():
        path.rename(target)
    else:
        target = tmp_path / "secret.json"
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
    path.symlink_to(target if absolute else os.path.relpath(target, path.parent))
    with pytest.raises(WeightsError, match=rf"{name}: is a link that leaves .* \(to .*{target.name}\)"):
        OPENED[name](model)
    assert not (tmp_path / "out").exists()


def test_links_inside_a_pipeline_are_followed(model: Path) -> None:
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (model / "vae_2").mkdir(exist_ok=True)
        (model / "vae_2" / name).symlink_to(f"../vae/{name}")
    (model / "vae_3").symlink_to("vae")
    for name in ("vae_2", "vae_3"):
        assert AutoencoderKL.from_pretrained(model, subfolder=name)


def test_the_folder_itself_may_be_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    assert AutoencoderKL.from_pretrained(tmp_path / "link", subfolder="vae")


def test_snapshots_lead_to_the_files_of_their_own_repository_only(model: Path, tmp_path: Path) -> None:
    repository, other = tmp_path / "cache" / "models--a--b", tmp_path / "cache" / "models--a--c"
    snapshot = repository / "snapshots" / "0123"
    shutil.copytree(model / "vae", snapshot / "vae")
    shutil.copy(model / "model_index.json", snapshot)
    for blobs in (repository / "blobs", other / "blobs", tmp_path / "blobs"):
        blobs.mkdir(parents=True)
        shutil.copy(model / "vae" / "config.json", blobs / "cafe")
    link = snapshot / "vae" / "config.json"
    for blob, allowed in (
        (repository / "blobs" / "cafe", True),
        (other / "blobs" / "cafe", False),
        (tmp_path / "blobs" / "cafe", False),
        (repository / "refs" / "main", False),
    ):
        link.unlink()
        link.symlink_to(os.path.relpath(blob, link.parent))
        if allowed:
            assert AutoencoderKL.from_pretrained(snapshot, subfolder="vae")
            assert refuse_links(snapshot / "vae")
        else:
            with pytest.raises(WeightsError, match=r"config\.json: is a link that leaves"):
                AutoencoderKL.from_pretrained(snapshot, subfolder="vae")


@pytest.mark.parametrize("name", ["a.png", "below/a.png", "below", "metadata.jsonl"])
def test_folders_of_images_have_no_links_that_leave_them(name: str, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for place in (folder / "below", elsewhere):
        place.mkdir(parents=True)
        Image.new("L", (2, 2)).save(place / "a.png")
    Image.new("L", (2, 2)).save(folder / "a.png")
    (folder / "c.png").symlink_to("a.png")
    (elsewhere / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}')
    shutil.copy(elsewhere / "metadata.jsonl", folder)
    assert len(find_images(folder)[0]) == 3
    assert len(FolderSource(folder)) == 1
    path, target = folder / name, elsewhere / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(elsewhere if name == "below" else elsewhere / target.name)
    for read in (find_images, FolderSource):
        with pytest.raises(ValueError, match=rf"{name}: is a link that leaves .*images"):
            read(folder)


def test_an_image_behind_a_link_to_its_own_folder_stays_inside(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "here").symlink_to(".")
    for place in (tmp_path, folder):
        Image.new("L", (2, 2), 255 if place == folder else 0).save(place / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "here/../a.png", "text": "a"}')
    assert FolderSource(folder)[0].image == str(folder / "a.png")
