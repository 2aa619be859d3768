"""The workers of a slice: install, run, logs, status, sync, ssh."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpu.gcloud import PROGRAM, Failed, Gcloud, call, environment, say

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = "diffuse_jax.tar"
BUCKET = r"gs://[^/]+(/.*)?"
"""A bucket, or a folder in one, as a regular expression."""
WORKER = "python3 diffuse_jax/tpu/worker.py"
"""The command that calls ``worker.py`` on a worker."""
RECORD = r'\{"worker": \d'
"""How what a worker says of its job begins."""
PACKAGE, SCRIPTS = ("diffuse_jax",), ("train", "tpu", "benchmarks", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Source:
    """Where the package comes from; without any of these it is this checkout.

    Attributes:
      version: a released version.
      git: the address of a repository, with ``@`` and a branch, tag or commit if not the default branch.
      wheel: a wheel on this machine.
      extras: the extras to install with it.
      setup: a line of shell to run on every worker afterwards, e.g. to mount a bucket.
    """

    version: str | None = None
    git: str | None = None
    wheel: Path | None = None
    extras: str = "tpu,train"
    setup: str | None = None


@dataclass(frozen=True)
class Job:
    """What runs on every worker.

    Attributes:
      command: the words of the command, which no shell reads.
      name: its name; its log and state have it.
      env: ``NAME=VALUE`` pairs.
      sync: ``FOLDER=gs://BUCKET/FOLDER`` pairs: copied from the bucket before, to the bucket during and after the job.
      every: seconds between two copies.
    """

    command: tuple[str, ...]
    name: str = "job"
    env: tuple[str, ...] = ()
    sync: tuple[str, ...] = ()
    every: float = 600


def ssh_command(gcloud: Gcloud, name: str, command: str, worker: str = "all") -> list[str]:
    return gcloud.command("tpu-vm", "ssh", name, f"--worker={worker}", f"--command={command}")


def install(gcloud: Gcloud, name: str, source: Source) -> None:
    """Put the scripts on every worker, and install the package there with Python, JAX and libtpu.

    The scripts (``train/``, ``tpu/``) are those of this checkout. They run in ``~/diffuse_jax``, with the package in a
    virtual environment, because the Python of the machines is older than the package needs.

    Raises:
      Failed: the wheel or git address is none, or a worker failed.
    """
    requirement, files = requirement_of(source)
    archive = Path.home() / ".cache" / "diffuse_jax" / "tpu" / name / ARCHIVE
    contents = [*(PACKAGE if source == Source(extras=source.extras, setup=source.setup) else ()), *SCRIPTS]
    gcloud.run(["mkdir", "-p", str(archive.parent)])
    gcloud.run(["tar", "-cf", str(archive), "-C", str(ROOT), "--exclude=__pycache__", *contents])
    gcloud.run(gcloud.command("tpu-vm", "scp", str(archive), *map(str, files), f"{name}:", "--worker=all"))
    setup = f"--setup={shlex.quote(source.setup)} " if source.setup else ""
    old = " ".join(f"diffuse_jax/{part}" for part in (*PACKAGE, *SCRIPTS))  # modules that are gone must not stay
    unpack = f"mkdir -p diffuse_jax && rm -rf {old} && tar -xf {ARCHIVE} -C diffuse_jax"
    gcloud.run(ssh_command(gcloud, name, f"{unpack} && {WORKER} install {setup}-- {shlex.join(requirement)}"))


def requirement_of(source: Source) -> tuple[list[str], list[Path]]:
    """What pip is given on the workers, and the files that it needs besides the checkout."""
    extras = f"[{source.extras}]" if source.extras else ""
    if source.version is not None:
        if not re.fullmatch(r"[0-9][0-9A-Za-z.+!-]*", source.version):
            raise Failed(f"--version {source.version!r} is not a version such as 0.1.0")
        return [f"diffusejax{extras}=={source.version}"], []
    if source.git is not None:
        if not re.match(r"(https|ssh|file)://", source.git):
            raise Failed(f"--git {source.git!r} must begin with https:// or ssh://, e.g. https://host/name.git@main")
        return [f"diffusejax{extras} @ git+{source.git}"], []
    if source.wheel is not None:
        if source.wheel.suffix != ".whl" or not source.wheel.is_file():
            raise Failed(f"--wheel {source.wheel} is not a wheel; make one with: pip wheel --no-deps .")
        return [f"../{source.wheel.name}{extras}"], [source.wheel]
    return ["--editable", f".{extras}"], []


def run_command(gcloud: Gcloud, name: str, job: Job) -> list[str]:
    """The command that starts a job on every worker.

    Raises:
      Failed: there is no command, or a pair is none.
    """
    if not job.command:
        raise Failed(f"no command; give it after --, e.g. {PROGRAM} run {name} -- python tpu/check.py")
    for pair in job.env:
        if not re.match(r"[A-Za-z_]\w*=", pair):
            raise Failed(f"--env {pair!r} must be NAME=VALUE")
    for pair in job.sync:
        if not re.fullmatch(rf"[^=-][^=]*={BUCKET}", pair):
            raise Failed(f"--sync {pair!r} must be FOLDER=gs://BUCKET/FOLDER")
    words = ["start", "--job", check_job(job.name)]
    words += [word for pair in job.env for word in ("--env", pair)]
    words += [word for pair in job.sync for word in ("--sync", pair)]
    words += ["--every", f"{job.every:g}"] if job.sync else []
    return ssh_command(gcloud, name, f"{WORKER} {shlex.join([*words, '--', *job.command])}")


def check_job(job: str) -> str:
    """A name of a job, which is a folder's.

    Raises:
      Failed: it is not.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", job):
        raise Failed(f"--job {job!r} must be of letters, digits, dots, hyphens and underscores")
    return job


def run(gcloud: Gcloud, name: str, job: Job) -> None:
    """Start a job on every worker; it goes on when the connection ends."""
    gcloud.run(run_command(gcloud, name, job))
    if not gcloud.dry_run:
        rest = f"{name} --job {job.name}"
        say(f"follow it: {call(gcloud, 'logs', rest)} --follow   end it: {call(gcloud, 'stop', rest)}")


def logs(gcloud: Gcloud, name: str, job: str, *, worker: str, lines: int, follow: bool) -> None:
    """Print the log of one worker or of all; with ``follow`` until the job ends, with its exit status."""
    words = ["log", "--job", check_job(job), "--lines", str(lines)]
    words += ["--follow"] if follow else []
    words += ["--prefix"] if not worker.isdecimal() else []
    gcloud.run(ssh_command(gcloud, name, f"{WORKER} {shlex.join(words)}", worker))


def stop(gcloud: Gcloud, name: str, job: str, *, again: bool = False) -> None:
    """Tell the job to end on every worker, as a preemption would: training saves a checkpoint first. With ``again`` it
    counts as interrupted, because it is going to start again."""
    gcloud.run(ssh_command(gcloud, name, f"{WORKER} stop --job {check_job(job)}{' --again' if again else ''}"))


def job_status(gcloud: Gcloud, name: str, job: str) -> list[dict[str, Any]]:
    """What every worker says of the job, by number of worker; nothing in a dry run.

    Raises:
      Failed: the workers cannot be asked.
    """
    command = ssh_command(gcloud, name, f"{WORKER} status --job {check_job(job)}")
    if gcloud.dry_run:
        gcloud.run(command)
        return []
    done = subprocess.run(command, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    # Several workers write at once: a line of one may begin behind that of another.
    found = [json.JSONDecoder().raw_decode(done.stdout, at.start())[0] for at in re.finditer(RECORD, done.stdout)]
    if done.returncode:
        missing = "; run install first" if "worker.py" in done.stderr and "No such file" in done.stderr else ""
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise Failed(f"the workers of {name} cannot be asked{missing}: {last[0]}", done.returncode)
    return sorted(found, key=lambda record: record["worker"])


def describe_job(record: dict[str, Any]) -> str:
    """A line of text for one worker's record."""
    code = "" if record["code"] is None else f", exit status {record['code']}"
    state = f"{record['job']} {record['state']}{code}, {record['seconds']} s"
    return f"worker {record['worker']}: {state}: {record['last']}"


def sync(gcloud: Gcloud, name: str, source: str, target: str, worker: str) -> None:
    """Copy a folder of the worker to a bucket, or a bucket's to the worker.

    Raises:
      Failed: not exactly one of the two is in a bucket.
    """
    buckets = [re.fullmatch(BUCKET, place) is not None for place in (source, target)]
    if sum(buckets) != 1 or (source, target)[buckets.index(False)].startswith(("gs:", "-")):
        raise Failed("one of the two must be a bucket, gs://BUCKET/FOLDER, the other a folder on the worker")
    gcloud.run(ssh_command(gcloud, name, f"{WORKER} {shlex.join(['sync', source, target])}", worker))


def ssh(gcloud: Gcloud, name: str, worker: str, command: Sequence[str]) -> None:
    """A shell on a worker, or a command there."""
    words = gcloud.command("tpu-vm", "ssh", name, f"--worker={worker}")
    gcloud.run([*words, f"--command={shlex.join(command)}"] if command else words, interactive=True)
