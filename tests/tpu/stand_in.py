#!/usr/bin/env python3
"""A stand-in for ``gcloud``: a small cloud in a folder.

It records every call in ``calls.jsonl`` and answers from ``plan.json``, which a test writes. Workers are folders, and
what is sent over ssh runs in them, so that jobs, logs and copies are real. The folder is in ``STAND_IN``. The plan:

* ``workers``: how many a slice has;
* ``lives``: for each creation in turn (the last one counts for all others) the states that ``describe`` shows one after
  the other, as ``request`` and ``node``. When a node is shown as taken away, its jobs are killed and its disks wiped;
* ``fail``: ``{"match": words, "stderr": text, "status": n, "times": n}``: calls that fail.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

CLOUD = Path(os.environ["STAND_IN"])
GONE = ("PREEMPTED", "TERMINATED")


def main(words: list[str]) -> int:
    with open(CLOUD / "calls.jsonl", "a") as calls:
        calls.write(json.dumps(words) + "\n")
    plan = json.loads((CLOUD / "plan.json").read_text())
    for failure in plan.get("fail", ()):
        if failure["match"] in " ".join(words) and failure.get("times", 1) > 0:
            failure["times"] = failure.get("times", 1) - 1
            (CLOUD / "plan.json").write_text(json.dumps(plan))
            return error(failure["stderr"], failure.get("status", 1))
    plain = [word for word in words if not word.startswith("-")]
    flags = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
    if plain[0] == "storage":
        return storage(plain, flags)
    kind, verb = plain[2:4]
    if verb == "list":
        print(plan.get("types", "") if kind == "accelerator-types" else kind)
        return 0
    return {"create": create, "describe": describe, "delete": delete, "ssh": ssh, "scp": scp}[verb](
        plan, kind, plain[4:], flags
    )


def error(text: str, status: int = 1) -> int:
    print(text, file=sys.stderr)
    return status


def load() -> dict:
    path = CLOUD / "cloud.json"
    return json.loads(path.read_text()) if path.exists() else {"created": 0, "slices": {}}


def save(cloud: dict) -> None:
    (CLOUD / "cloud.json").write_text(json.dumps(cloud))


def create(plan: dict, kind: str, names: list[str], flags: dict) -> int:
    cloud, lives = load(), plan.get("lives", [{}])
    life = lives[min(cloud["created"], len(lives) - 1)]
    request = life.get("request", ["ACTIVE"]) if kind == "queued-resources" else None
    cloud["slices"][names[0]] = {"request": request, "node": life.get("node", ["READY"]), "shown": "ACTIVE"}
    cloud["created"] += 1
    save(cloud)
    for n in range(plan.get("workers", 1)):
        binaries = CLOUD / f"worker-{n}" / "bin"
        binaries.mkdir(parents=True, exist_ok=True)
        python = binaries / "python3"
        python.write_text(PYTHON.format(python=sys.executable))
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return 0


PYTHON = """#!/bin/sh
# worker.py install would download Python and JAX; here it leaves this interpreter in their place.
if [ "$2" = install ]; then
  mkdir -p "$HOME/.diffuse-jax/venv/bin" && ln -sf {python} "$HOME/.diffuse-jax/venv/bin/python"
  exit $?
fi
exec {python} -S "$@"
"""


def next_state(states: list[str]) -> str:
    return states.pop(0) if len(states) > 1 else states[0]


def describe(plan: dict, kind: str, names: list[str], flags: dict) -> int:
    cloud = load()
    found = cloud["slices"].get(names[0], {})
    if kind == "queued-resources" and found.get("request"):
        state = found["shown"] = next_state(found["request"])
        detail = {f"{state.lower()}Data": {"error": {"message": "quota of chips"}}} if state == "FAILED" else {}
        save(cloud)
        print(json.dumps({"name": names[0], "state": {"state": state, **detail}}))
        return 0
    if kind == "tpu-vm" and found and found["shown"] in ("ACTIVE", "SUSPENDED"):
        state = next_state(found["node"])
        if state in GONE:
            wipe(plan)
        save(cloud)
        print(json.dumps({"state": state, "networkEndpoints": [{} for _ in range(plan.get("workers", 1))]}))
        return 0
    return error(f"ERROR: (gcloud.compute.tpus.{kind}.describe) NOT_FOUND: Resource '{names[0]}' was not found")


def wipe(plan: dict) -> None:
    for n in range(plan.get("workers", 1)):
        for path in (CLOUD / f"worker-{n}").glob(".diffuse-jax/jobs/*/state.json"):
            record = json.loads(path.read_text())
            for pid in (record.get("child"), record["pid"]):
                if pid and record["state"] == "running":
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(CLOUD / f"worker-{n}", ignore_errors=True)


def delete(plan: dict, kind: str, names: list[str], flags: dict) -> int:
    cloud = load()
    if cloud["slices"].pop(names[0], None) is None:
        return error("ERROR: NOT_FOUND")
    save(cloud)
    wipe(plan)
    return 0


def workers(plan: dict, flags: dict) -> list[int]:
    which = flags.get("worker", "0")
    return [*range(plan.get("workers", 1))] if which == "all" else [int(which)]


def ssh(plan: dict, kind: str, names: list[str], flags: dict) -> int:
    running = []
    for n in workers(plan, flags):
        home = CLOUD / f"worker-{n}"
        path = f"{home / 'bin'}:{os.environ['PATH']}"
        own = {"HOME": str(home), "TPU_WORKER_ID": str(n), "PATH": path}
        running.append(subprocess.Popen(["sh", "-c", flags["command"]], cwd=home, env={**os.environ, **own}))
    return next(filter(None, [process.wait() for process in running]), 0)


def scp(plan: dict, kind: str, names: list[str], flags: dict) -> int:
    for n in workers(plan, flags):
        for source in names[:-1]:
            shutil.copy(source, CLOUD / f"worker-{n}" / names[-1].partition(":")[2])
    return 0


def local(place: str) -> Path:
    return CLOUD / "buckets" / place.removeprefix("gs://") if place.startswith("gs://") else Path(place)


def storage(words: list[str], flags: dict) -> int:
    source = local(words[2])
    if not source.exists():
        return error("ERROR: (gcloud.storage.ls) One or more URLs matched no objects.")
    if words[1] == "ls":
        return 0
    for path in source.rglob("*"):
        name = path.relative_to(source).as_posix()
        if path.is_file() and not re.match(flags["exclude"], name):
            target = local(words[3]) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
