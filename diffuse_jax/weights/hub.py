"""Finding a model: a local folder, a model that ships with the package, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from diffuse_jax.errors import WeightsError
from diffuse_jax.limits import absence
from diffuse_jax.weights.files import STEMS, advice, choose_weights, is_plain_name, read_json, variants
from diffuse_jax.weights.load import READERS
from diffuse_jax.writing import atomic_file, expanded

SHIPPED = {"diffuse-jax/emoji": Path(__file__).parents[1] / "assets" / "emoji"}
"""Ids of models that open from the installed package, without network access."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
PRECISIONS = ("fp16", "bf16", "fp32")
"""Names of variants of the weights; some older repositories have branches of these names instead."""

CARD = "README.md"
"""The card of a pipeline, which may name the pipeline of an earlier stage."""

SMALL = {".json", ".txt", ".model"}
"""Suffixes of configurations and tokenizers, which are always downloaded."""


def resolve(
    source: str | Path,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    skip: Iterable[str] = (),
    only_small: bool = False,
) -> Path:
    """The local folder of a model; downloads the files that are needed and no others.

    Args:
      source: a local folder, an id of a shipped model (``diffuse-jax/emoji``) or a Hub id (``owner/name``).
      subfolder: a component's folder inside the model.
      variant: which weight files to download, for example ``"fp16"``.
      revision: branch, tag or commit on the Hub; ignored for local folders.
      local_files_only: use only files that are already in the cache.
      token: a Hub token, or True for the one that ``hf auth login`` stored.
      cache_dir: the Hub cache to use instead of the default.
      skip: folders of a pipeline that are not downloaded.
      only_small: download configurations and tokenizers, no weights.

    Raises:
      WeightsError: there is no such folder or repository, access is denied, or the download failed; the message says
        what to do.
    """
    if subfolder is not None and not is_plain_path(subfolder):
        raise WeightsError(f"subfolder {subfolder!r} is not a plain path inside the model")
    if source == "":
        raise WeightsError("the model's name is empty; give a folder or a Hub id")
    folder = SHIPPED.get(str(source), expanded(source))
    if folder.is_dir() and revision in PRECISIONS:
        raise WeightsError(
            f"{source}: a local folder has no revisions; pass variant={revision!r} (--variant {revision})"
        )
    if not folder.is_dir():
        if folder.is_file():
            raise WeightsError(
                f"{source}: is a file, but a model folder is needed; open single-file checkpoints with "
                "from_single_file, or convert them to folders with `diffuse-jax convert`"
            )
        if folder.suffix.lower() in READERS:
            raise WeightsError(f"{source}: {absence(folder)}")
        if not HUB_ID.fullmatch(str(source)):
            raise WeightsError(f"{source}: no such folder, and not a Hub id of the form 'owner/name'{_hint(folder)}")
        keep = functools.partial(_wanted, subfolder, frozenset(skip))
        choose = functools.partial(needed_files, keep=keep, variant=variant, weights=not only_small)
        folder = _download(str(source), choose, revision, local_files_only, token, cache_dir)
    folder = folder / (subfolder or "")
    if not folder.is_dir():
        raise WeightsError(f"{source}: has no folder {subfolder!r}")
    return folder


def resolve_file(
    source: str | Path,
    name: str,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The local path of one file of a folder or repository; downloads no other.

    Args:
      source: a local folder, or a Hub id.
      name: the file, with its subfolder: ``"models/ip-adapter_sd15.safetensors"``.
      revision, local_files_only, token, cache_dir: as in :func:`resolve`.

    Raises:
      WeightsError: there is no such file, or as in :func:`resolve`.
    """
    if not is_plain_path(name):
        raise WeightsError(f"{name!r} is not a plain path inside {source}")
    folder = expanded(source)
    if not folder.is_dir():
        if not HUB_ID.fullmatch(str(source)):
            raise WeightsError(f"{source}: no such folder, and not a Hub id of the form 'owner/name'{_hint(folder)}")
        choose = lambda names: [found for found in names if found == name]
        folder = _download(str(source), choose, revision, local_files_only, token, cache_dir)
    if not (folder / name).is_file():
        raise WeightsError(f"{source}: has no file {name!r}{_hint(folder / name)}")
    return folder / name


def is_plain_path(path: str) -> bool:
    """Whether joining a path to a folder cannot lead out of the folder."""
    return all(map(is_plain_name, PurePosixPath(path).parts))


def _download(
    repo: str,
    choose: Callable[[list[str]], list[str]],
    revision: str | None,
    local_files_only: bool,
    token: str | bool | None,
    cache_dir: str | Path | None,
) -> Path:
    """The snapshot folder in the Hub cache, with the needed files downloaded."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    where = f"{repo} (revision {revision})" if revision else repo
    options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    try:
        if local_files_only or constants.HF_HUB_OFFLINE:
            # No patterns: the cache has the files that an earlier call needed; others may be missing.
            return Path(huggingface_hub.snapshot_download(repo, local_files_only=True, allow_patterns=[], **options))
        info = huggingface_hub.HfApi(token=token).model_info(repo, revision=revision)
        names = [sibling.rfilename for sibling in info.siblings or []]
        wanted = choose(names)
        # All files come from the commit that the revision is now; a branch may move during the download.
        options["revision"] = info.sha
        folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=wanted, **options))
        shards = [name for index in wanted if ".index." in index for name in _shards_of(folder, index)]
        if shards:
            huggingface_hub.snapshot_download(repo, allow_patterns=shards, **options)
        _record_revision(folder, revision or "main")
        return folder
    except errors.GatedRepoError as error:
        raise WeightsError(
            f"{where}: access is gated; accept its terms on the model's page and pass token= or run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"{where}: no such folder here and no such model on the Hub, or it needs a token{_hint(Path(repo))}"
        ) from error
    except errors.RevisionNotFoundError as error:
        hint = f"; for weights of that precision, pass variant={revision!r} (--variant {revision})"
        raise WeightsError(f"{where}: the Hub has no such revision{hint * (revision in PRECISIONS)}") from error
    except errors.LocalEntryNotFoundError as error:
        hint = "; local_files_only or HF_HUB_OFFLINE forbids downloading it" if local_files_only else ""
        raise WeightsError(
            f"{where}: not in the local cache and not reachable{hint}, and there is no such folder{_hint(Path(repo))} "
            f"({error})"
        ) from error
    except (OSError, errors.HTTPError, errors.HFValidationError) as error:
        raise WeightsError(
            f"{where}: the download failed ({error}); run it again to continue where it stopped"
        ) from error


def _record_revision(snapshot: Path, revision: str) -> None:
    """Record in the cache which commit a branch or tag is, for offline use, as huggingface_hub does."""
    if revision != snapshot.name and is_plain_path(revision):
        file = snapshot.parents[1] / "refs" / revision
        with atomic_file(file) as reference:
            reference.write(snapshot.name.encode())


def _hint(path: Path) -> str:
    """The part of an error message that says what is there instead of a folder; empty if the source is not a path."""
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent} either" if path.is_absolute() or path.parts[:1] == ("..",) else ""
    names = sorted(p.name for p in path.parent.iterdir() if p.is_dir() and not p.name.startswith("."))
    if close := difflib.get_close_matches(path.name, names, 3):
        return f"; did you mean the folder {' or '.join(str(path.parent / name) for name in close)}?"
    return f"; the folder {path.parent} has {', '.join(names[:5])}" if names and path.parent.name else ""


def _wanted(subfolder: str | None, skip: frozenset[str], folder: str) -> bool:
    """Whether to download a folder of a repository: only the subfolder if one is given, else all that are not
    skipped."""
    return folder == subfolder if subfolder else "/" not in folder and folder not in skip


def needed_files(names: list[str], keep: Callable[[str], bool], variant: str | None, weights: bool = True) -> list[str]:
    """The files of a repository that loading needs: configurations, tokenizers, and one weight file per folder unless
    ``weights`` is False."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, base = name.rpartition("/")
        if keep(folder):
            folders.setdefault(folder, []).append(base)
    wanted = []
    for folder, files in folders.items():
        chosen_weights = [choose_weights(files, stem, variant) for stem in STEMS] if weights else []
        chosen = [file for file in files if Path(file).suffix in SMALL and ".index." not in file]
        chosen += [file for file in files if file == CARD and "model_index.json" in files]
        expected = weights and variant is None and not any(chosen_weights)
        missing = [stem for stem in STEMS if expected and variants(files, stem)]
        if folder and missing:
            raise WeightsError(f"{folder} has only weights of a variant{advice(variants(files, missing[0]))}")
        # Weight files at the top of a pipeline's repository are the same weights in another layout.
        if folder or "model_index.json" not in files:
            chosen += [file for file in chosen_weights if file]
        wanted += [f"{folder}/{file}" if folder else file for file in chosen]
    return wanted


def _shards_of(folder: Path, index: str) -> list[str]:
    """The shards that an index in the snapshot names, as paths in the repository."""
    parent = PurePosixPath(index).parent
    names = read_json(folder / index).get("weight_map", {}).values()
    return [str(parent / name) for name in sorted(set(names))]
