"""Jobs on the workers: real ones, started over the stand-in's ssh, and what becomes of them when chips are taken."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path

import pytest

from tests.tpu.conftest import Cloud, clock, tpu

ROOT = Path(__file__).resolve().parents[2]
COUNT = "from pathlib import Path; p = Path('out/count'); p.parent.mkdir(exist_ok=True)"


def ready(google: Cloud, workers: int = 1, **plan: object) -> None:
    google.plan(workers=workers, **plan)
    assert tpu("create my-tpu --type v5e-8") == 0
    assert tpu("install my-tpu") == 0


def python(code: str) -> str:
    return f"python3 -c {shlex.quote(code)}"


def until(google: Cloud, state: str, worker: int = 0, job: str = "job") -> dict:
    """Wait until a job's record says so."""
    path = google.home(worker) / ".diffuse-jax" / "jobs" / job / "state.json"
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if path.exists() and (record := json.loads(path.read_text()))["state"] == state:
            return record
        time.sleep(0.02)
    raise AssertionError(f"{path}: {path.read_text() if path.exists() else 'none'}")


def log_of(google: Cloud, worker: int = 0) -> str:
    return (google.home(worker) / ".diffuse-jax" / "jobs" / "job" / "log").read_text()


def test_the_same_command_runs_on_every_worker(google: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    ready(google, workers=2)
    assert (google.home(1) / "diffuse_jax" / "train").is_dir()
    code = "import os; print(os.environ['A'], 'in', os.path.basename(os.getcwd())); print('two  words')"
    assert tpu(f"run my-tpu --env 'A=an x' -- {python(code)}") == 0
    assert "python -m tpu logs my-tpu --job job --follow" in capfd.readouterr().err
    assert tpu("logs my-tpu --follow --worker all") == 0
    said = capfd.readouterr().out
    for worker in (0, 1):
        assert f"[worker {worker}] an x in diffuse_jax\n" in said
        assert f"[worker {worker}] two  words\n" in said
        assert f"[worker {worker}] -- job: finished, exit status 0\n" in said
    assert tpu("logs my-tpu --worker 1 --lines 1") == 0
    assert capfd.readouterr().out == "two  words\n"
    assert tpu("status my-tpu") == 0
    assert "worker 1: job finished, exit status 0, 0 s: two  words" in capfd.readouterr().out


def test_a_job_outlives_the_connection_and_is_stopped_gently(google: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    ready(google)
    code = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(143)))
print('works', flush=True)
time.sleep(60)"""
    assert tpu(f"run my-tpu -- {python(code)}") == 0
    until(google, "running")
    assert tpu("run my-tpu --job other -- true") == 1
    assert "job 'job' is running, and the chips serve one at a time; stop it first" in capfd.readouterr().err
    while "works" not in log_of(google):
        time.sleep(0.02)
    assert tpu("stop my-tpu") == 0
    assert until(google, "stopped")["code"] == 143
    assert log_of(google) == "works\nsaved\n"
    assert tpu("run my-tpu --job other -- true") == 0


def test_a_worker_that_fails_is_named(google: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    ready(google, workers=3)
    code = "import os, sys; n = int(os.environ['TPU_WORKER_ID']); print('I am', n); sys.exit(5 if n == 1 else 0)"
    assert tpu(f"run my-tpu -- {python(code)}") == 0
    assert tpu("logs my-tpu --worker all --follow") == 5
    assert tpu("status my-tpu") == 1
    said = capfd.readouterr()
    assert "worker 1: job failed, exit status 5, 0 s: I am 1" in said.out
    assert "python -m tpu status: job failed on worker 1" in said.err


def test_a_command_that_does_not_exist(google: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    ready(google)
    assert tpu("run my-tpu -- pyhton train.py") == 0
    assert tpu("logs my-tpu --follow") == 1
    assert "No such file or directory: 'pyhton'" in capfd.readouterr().out


def test_what_was_not_installed(google: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    assert tpu("create my-tpu --type v5e-8") == 0
    assert tpu("status my-tpu") != 0
    assert "run install first" in capfd.readouterr().err
    assert tpu("run my-tpu -- true") != 0


def test_folders_are_copied_to_a_bucket_and_back(google: Cloud) -> None:
    ready(google)
    bucket, run = google.folder / "buckets" / "b" / "run", google.home() / "diffuse_jax" / "out"
    count = f"{COUNT}; n = int(p.read_text()) if p.exists() else 0; p.write_text(str(n + 1))"
    code = f"{count}; (p.parent / '.part').touch()"
    for times in (1, 2):
        assert tpu(f"run my-tpu --sync out=gs://b/run -- {python(code)}") == 0
        until(google, "finished")
        assert (bucket / "count").read_text() == str(times)
        (run / "count").unlink()  # as on a new machine
    assert not (bucket / ".part").exists()  # still being written
    assert tpu("sync my-tpu gs://b/run back") == 0
    assert (google.home() / "diffuse_jax" / "back" / "count").read_text() == "2"
    assert tpu("sync my-tpu back gs://b/other") == 0
    assert (google.folder / "buckets" / "b" / "other" / "count").read_text() == "2"
    assert tpu("sync my-tpu nowhere gs://b/other") == 1


def test_a_checkpoint_that_was_cut_off_on_its_way_to_the_bucket_is_not_used(google: Cloud) -> None:
    ready(google)
    run = google.folder / "buckets" / "b" / "run"
    for step, files in ((1, ("state/x", "checksums.json")), (2, ("state/x",))):
        for name in files:
            path = run / f"checkpoint-{step}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    assert tpu("sync my-tpu gs://b/run back") == 0
    assert [p.name for p in (google.home() / "diffuse_jax" / "back").iterdir()] == ["checkpoint-1"]


def test_keep_survives_preemption(google: Cloud, waits: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    """The chips are taken twice: the third slice finishes what the first began, because the bucket remembers it."""
    lives = [{"node": ["READY", "READY", "READY", "PREEMPTED"], "request": ["ACTIVE"]} for _ in range(2)]
    lives.append({"node": ["READY"], "request": ["WAITING_FOR_RESOURCES", "ACTIVE"]})
    google.plan(lives=lives)
    code = f"""
import time
{COUNT}
n = int(p.read_text()) if p.exists() else 0
p.write_text(str(n + 1))
print('time', n + 1, flush=True)
time.sleep(60 if n < 2 else 0)"""

    def passed(seconds: float) -> None:
        """While keep waits, the job gets as far as it can, and its folder into the bucket."""
        waits.append(seconds)
        number = json.loads((google.folder / "cloud.json").read_text())["created"]
        bucket = google.folder / "buckets" / "b" / "run" / "count"
        end = time.monotonic() + 60
        while (google.home() / "diffuse_jax" / "tpu").exists() and time.monotonic() < end:
            if bucket.exists() and bucket.read_text() == str(number):
                return
            time.sleep(0.05)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tpu.keep.time", clock(passed))
        assert tpu(f"keep my-tpu --type v5e-8 --spot --sync out=gs://b/run --every 0.1 -- {python(code)}") == 0
    assert (google.folder / "buckets" / "b" / "run" / "count").read_text() == "3"
    assert [len(google.calls(words)) for words in (" create ", " delete ", " scp ")] == [3, 2, 3]
    said = capfd.readouterr().err
    assert said.count("my-tpu was taken away (request ACTIVE, node PREEMPTED); asking for another") == 2
    assert "job has finished on all workers" in said
    assert "it costs money" in said


def test_keep_watches_a_job_that_runs_already_and_deletes_in_the_end(google: Cloud, waits: list[float]) -> None:
    ready(google)
    assert tpu("run my-tpu -- true") == 0
    until(google, "finished")
    assert tpu("keep my-tpu --type v5e-8 --delete -- true") == 0
    assert [len(google.calls(words)) for words in (" create ", " scp ", "worker.py start", " delete ")] == [1, 1, 1, 1]


def test_keep_ends_with_a_job_that_fails_and_stops_the_other_workers(
    google: Cloud, waits: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    ready(google, workers=2)
    code = "import os, sys, time; sys.exit(9) if os.environ['TPU_WORKER_ID'] == '1' else time.sleep(60)"
    assert tpu(f"run my-tpu -- {python(code)}") == 0
    until(google, "failed", worker=1)
    until(google, "running", worker=0)
    assert tpu(f"keep my-tpu --type v5e-8 -- {python(code)}") == 9
    until(google, "stopped", worker=0)
    assert "job failed on worker 1; its log: python -m tpu logs my-tpu --job job --worker 1" in capfd.readouterr().err


def test_keep_starts_again_what_the_machine_interrupted(google: Cloud, waits: list[float]) -> None:
    """SIGTERM that nobody asked for, as when a machine restarts: not finished, whatever the exit status was."""
    ready(google)
    code = f"import os, signal; {COUNT}; p.exists() or os.kill(os.getppid(), signal.SIGTERM); p.touch()"
    assert tpu(f"run my-tpu -- {python(code)}") == 0
    assert until(google, "interrupted")["code"] == 0
    assert tpu("status my-tpu") == 1
    patience = iter(range(100))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tpu.keep.time", clock(lambda _: next(patience) and until(google, "finished")))
        assert tpu(f"keep my-tpu --type v5e-8 -- {python(code)}") == 0
    assert len(google.calls("worker.py start")) == 2


def test_keep_starts_everywhere_again_what_was_interrupted_on_one_worker(google: Cloud, waits: list[float]) -> None:
    """The others wait for that worker, and are not stopped by the user: all of them start again."""
    ready(google, workers=2)
    code = f"""
import os, signal, time
{COUNT}
first = not p.exists()
p.touch()
if first and os.environ['TPU_WORKER_ID'] == '1': os.kill(os.getppid(), signal.SIGTERM)
elif first: time.sleep(60)"""
    assert tpu(f"run my-tpu -- {python(code)}") == 0
    until(google, "interrupted", worker=1)
    until(google, "running", worker=0)
    assert tpu(f"keep my-tpu --type v5e-8 -- {python(code)}") == 0
    assert len(google.calls("worker.py start")) == 2


def test_keep_is_not_content_with_another_job(
    google: Cloud, waits: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    ready(google)
    assert tpu("run my-tpu -- true") == 0
    until(google, "finished")
    assert tpu("keep my-tpu --type v5e-8 -- echo mine") == 0
    assert log_of(google) == "mine\n"
    assert tpu("run my-tpu -- sleep 60") == 0
    assert tpu("keep my-tpu --type v5e-8 -- echo mine") == 1
    assert "another command is running as 'job' (sleep 60); stop it first" in capfd.readouterr().err


def test_keep_does_not_bring_back_what_was_deleted_or_refused(
    google: Cloud, waits: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    google.plan(lives=[{"request": ["ACTIVE", "FAILED"]}])
    assert tpu("keep my-tpu --type v5e-8 -- true") == 1
    assert "my-tpu will not become ready (request FAILED: quota of chips)" in capfd.readouterr().err
    assert tpu("delete my-tpu --yes") == 0
    google.plan()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tpu.keep.time", clock(lambda _: tpu("delete my-tpu --yes")))
        assert tpu("keep my-tpu --type v5e-8 -- sleep 60") == 1
    assert "my-tpu was deleted by somebody; the loop ends here" in capfd.readouterr().err
    assert len(google.calls(" create ")) == 2


def test_keep_gives_up_when_gcloud_fails_again_and_again(
    google: Cloud, waits: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    google.plan(fail=[{"match": " scp ", "stderr": "ERROR: no route to host", "status": 2, "times": 3}])
    assert tpu("keep my-tpu --type v5e-8 -- true") == 0  # it works the fourth time
    assert tpu("delete my-tpu --yes") == 0
    google.plan(fail=[{"match": " scp ", "stderr": "ERROR: no route to host", "status": 2, "times": 99}])
    assert tpu("keep my-tpu --type v5e-8 -- true") == 2
    said = capfd.readouterr().err
    assert "(5 of 5 failures in a row)" in said
    assert "given up. my-tpu is still requested or running" in said
