"""Uploading a trained model to the Hub (``push_to_hub``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from diffuse_jax.training.configuration import CONFIG_FILE, read_config
from diffuse_jax.training.distributed import say
from diffuse_jax.training.interruption import Phase, interruptions
from diffuse_jax.training.settings import UploadSettings

LEFT_OUT = ("checkpoint-*", "checkpoint-*/**", ".checkpoint-*/**", "logs/**", "profile/**", "*.new")
"""Files that are not uploaded, besides the caches: training states are large and useful only to this run."""

CARD = "README.md"


def make_repository(settings: UploadSettings, folder: str | Path) -> str | None:
    """Create the repository for a folder if it does not exist; called before training, so that errors show up early.

    Returns:
      The id of the repository; None if nothing is to be uploaded, and on all processes but the first.

    Raises:
      ConnectionError: the Hub cannot be reached, or denies write access.
    """
    if not settings.push_to_hub or jax.process_index() != 0:
        return None
    from huggingface_hub import HfApi

    name = settings.hub_model_id or Path(folder).resolve().name
    try:
        api = HfApi(token=settings.hub_token)
        return str(api.create_repo(name, private=settings.hub_private_repo or None, exist_ok=True).repo_id)
    except Exception as error:  # its HTTP library, and so the classes of its errors, changes with its version
        raise ConnectionError(
            f"--push_to_hub: no repository {name!r} on the Hub ({error}); log in with `hf auth login` or give "
            "--hub_token, or leave the flag out and upload the folder later"
        ) from error


def push_to_hub(settings: UploadSettings, folder: str | Path) -> str | None:
    """Upload the folder of a run, if the settings say so; call this when the model is complete.

    If there is no ``README.md``, one is written first, with the base model, the prompts and the last validation images.
    The flags of the run are read from its ``training.yaml``.

    Returns:
      The URL of the commit; None if nothing was uploaded, and on all processes but the first.

    Raises:
      ConnectionError: as for :func:`make_repository`.
      Interrupted: a signal ended the upload (a ``SystemExit``).
      huggingface_hub.errors.HfHubHTTPError: the Hub refuses the files.
    """
    repository = make_repository(settings, folder)
    if repository is None:
        return None
    from huggingface_hub import HfApi

    folder = Path(folder)
    run = read_config(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    if not (folder / CARD).is_file():
        (folder / CARD).write_text(card(folder, run, repository), encoding="utf-8")
    ignored = [*LEFT_OUT, f"{run.get('logging_dir', 'logs')}/**", *caches(folder, run)]
    say(f"uploading {folder} to {repository}")
    then = f"the upload ends; the trained model is complete in {folder} and can be uploaded later"
    with interruptions() as interrupted, interrupted.phase(Phase(then, at_once=True, nothing_to_save=True)):
        commit = HfApi(token=settings.hub_token).upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=ignored, commit_message="Trained model"
        )
    say(f"uploaded to {commit}")
    return str(commit)


def caches(folder: Path, run: Mapping[str, Any]) -> list[str]:
    """Patterns of the cached latents and prompt embeddings, if they are in the folder that is uploaded."""
    folder = folder.resolve()
    cache = Path(run.get("data_cache_dir") or folder / "cache").resolve()
    return [f"{cache.relative_to(folder)}/**"] if folder in cache.parents else []


def card(folder: Path, run: Mapping[str, Any], repository: str) -> str:
    """The model card: the base model, the prompts and the validation images.

    Args:
      folder: the folder of the model.
      run: the contents of its ``training.yaml``.
      repository: id of the repository, which is the title of the card.
    """
    base = run.get("pretrained_model_name_or_path")
    on_hub = base is not None and not Path(base).exists()
    head = ["library_name: diffusers", "tags: [diffusers, diffuse-jax]", *([f"base_model: {base}"] if on_hub else [])]
    text = ["---", *head, "---", "", f"# {repository}", ""]
    text += [f"Trained with diffuse_jax{f' from `{base}`' if base else ''}; `{CONFIG_FILE}` holds every flag.", ""]
    prompts = run.get("validation_prompt") or []
    if prompts:
        text += ["Prompts of the images: " + "; ".join(f"“{p}”" for p in prompts), ""]
    return "\n".join(text + [f"![{p.stem}]({p.relative_to(folder)})" for p in last_images(folder)]) + "\n"


def last_images(folder: Path) -> list[Path]:
    """The latest validation images."""
    steps = sorted((folder / "validation").glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    return sorted(steps[-1].glob("*.png")) if steps else []
