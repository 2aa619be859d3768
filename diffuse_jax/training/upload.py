"""Uploading a trained model to the Hub (``--push_to_hub``)."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax

from diffuse_jax.training.data import cache_dir_from
from diffuse_jax.training.start import say

LEFT_OUT = ("checkpoint-*", "checkpoint-*/**", ".checkpoint-*/**", "logs/**", "profile/**", "*.new")
"""What stays here, besides the caches: the training states are large and of use to this run alone."""

CARD = "README.md"


def make_repository(args: argparse.Namespace) -> str | None:
    """The repository that ``--push_to_hub`` needs, made where it is missing: before training, so that no run ends here.

    Returns:
      Its id; None without the flag, and on all processes but the first.

    Raises:
      ConnectionError: the Hub cannot be reached, or does not let us write there.
    """
    if not args.push_to_hub or jax.process_index() != 0:
        return None
    from huggingface_hub import HfApi

    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        api = HfApi(token=args.hub_token)
        return str(api.create_repo(name, private=args.hub_private_repo or None, exist_ok=True).repo_id)
    except Exception as error:  # its HTTP library, and so the classes of its errors, changes with its version
        raise ConnectionError(
            f"--push_to_hub: no repository {name!r} on the Hub ({error}); log in with `hf auth login` or give "
            "--hub_token, or leave the flag out and upload the folder later"
        ) from error


def push_to_hub(args: argparse.Namespace) -> str | None:
    """Upload ``args.output_dir`` if ``--push_to_hub`` says so; to be called when the model is complete.

    A ``README.md`` is written first, if there is none: the base model, the flags and the last validation pictures.

    Returns:
      The address of the commit; None if nothing was uploaded (without the flag, and on all processes but the first).

    Raises:
      ConnectionError: of :func:`make_repository`.
      huggingface_hub.errors.HfHubHTTPError: the Hub refuses the files.
    """
    repository = make_repository(args)
    if repository is None:
        return None
    from huggingface_hub import HfApi

    folder = Path(args.output_dir)
    if not (folder / CARD).is_file():
        (folder / CARD).write_text(card(args, repository), encoding="utf-8")
    ignored = [*LEFT_OUT, f"{args.logging_dir}/**", *caches(args)]
    commit = HfApi(token=args.hub_token).upload_folder(
        repo_id=repository, folder_path=folder, ignore_patterns=ignored, commit_message="Trained model"
    )
    say(f"uploaded to {commit}")
    return str(commit)


def caches(args: argparse.Namespace) -> list[str]:
    """Patterns of the encoded pictures and captions, where they lie in the folder that is uploaded."""
    folder, cache = Path(args.output_dir).resolve(), cache_dir_from(args).resolve()
    return [f"{cache.relative_to(folder)}/**"] if folder in cache.parents else []


def card(args: argparse.Namespace, repository: str) -> str:
    """The model card: what was trained from what, and pictures."""
    base = getattr(args, "pretrained_model_name_or_path", None)
    on_hub = base is not None and not Path(base).exists()
    head = ["library_name: diffusers", "tags: [diffusers, diffuse-jax]", *([f"base_model: {base}"] if on_hub else [])]
    text = ["---", *head, "---", "", f"# {repository}", ""]
    text += [f"Trained with diffuse_jax{f' from `{base}`' if base else ''}; `training.yaml` holds every flag.", ""]
    prompts = getattr(args, "validation_prompt", None) or []
    if prompts:
        text += ["Prompts of the pictures: " + "; ".join(f"“{p}”" for p in prompts), ""]
    return "\n".join(text + [f"![{p.stem}]({p.relative_to(args.output_dir)})" for p in last_pictures(args)]) + "\n"


def last_pictures(args: argparse.Namespace) -> list[Path]:
    """The validation pictures of the last step that has any."""
    steps = sorted(
        (Path(args.output_dir) / "validation").glob("step-*"), key=lambda p: int(p.name.removeprefix("step-"))
    )
    return sorted(steps[-1].glob("*.png")) if steps else []
