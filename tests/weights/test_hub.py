"""Finding models: local folders, the Hub's cache without a network, and a stand-in Hub that misbehaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffuse_jax.models import AutoencoderKL
from diffuse_jax.weights import WeightsError, names, resolve, resolve_file, save_params
from diffuse_jax.weights.files import weight_files
from diffuse_jax.weights.hub import needed_files
from tests.conftest import ROOT
from tests.weights.hub_server import SHA, Hub, hub
from tests.weights.tiny import NETWORKS, same_bits, views

MODEL = NETWORKS["vae"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a repository: two networks, one in shards, and much that nobody needs."""
    folder = tmp_path_factory.mktemp("repository")
    params = names.unflatten(views(MODEL, np.random.default_rng(0)))
    MODEL.save_pretrained(folder / "vae", params)
    save_params(folder / "vae", params, variant="fp16", dtype="float16")
    MODEL.save_pretrained(folder / "big", params, max_shard_size="300KB")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    extra = (
        "vae/diffusion_pytorch_model.bin",
        "model.ckpt",
        "safety_checker/model.safetensors",
        "README.md",
        "a/b/c.json",
    )
    files |= dict.fromkeys(extra, b"nobody reads this")
    return files | {"model_index.json": b'{"_class_name": "StableDiffusionPipeline"}', "tokenizer/vocab.json": b"{}"}


def put_into_cache(cache: Path, repo: str, files: dict[str, bytes]) -> None:
    """huggingface_hub's own layout: blobs, links in a snapshot, and a reference."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(SHA)
    for i, (name, data) in enumerate(files.items()):
        (root / "blobs" / f"{i:040x}").write_bytes(data)
        link = root / "snapshots" / SHA / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(root / "blobs" / f"{i:040x}", link.parent))


def test_a_model_in_the_cache_opens_without_a_network(tmp_path: Path, pipeline: dict[str, bytes]) -> None:
    put_into_cache(tmp_path, "some/model", pipeline)
    options: dict[str, Any] = {"local_files_only": True, "cache_dir": tmp_path}
    for revision in (None, "main", SHA):
        assert resolve("some/model", revision=revision, **options).name == SHA
    _, params = AutoencoderKL.from_pretrained("some/model", subfolder="vae", **options)
    expected = views(MODEL, np.random.default_rng(0))
    assert all(same_bits(leaf, expected[path]) for path, leaf in names.flatten(params).items())
    with pytest.raises(WeightsError, match=r"some/model \(revision v2\): not in the local cache.*local_files_only"):
        resolve("some/model", revision="v2", **options)
    with pytest.raises(WeightsError, match="other/model: not in the local cache"):
        resolve("other/model", **options)
    with pytest.raises(WeightsError, match="some/model: has no folder 'unet'"):
        resolve("some/model", subfolder="unet", **options)


def test_local_folders_and_names_that_are_neither(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    assert resolve(tmp_path, subfolder="vae") == tmp_path / "vae"
    with pytest.raises(WeightsError, match="no such folder, and not a Hub id"):
        resolve(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(WeightsError, match=r"has no folder 'unet'"):
        resolve(tmp_path, subfolder="unet")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(WeightsError, match="is a file, but a model folder is needed; open single-file checkpoints"):
        resolve(tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="model.ckpt: no such file"):
        resolve("model.ckpt")
    for escape in ("../vae", "/etc", "vae/../.."):
        with pytest.raises(WeightsError, match="is not a plain path inside the model"):
            resolve(tmp_path / "vae", subfolder=escape)


def test_a_mistyped_path_is_answered_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "sd-turbo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for source in ("models/sd-trubo", "./models/sd-trubo", tmp_path / "models" / "sd-trubo"):
        with pytest.raises(WeightsError, match=r"no such folder.*did you mean the folder .*models/sd-turbo\?"):
            resolve(source, local_files_only=True)
    with pytest.raises(WeightsError, match=r"no such folder; the folder models has sd-turbo"):
        resolve("models/elsewhere", local_files_only=True)
    with pytest.raises(WeightsError, match=r"there is no folder .*nowhere either"):
        resolve(tmp_path / "nowhere" / "model")


def test_a_precision_is_a_variant_and_not_a_revision(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no revisions; pass variant='fp16' \(--variant fp16\)"):
        resolve(tmp_path, revision="fp16")
    assert resolve(tmp_path, revision="main") == tmp_path


def test_files_of_one_precision_alone_name_it(tmp_path: Path, pipeline: dict[str, bytes]) -> None:
    files = [name for name in pipeline if name != "vae/diffusion_pytorch_model.safetensors"]
    files.remove("vae/diffusion_pytorch_model.bin")
    keep = lambda folder: folder in ("", "vae")
    with pytest.raises(
        WeightsError, match=r"vae has only weights of a variant.* pass variant='fp16' \(--variant fp16\)"
    ):
        needed_files(files, keep, None)
    assert "vae/diffusion_pytorch_model.fp16.safetensors" in needed_files(files, keep, "fp16")
    for name in (
        "model.fp16.safetensors",
        "model.fp16-00001-of-00002.safetensors",
        "pytorch_model.bin.index.fp16.json",
    ):
        (tmp_path / name).mkdir(parents=True)  # only its name counts
        with pytest.raises(WeightsError, match=r"for variant 'fp16', pass variant='fp16' \(--variant fp16\)"):
            weight_files(tmp_path, "model")
        (tmp_path / name).rmdir()
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(WeightsError, match="no weights of variant 'fp16'.*weights without a variant are there"):
        weight_files(tmp_path, "model", "fp16")


def test_only_what_loading_opens_is_needed(pipeline: dict[str, bytes]) -> None:
    keep = lambda folder: "/" not in folder and folder != "safety_checker"
    wanted = needed_files(list(pipeline), keep, None)
    assert sorted(wanted) == [
        "README.md",
        "big/config.json",
        "big/diffusion_pytorch_model.safetensors.index.json",
        "model_index.json",
        "tokenizer/vocab.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert "vae/diffusion_pytorch_model.fp16.safetensors" in needed_files(list(pipeline), keep, "fp16")
    alone = needed_files(["config.json", "model.safetensors", "pytorch_model.bin"], lambda folder: True, None)
    assert alone == ["config.json", "model.safetensors"]


@pytest.fixture(scope="module")
def server(pipeline: dict[str, bytes]) -> Iterator[Hub]:
    repos = {"some/model": pipeline, "some/gated": (403, "GatedRepo"), "some/secret": (401, "RepoNotFound")}
    repos["some/empty"] = {"vae/config.json": pipeline["vae/config.json"], "model_index.json": b"{}"}
    # The client writes pieces of 10 MiB, so only a larger file can break off with something to resume from.
    repos["some/large"] = {"config.json": b"{}", "model.safetensors": np.random.default_rng(0).bytes(24 << 20)}
    with hub(repos) as running:
        yield running


PROGRAM = """
import json, sys
from diffuse_jax.weights import resolve, resolve_file, WeightsError
for call in json.loads(sys.argv[1]):
    try:
        print(json.dumps(["ok", str(resolve_file(**call) if "name" in call else resolve(**call))]), flush=True)
    except WeightsError as error:
        print(json.dumps(["error", str(error)]), flush=True)
"""


def ask(server: Hub, cache: Path, *calls: dict[str, Any]) -> list[tuple[str, str]]:
    """Resolve in a fresh process whose Hub is the stand-in."""
    calls = tuple({"cache_dir": str(cache)} | call for call in calls)
    own = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    own |= {"HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(calls)],
        env=os.environ | own,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return [tuple(json.loads(line)) for line in run.stdout.splitlines()]


def test_downloads_what_is_needed_and_says_what_went_wrong(
    server: Hub, tmp_path: Path, pipeline: dict[str, bytes]
) -> None:
    server.log.clear()
    got = ask(
        server,
        tmp_path,
        {"source": "some/model", "skip": ["safety_checker"]},
        {"source": "some/gated"},
        {"source": "some/secret"},
        {"source": "some/nothing"},
        {"source": "some/model", "revision": "v9"},
        {"source": "some/model", "subfolder": "unet"},
    )
    kind, folder = got[0]
    assert kind == "ok"
    have = {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}
    shards = {name for name in pipeline if name.startswith("big/")}
    assert have == {"README.md", "model_index.json", "tokenizer/vocab.json", "vae/config.json"} | shards | {
        "vae/diffusion_pytorch_model.safetensors"
    }
    assert all((Path(folder) / name).read_bytes() == pipeline[name] for name in have)
    assert [kind for kind, _ in got[1:]] == ["error"] * 5
    assert "some/gated: access is gated; accept its terms" in got[1][1]
    assert "some/secret: no such folder here and no such model on the Hub, or it needs a token" in got[2][1]
    assert "some/nothing: no such folder here and no such model on the Hub" in got[3][1]
    assert "some/model (revision v9): the Hub has no such revision" in got[4][1]
    assert "some/model: has no folder 'unet'" in got[5][1]


def test_one_file_of_a_repository_is_downloaded_alone(server: Hub, tmp_path: Path, pipeline: dict[str, bytes]) -> None:
    """As of the repositories of adapters, whose files have names of their own."""
    name = "safety_checker/model.safetensors"
    got = ask(server, tmp_path, {"source": "some/model", "name": name}, {"source": "some/model", "name": "a/other.bin"})
    kind, path = got[0]
    assert kind == "ok"
    assert Path(path).read_bytes() == pipeline[name]
    root = Path(path).parents[1]
    assert [str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()] == [name]
    assert got[1][0] == "error"
    assert "some/model: has no file 'a/other.bin'" in got[1][1]
    for local in (root, str(root)):
        assert resolve_file(local, name) == root / name
    with pytest.raises(WeightsError, match="not a plain path"):
        resolve_file(root, "../model.safetensors")
    with pytest.raises(WeightsError, match="no such folder"):
        resolve_file(tmp_path / "nothing", name)


def test_an_interrupted_download_resumes_where_it_stopped(server: Hub, tmp_path: Path) -> None:
    server.log.clear()
    server.breaks["model.safetensors"] = 1
    ((kind, folder),) = ask(server, tmp_path, {"source": "some/large"})
    assert kind == "ok", folder
    assert (Path(folder) / "model.safetensors").read_bytes() == server.repos["some/large"]["model.safetensors"]
    sent = [r for method, path, r in server.log if method == "GET" and path.endswith("model.safetensors")]
    assert sent == [None, f"bytes={10 << 20}-"]


def test_a_download_that_never_completes_is_a_clear_error_and_leaves_no_model(
    server: Hub, tmp_path: Path, pipeline: dict[str, bytes]
) -> None:
    name = "vae/diffusion_pytorch_model.safetensors"
    server.breaks[name] = 1000
    call = {"source": "some/model", "subfolder": "vae"}
    ((kind, text),) = ask(server, tmp_path, call)
    server.breaks.clear()
    assert kind == "error"
    assert "some/model: the download failed" in text
    assert not list(tmp_path.rglob("diffusion_pytorch_model.safetensors"))
    # And the next attempt completes it.
    ((kind, folder),) = ask(server, tmp_path, call)
    assert (Path(folder) / "diffusion_pytorch_model.safetensors").read_bytes() == pipeline[name]


def test_a_missing_file_is_named_when_the_model_is_opened(server: Hub, tmp_path: Path) -> None:
    ((kind, folder),) = ask(server, tmp_path, {"source": "some/empty", "subfolder": "vae"})
    assert kind == "ok", folder
    with pytest.raises(WeightsError, match=r"no weights: looked for diffusion_pytorch_model.safetensors"):
        AutoencoderKL.from_pretrained("some/empty", subfolder="vae", local_files_only=True, cache_dir=tmp_path)


def test_all_files_are_of_the_commit_that_a_branch_was_at_the_start(tmp_path: Path, pipeline: dict[str, bytes]) -> None:
    code = "; ".join(
        (
            "from diffuse_jax.weights import resolve",
            f"folder = resolve('some/model', subfolder='big', revision='main', cache_dir={str(tmp_path)!r})",
            f"again = resolve('some/model', revision='main', cache_dir={str(tmp_path)!r}, local_files_only=True)",
            "assert again == folder.parent",
        )
    )
    with hub({"some/model": pipeline}) as server:
        environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    asked = [path for _, path, _ in server.log]
    assert [path for path in asked if "main" in path] == ["/api/models/some/model/revision/main"], "asked once"
    assert any(f"/resolve/{SHA}/big/" in path for path in asked)
