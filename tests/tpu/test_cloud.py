"""Creating and deleting slices, and the messages when that fails."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tpu.conftest import Cloud, clock, tpu
from tpu import cloud
from tpu.gcloud import Failed
from tpu.slices import GENERATIONS, generation_of, parse_slice, slices_of

PLACE = "--zone us-west4-a --project p"
ROOT = Path(__file__).resolve().parents[2]


def test_create_waits_in_the_queue_until_the_slice_is_ready(
    google: Cloud, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    request = ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    google.plan(lives=[{"request": request, "node": ["CREATING", "READY"]}], workers=4)
    assert tpu(f"create my-tpu --type v5e-16 --spot {PLACE} --poll 10") == 0
    assert google.calls("create") == [
        "gcloud compute tpus queued-resources create my-tpu --node-id=my-tpu --runtime-version=v2-alpha-tpuv5-lite "
        "--accelerator-type=v5litepod-16 --spot --zone=us-west4-a --project=p"
    ]
    said = capsys.readouterr().err
    assert said.count("WAITING_FOR_RESOURCES") == 1  # a state is said once
    assert "my-tpu is ready with 4 worker(s). It costs money until: python -m tpu delete my-tpu --zone us-west" in said
    assert waits == [10] * 4


@pytest.mark.parametrize(
    ("flags", "made"),
    [
        ("--type v4-8 --reserved", "--runtime-version=tpu-ubuntu2204-base --accelerator-type=v4-8 --reserved"),
        ("--type v5p:2x2x2 --valid-until 6h", "--accelerator-type=v5p-16 --valid-until-duration=6h"),
        ("--type v6e-8 --runtime mine --gcloud=--internal-ips", "--runtime-version=mine --accelerator-type=v6e-8 --i"),
        ("--type v5litepod-4 --now --spot", "tpu-vm create my-tpu --version=v2-alpha-tpuv5-lite --accelerator-type=v5"),
    ],
)
def test_every_way_to_order(google: Cloud, flags: str, made: str) -> None:
    assert tpu(f"create my-tpu {flags}") == 0
    assert made in google.calls("create")[0]


def test_what_exists_is_not_created_again(google: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    google.plan(lives=[{"request": ["WAITING_FOR_RESOURCES"]}])
    assert tpu("create my-tpu --type v5e-8 --no-wait") == 0
    assert tpu("create my-tpu --type v5e-8") == 1
    said = capsys.readouterr().err
    assert "my-tpu exists already (request WAITING_FOR_RESOURCES); wait for it: python -m tpu wait my-tpu" in said
    assert len(google.calls(" create ")) == 1


def test_a_request_that_fails_says_why_and_that_it_is_still_there(
    google: Cloud, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    google.plan(lives=[{"request": ["WAITING_FOR_RESOURCES", "FAILED"]}])
    assert tpu("create my-tpu --type v5e-8") == 1
    said = capsys.readouterr().err
    assert "will not become ready (request FAILED: quota of chips). It is still listed: python -m tpu delete" in said


def test_interrupting_says_what_remains_and_costs_money(
    google: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cloud, "time", clock(press))
    google.plan(lives=[{"request": ["WAITING_FOR_RESOURCES"]}])
    for verb in ("create my-tpu --type v5e-8", "wait my-tpu"):
        assert tpu(f"{verb} {PLACE}") == 130
        said = capsys.readouterr().err
        assert "it costs money" in said
        assert "Give it up: python -m tpu delete my-tpu --zone us-west4-a --project p" in said


def test_gcloud_has_the_last_word(google: Cloud, capfd: pytest.CaptureFixture[str]) -> None:
    """What gcloud says of a failure is shown, and its exit status passed on."""
    google.plan(fail=[{"match": " create ", "stderr": "ERROR: no quota for TPUV5sLitepod", "status": 7}])
    assert tpu("create my-tpu --type v5e-8") == 7
    said = capfd.readouterr().err
    assert "ERROR: no quota for TPUV5sLitepod" in said
    assert "gcloud compute tpus queued-resources create my-tpu failed with exit status 7" in said
    google.plan(fail=[{"match": "describe", "stderr": "ERROR: PERMISSION_DENIED: tpu.nodes.get", "status": 3}])
    assert tpu("status my-tpu") == 3
    assert "PERMISSION_DENIED: tpu.nodes.get" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("You do not currently have an active account selected.\nPlease run:\n\n  $ gcloud auth login", "auth login"),
        ("Failed to find attribute [project]. The attribute", "no project: give --project"),
        ("Failed to find attribute [zone]. The attribute", "no zone: give --zone"),
        ("The required property [zone] is not currently set", "no zone: give --zone"),
    ],
)
def test_a_gcloud_that_is_not_set_up_is_one_line(
    google: Cloud, capsys: pytest.CaptureFixture[str], stderr: str, said: str
) -> None:
    google.plan(fail=[{"match": "describe", "stderr": f"ERROR: {stderr}"}])
    assert tpu("status my-tpu") == 1
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1


def test_a_machine_without_gcloud(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert tpu("status my-tpu") == 1
    assert "gcloud is not on PATH; install it: https://cloud.google.com/sdk" in capsys.readouterr().err
    assert tpu("status my-tpu --dry-run") == 0


def test_delete_asks(google: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert tpu("create my-tpu --type v5e-8") == 0
    assert tpu("delete my-tpu") == 1  # nobody is at the terminal
    assert "--yes deletes without asking" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    answers: tuple[tuple[list[str], int], ...] = (([], 0), ([""], 0), (["n"], 0), (["y"], 1))
    for answer, deleted in answers:

        def asked(question: str, answer: list[str] = answer) -> str:
            if not answer:
                raise EOFError  # Ctrl-D
            return answer[0]

        monkeypatch.setattr("builtins.input", asked)
        assert tpu("delete my-tpu") == 1 - deleted
        assert len(google.calls(" delete ")) == deleted
    assert "queued-resources delete my-tpu --force --quiet" in google.calls(" delete ")[0]
    assert tpu("delete my-tpu --yes") == 0  # there is none any more, and that is what was asked for
    assert "nothing to delete" in capsys.readouterr().err


def test_a_node_without_a_request_is_deleted_as_a_node(google: Cloud) -> None:
    assert tpu("create my-tpu --type v5e-8 --now") == 0
    assert tpu("delete my-tpu --yes") == 0
    assert "tpu-vm delete my-tpu --quiet" in google.calls(" delete ")[0]


def test_a_zone_that_does_not_have_the_type(google: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    assert tpu("create my-tpu --type v6e-8 --zone us-central2-b") == 1
    assert "us-central2-b has no v6e-8; v6e is in us-central1-b," in capsys.readouterr().err
    google.plan(types="v4-8\nv6e-8")  # the table here may be older than the zone
    assert tpu("create my-tpu --type v6e-8 --zone us-central2-b") == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v9-8", "unknown TPU type 'v9-8'; known generations, with their smallest type: v4-8, v5e-1, v5p-8, v6e-1"),
        ("", "unknown TPU type ''"),
        ("v5e", "there is no v5e-; v5e comes with 1, 4, 8,"),
        ("v5e-12", "there is no v5e-12; v5e comes with 1, 4, 8, 16, 32, 64, 128, 256 (chips)"),
        ("v4-12", "v4 comes with 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096 (TensorCores, two on each chip)"),
        ("v5p:2x2", "v5p has no topology '2x2'; it has 2x2x1, 2x2x2,"),
        ("v6e:3x3", "v6e has no topology '3x3'; it has 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
    ],
)
def test_types_that_do_not_exist(text: str, said: str) -> None:
    with pytest.raises(Failed, match=re.escape(said)):
        parse_slice(text)


def test_types_by_all_their_names() -> None:
    for text in ("v5e-16", "V5E-16", "v5litepod-16", "v5e:4x4"):
        one = parse_slice(text)
        assert (one.accelerator_type, one.topology, one.hosts, one.chips_per_host) == ("v5litepod-16", "4x4", 4, 4)
    for generation in GENERATIONS:
        for one in slices_of(generation):
            assert parse_slice(one.accelerator_type) == one
            assert one.hosts * one.chips_per_host == one.chips
    found = generation_of("TPU v5 lite")
    assert found is not None
    assert found.name == "v5e"
    assert generation_of("cpu") is None


@pytest.mark.parametrize(
    "words",
    [
        "create My_TPU --type v5e-8",
        "create my-tpu --type v5e-8 --spot --reserved",
        "create my-tpu --type v5e-8 --now --valid-until 6h",
        "create my-tpu --type v5e-8 -- python train.py",
        "run my-tpu",
        "run my-tpu --env NAME -- true",
        "run my-tpu --sync runs=s3://bucket -- true",
        "run my-tpu --job ../up -- true",
        "install my-tpu --version newest",
        "install my-tpu --git host/name",
        "install my-tpu --wheel setup.py",
        "sync my-tpu runs outputs",
        "sync my-tpu gs://a gs://b",
        "sync my-tpu runs gs://",
        "run my-tpu --sync=-a=gs://b -- true",
        "job my-job --type v5e-8 --image i --bucket gs://b/folder -- true",
        "ssh my-tpu --worker all",
        "job My-Job --type v5e-8 --image i -- true",
        "job my-job --type v5e-8 --image i",
        "job my-job --type v5e-8 --image i --bucket b --xpk c -- true",
    ],
)
def test_mistakes_are_one_line_and_call_nothing(google: Cloud, capsys: pytest.CaptureFixture[str], words: str) -> None:
    assert tpu(words) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert google.calls() == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("create my-tpu --type v5e-8 --poll abc", "must be a positive number of seconds, got 'abc'"),
        ("create my-tpu --type v5e-8 --zone 'a\ntouch /tmp/b'", "must be a zone such as us-west4-a"),
        ("job my-job --type v5e-8 --image '' -- true", "must be a name without spaces, got ''"),
        ("job my-job --type v5e-8 --image i --xpk '' -- true", "must be a name without spaces, got ''"),
    ],
)
def test_values_that_are_none(capsys: pytest.CaptureFixture[str], words: str, said: str) -> None:
    with pytest.raises(SystemExit) as stop:
        tpu(words)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_an_output_that_takes_nothing() -> None:
    """A pipe without a reader ends it silently, a full disk with a line."""
    words = f"{sys.executable} -m tpu types"
    shell = lambda line: subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT)
    closed = shell(f"{words} | true; exit ${{PIPESTATUS[0]}}")
    assert (closed.stderr, closed.returncode) in (("", 141), ("", 0)), "0 if it was written before the reader ended"
    full = shell(f"{words} > /dev/full")
    assert full.returncode == 1
    assert full.stderr.count("\n") == 1
    assert "No space left" in full.stderr
    dry = shell(f"PYTHONIOENCODING=ascii {sys.executable} -m tpu run my-tpu --dry-run -- 'ü'")
    assert (dry.returncode, dry.stderr) == (0, "")


def test_it_needs_nothing_but_python() -> None:
    """No package is on the path of ``python -S``: neither JAX nor diffuse_jax have to be installed on a laptop."""
    command = [sys.executable, "-S", "-m", "tpu", "create", "my-tpu", "--type", "v5e-8", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "queued-resources create" in done.stdout
