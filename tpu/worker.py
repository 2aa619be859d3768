"""What runs on the workers of a slice: one job at a time, with its log and state in files; copies to a bucket.

``python -m tpu`` puts this file on every worker and calls it there with the system's Python, which may be as old as
3.8, so it uses the standard library only. All it writes is in ``~/.diffuse-jax``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO, Iterator  # noqa: UP035  (an old Python runs this)

HOME = Path.home() / ".diffuse-jax"
SOURCE = Path.home() / "diffuse_jax"
VENV = HOME / "venv"
PYTHON = "3.12"
COMPLETE = "checksums.json"
"""The file of a checkpoint that is written last; without it, a copy is of no use."""
HIDDEN = r"(.*/)?\.[^/]*(/.*)?"
"""Names that begin with a dot: what is still being written."""


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="worker.py", description=__doc__)
    commands = parser.add_subparsers(dest="verb", required=True)
    install = commands.add_parser("install")
    install.add_argument("--setup")
    start = commands.add_parser("start")
    for one in (start, commands.add_parser("supervise")):
        one.add_argument("--job", default="job")
        one.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
        one.add_argument("--sync", action="append", default=[], metavar="FOLDER=gs://BUCKET/FOLDER")
        one.add_argument("--every", type=float, default=600.0)
    status = commands.add_parser("status")
    status.add_argument("--job", default="job")
    log = commands.add_parser("log")
    log.add_argument("--job", default="job")
    log.add_argument("--lines", type=int, default=100)
    log.add_argument("--follow", action="store_true")
    log.add_argument("--prefix", action="store_true")
    stop = commands.add_parser("stop")
    stop.add_argument("--job", default="job")
    stop.add_argument("--again", action="store_true")
    sync = commands.add_parser("sync")
    sync.add_argument("source")
    sync.add_argument("target")
    args = parser.parse_args(words[:cut])
    args.command = words[cut + 1 :]  # after -- as it is: for install what pip takes, otherwise what runs
    try:
        return VERBS[args.verb](args) or 0
    except Refused as error:
        print(f"worker {number()}: {error}", file=sys.stderr, flush=True)
        return 1


class Refused(Exception):
    """The user's mistake, in one line."""


def number() -> str:
    """The number of this worker in its slice: GKE gives it in a variable, Cloud TPU at the end of the host's name."""
    found = re.search(r"-w-(\d+)$", socket.gethostname())
    return os.environ.get("TPU_WORKER_ID") or (found.group(1) if found else "0")


def tell(line: str) -> None:
    """Print a line at once, in one piece, because the workers share the user's terminal."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


# Installation


def install(args: argparse.Namespace) -> int:
    """A virtual environment with its own Python (that of the machine is too old), and the requirements in it."""
    for command in install_commands(args.command, args.setup):
        tell(f"worker {number()}: {shlex.join(command)}")
        # Newer systems refuse pip install --user unless this is set; older versions of pip do not know it.
        done = subprocess.run(command, cwd=str(SOURCE), env={**job_environment([]), "PIP_BREAK_SYSTEM_PACKAGES": "1"})
        if done.returncode:
            raise Refused(f"exit status {done.returncode} of: {shlex.join(command)}")
    return 0


def install_commands(requirements: list[str], setup: str | None = None) -> list[list[str]]:
    uv = [sys.executable, "-m", "uv"]
    return [
        [sys.executable, "-m", "pip", "install", "--quiet", "--user", "--upgrade", "uv"],
        *([] if (VENV / "bin" / "python").exists() else [[*uv, "venv", "--python", PYTHON, str(VENV)]]),
        [*uv, "pip", "install", "--python", str(VENV / "bin" / "python"), *requirements],
        [str(VENV / "bin" / "python"), "-c", "import diffuse_jax; print('diffuse_jax', diffuse_jax.__version__)"],
        *([["sh", "-c", setup]] if setup else []),
    ]


def job_environment(pairs: list[str]) -> dict[str, str]:
    """This process's environment with the virtual environment's commands first, and NAME=VALUE pairs."""
    own = {"PATH": f"{VENV / 'bin'}:{os.environ.get('PATH', '')}", "VIRTUAL_ENV": str(VENV), "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **own, **dict(pair.split("=", 1) for pair in pairs)}


# Jobs


def folder_of(job: str) -> Path:
    return HOME / "jobs" / job


def start(args: argparse.Namespace) -> int:
    """Start the job in the background, where it survives the connection."""
    if not (VENV / "bin" / "python").exists():
        raise Refused("nothing is installed here; run: python -m tpu install")
    for folder in (HOME / "jobs").glob("*"):
        if state_of(folder.name)["state"] == "running":
            raise Refused(f"job {folder.name!r} is running, and the chips serve one at a time; stop it first")
    folder = folder_of(args.job)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    flags = ["--job", args.job, "--every", str(args.every)]
    flags += [word for name in ("env", "sync") for value in getattr(args, name) for word in (f"--{name}", value)]
    words = [sys.executable, os.path.abspath(__file__), "supervise", *flags, "--", *args.command]
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=str(SOURCE)
        )
    while state_of(args.job)["state"] == "none" and process.poll() is None:
        time.sleep(0.02)
    if state_of(args.job)["state"] == "none":
        raise Refused(f"{args.job} did not start; see {folder / 'log'}")
    tell(f"worker {number()}: started {args.job}: {shlex.join(args.command)}")
    return 0


def supervise(args: argparse.Namespace) -> int:
    """Run the command, and write down how it ended."""
    folder = folder_of(args.job)
    told: list[int] = []
    # The system sends SIGTERM to the command as well. It is not passed on: a second one would cut short what the
    # command does to save its work.
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    record = {"pid": os.getpid(), "boot": boot(), "command": args.command, "began": time.time()}
    write(folder, {**record, "state": "running"})
    pairs = [pair.partition("=")[::2] for pair in args.sync]
    code, ended = 1, threading.Event()
    try:
        for local, bucket in pairs:
            restore(bucket, local)
        child = subprocess.Popen(args.command, cwd=str(SOURCE), env=job_environment(args.env), start_new_session=True)
        write(folder, {**record, "state": "running", "child": child.pid})
        copies = threading.Thread(target=keep_copying, args=(pairs, args.every, ended))
        copies.start()
        code = child.wait()
        ended.set()
        copies.join()
        for local, bucket in pairs:
            if not upload(local, bucket) and code == 0:
                tell(f"worker.py: {local} is not in {bucket}")
                code = 1
    except (OSError, Refused) as error:
        tell(f"worker.py: {error}")
    finally:
        ended.set()
    stopped = (folder / "stop").exists()
    state = "stopped" if stopped else "interrupted" if told else "finished" if code == 0 else "failed"
    write(folder, {**record, "state": state, "code": code if code >= 0 else 128 - code, "ended": time.time()})
    return 0


def write(folder: Path, record: dict[str, Any]) -> None:
    """Replace the record of a job at once, so that nobody reads half of it."""
    (folder / "state.new").write_text(json.dumps(record))
    os.replace(str(folder / "state.new"), str(folder / "state.json"))


def state_of(job: str) -> dict[str, Any]:
    """The record of a job; its ``state`` is none, running, finished, failed, stopped (by the user) or interrupted: by
    SIGTERM, or because the machine restarted."""
    path = folder_of(job) / "state.json"
    if not path.exists():
        return {"state": "none"}
    record: dict[str, Any] = json.loads(path.read_text())
    if record["state"] == "running" and not (record["boot"] == boot() and alive(record["pid"])):
        record["state"] = "stopped" if (folder_of(job) / "stop").exists() else "interrupted"
    return record


def boot() -> str:
    """What changes when the machine restarts."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def status(args: argparse.Namespace) -> int:
    """Print the job's record as a line of JSON."""
    record = state_of(args.job)
    last = tail(folder_of(args.job) / "log", 1)
    seconds = record.get("ended", time.time()) - record.get("began", time.time())
    line = {"worker": int(number()), "job": args.job, "command": record.get("command")}
    line.update(state=record["state"], code=record.get("code"))
    tell(json.dumps({**line, "seconds": round(seconds), "last": last[-1].strip()[-200:] if last else ""}))
    return 0


def stop(args: argparse.Namespace) -> int:
    """Ask the job to end; training saves a checkpoint first."""
    record = state_of(args.job)
    if record["state"] != "running":
        tell(f"worker {number()}: {args.job} is not running ({record['state']})")
        return 0
    if args.again:
        os.kill(record["pid"], signal.SIGTERM)  # an interruption, as by the system
    else:
        (folder_of(args.job) / "stop").touch()
    if "child" in record:
        os.killpg(record["child"], signal.SIGTERM)
    tell(f"worker {number()}: asked {args.job} to stop")
    return 0


# Logs


def log(args: argparse.Namespace) -> int:
    """Print the end of the log, and with ``--follow`` what comes, until the job ends, with its exit status."""
    path = folder_of(args.job) / "log"
    if not path.exists():
        raise Refused(f"there is no job {args.job!r} here")
    prefix = f"[worker {number()}] " if args.prefix else ""
    for line in follow(path, args.lines, args.job) if args.follow else tail(path, args.lines):
        tell(prefix + line)
    record = state_of(args.job)
    if not args.follow:
        return 0
    tell(f"{prefix}-- {args.job}: {record['state']}, exit status {record.get('code')}")
    return int(record.get("code") or 0) or (0 if record["state"] == "finished" else 1)


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a file."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        return end_of(file, lines).decode("utf-8", "replace").splitlines()


def end_of(file: BinaryIO, lines: int) -> bytes:
    """The last lines of a file, without reading all of a long one; the file is left at its end."""
    size, data = file.seek(0, os.SEEK_END), b""
    end = size
    while size and data.count(b"\n") <= lines:
        step = min(1 << 16, size)
        size -= step
        file.seek(size)
        data = file.read(step) + data
    file.seek(end)
    return b"".join(data.splitlines(keepends=True)[-lines:]) if lines > 0 else b""


def follow(path: Path, lines: int, job: str) -> Iterator[str]:
    """The last lines, then new ones as they are written, until the job has ended."""
    with open(path, "rb") as file:
        part = end_of(file, lines)
        while True:
            ended = state_of(job)["state"] != "running"
            *whole, part = (part + file.read()).split(b"\n")
            yield from (line.decode("utf-8", "replace") for line in whole)
            if ended:
                if part:
                    yield part.decode("utf-8", "replace")
                return
            time.sleep(0.2)


# Copies


def keep_copying(pairs: list[Any], every: float, ended: threading.Event) -> None:
    while pairs and not ended.wait(every):
        for local, bucket in pairs:
            upload(local, bucket)


def upload(local: str, bucket: str) -> bool:
    """Copy what is new to the bucket. The file that makes a checkpoint complete goes last, so that a copy that was cut
    off can be told. Nothing is deleted there."""
    if not (SOURCE / local).is_dir():
        return True
    last = rf"(.*/)?{re.escape(COMPLETE)}"
    return rsync(str(SOURCE / local), bucket, rf"{HIDDEN}|{last}") and rsync(str(SOURCE / local), bucket, HIDDEN)


def restore(bucket: str, local: str) -> None:
    """Copy from the bucket what is there, and drop checkpoints that are not all there."""
    look = subprocess.run(["gcloud", "storage", "ls", bucket], capture_output=True, text=True)
    if look.returncode:
        if "matched no objects" in look.stderr:
            return
        raise Refused(f"{bucket} cannot be read: {look.stderr.strip()}")
    target = SOURCE / local
    target.mkdir(parents=True, exist_ok=True)
    if not rsync(bucket, str(target), HIDDEN):
        raise Refused(f"{bucket} cannot be copied to {target}")
    for checkpoint in target.rglob("checkpoint-*"):
        if (checkpoint / "state").is_dir() and not (checkpoint / COMPLETE).exists():
            tell(f"worker.py: {checkpoint.name} was cut off while it was copied; an older one is used")
            shutil.rmtree(str(checkpoint))


def rsync(source: str, target: str, exclude: str) -> bool:
    words = ["gcloud", "storage", "rsync", "--recursive", f"--exclude={exclude}", source, target]
    return subprocess.run(words).returncode == 0


def sync(args: argparse.Namespace) -> int:
    """Copy a folder to a bucket, or from one."""
    if args.target.startswith("gs://"):
        if not (SOURCE / args.source).is_dir():
            raise Refused(f"there is no folder {SOURCE / args.source}")
        return 0 if upload(args.source, args.target) else 1
    restore(args.source, args.target)
    return 0


VERBS = {
    "install": install,
    "start": start,
    "supervise": supervise,
    "status": status,
    "log": log,
    "stop": stop,
    "sync": sync,
}

if __name__ == "__main__":
    sys.exit(main())
