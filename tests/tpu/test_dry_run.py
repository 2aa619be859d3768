"""What ``--dry-run`` prints: the whole of it, and that a shell can run it."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.tpu.conftest import Cloud, tpu
from tpu import remote
from tpu.slices import parse_slice

WORKER = "python3 diffuse_jax/tpu/worker.py"
OLD = (
    "rm -rf diffuse_jax/diffuse_jax diffuse_jax/train diffuse_jax/tpu diffuse_jax/benchmarks "
    "diffuse_jax/pyproject.toml diffuse_jax/README.md diffuse_jax/LICENSE"
)
SSH = "gcloud compute tpus tpu-vm ssh my-tpu"
FILES = "train tpu benchmarks pyproject.toml README.md LICENSE"
SHELLCHECK = shutil.which("shellcheck")
TREE = Path("/usr/lib/google-cloud-sdk/data/cli/gcloud_completions.py")
FOUND = """gcloud compute tpus queued-resources describe my-tpu --format=json --zone=us-west4-a
gcloud compute tpus tpu-vm describe my-tpu --format=json --zone=us-west4-a"""
GOLDEN = {
    "create my-tpu --type v5e-8 --zone us-west4-a --spot --valid-until 6h --gcloud=--network=mine": f"""
# refused if one of these finds something
{FOUND}
gcloud compute tpus queued-resources create my-tpu --node-id=my-tpu --runtime-version=v2-alpha-tpuv5-lite \
--accelerator-type=v5litepod-8 --spot --network=mine --valid-until-duration=6h --zone=us-west4-a
# every 30 s, until the request is ACTIVE and the node is READY
{FOUND}""",
    "create my-tpu --type v4-8 --zone us-west4-a --now --reserved --poll 5": f"""
# us-west4-a is not among the known zones of v4 (us-central2-b): is it there?
gcloud compute tpus accelerator-types list '--format=value(type)' --zone=us-west4-a
# refused if one of these finds something
{FOUND}
gcloud compute tpus tpu-vm create my-tpu --version=tpu-ubuntu2204-base --accelerator-type=v4-8 --reserved \
--zone=us-west4-a
# every 5 s, until the request is ACTIVE and the node is READY
{FOUND}""",
    "install my-tpu": f"""
mkdir -p HOME/.cache/diffuse_jax/tpu/my-tpu
tar -cf HOME/.cache/diffuse_jax/tpu/my-tpu/diffuse_jax.tar -C CHECKOUT --exclude=__pycache__ diffuse_jax {FILES}
gcloud compute tpus tpu-vm scp HOME/.cache/diffuse_jax/tpu/my-tpu/diffuse_jax.tar my-tpu: --worker=all
{SSH} --worker=all '--command=mkdir -p diffuse_jax && {OLD} && tar -xf diffuse_jax.tar -C diffuse_jax && \
{WORKER} install -- --editable '"'"'.[tpu,train]'"'"''""",
    "install my-tpu --version 0.1.0 --extras tpu --project p": f"""
mkdir -p HOME/.cache/diffuse_jax/tpu/my-tpu
tar -cf HOME/.cache/diffuse_jax/tpu/my-tpu/diffuse_jax.tar -C CHECKOUT --exclude=__pycache__ {FILES}
gcloud compute tpus tpu-vm scp HOME/.cache/diffuse_jax/tpu/my-tpu/diffuse_jax.tar my-tpu: --worker=all --project=p
{SSH} --worker=all '--command=mkdir -p diffuse_jax && {OLD} && tar -xf diffuse_jax.tar -C diffuse_jax && \
{WORKER} install -- '"'"'diffusejax[tpu]==0.1.0'"'"'' --project=p""",
    "install my-tpu --git https://h/n.git@main --setup 'mkdir ~/b && gcsfuse b ~/b'": f"""
mkdir -p HOME/.cache/diffuse_jax/tpu/my-tpu
tar -cf HOME/.cache/diffuse_jax/tpu/my-tpu/diffuse_jax.tar -C CHECKOUT --exclude=__pycache__ {FILES}
gcloud compute tpus tpu-vm scp HOME/.cache/diffuse_jax/tpu/my-tpu/diffuse_jax.tar my-tpu: --worker=all
{SSH} --worker=all '--command=mkdir -p diffuse_jax && {OLD} && tar -xf diffuse_jax.tar -C diffuse_jax && \
{WORKER} install --setup='"'"'mkdir ~/b && gcsfuse b ~/b'"'"' -- \
'"'"'diffusejax[tpu,train] @ git+https://h/n.git@main'"'"''""",
    "run my-tpu --job a --env A='b c' --sync runs=gs://b/r -- python train/vae.py --x '$HOME'": f"""
{SSH} --worker=all '--command={WORKER} start --job a --env '"'"'A=b c'"'"' --sync runs=gs://b/r --every 600 -- \
python train/vae.py --x '"'"'$HOME'"'"''""",
    "logs my-tpu --worker all --follow": f"""
{SSH} --worker=all '--command={WORKER} log --job job --lines 100 --follow --prefix'""",
    "logs my-tpu --worker 3 --lines 5": f"""
{SSH} --worker=3 '--command={WORKER} log --job job --lines 5'""",
    "stop my-tpu": f"""
{SSH} --worker=all '--command={WORKER} stop --job job'""",
    "sync my-tpu runs/a gs://b/a": f"""
{SSH} --worker=0 '--command={WORKER} sync runs/a gs://b/a'""",
    "status my-tpu --zone us-west4-a": f"""
{FOUND}
{SSH} --worker=all '--command={WORKER} status --job job' --zone=us-west4-a""",
    "status": """
gcloud compute tpus queued-resources list
gcloud compute tpus tpu-vm list""",
    "wait my-tpu --zone us-west4-a": f"""
# every 30 s, until the request is ACTIVE and the node is READY
{FOUND}""",
    "ssh my-tpu --worker 1": f"""
{SSH} --worker=1""",
    "ssh my-tpu --worker all -- df -h": f"""
{SSH} --worker=all '--command=df -h'""",
    "delete my-tpu --zone us-west4-a": f"""
{FOUND}
# if there is a request; it takes its node with it
gcloud compute tpus queued-resources delete my-tpu --force --quiet --zone=us-west4-a
# if there is only a node
gcloud compute tpus tpu-vm delete my-tpu --quiet --zone=us-west4-a""",
}


def printed(words: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of a dry run, with CHECKOUT for this checkout and HOME for this user's folder."""
    verb, _, rest = words.partition(" ")
    assert tpu(f"{verb} --dry-run {rest}") == 0
    out = capsys.readouterr().out
    return out.replace(str(remote.ROOT), "CHECKOUT").replace(str(Path.home()), "HOME").splitlines()


@pytest.mark.parametrize("words", GOLDEN)
def test_what_would_run(words: str, google: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(words, capsys) == GOLDEN[words].strip().splitlines()
    assert google.calls() == []


def test_keep_prints_all_that_it_may_run(google: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    place, order = "--zone us-west4-a", "--type v5e-8 --spot"
    lines = printed(f"keep my-tpu {order} {place} --delete -- true", capsys)
    for part in (f"create my-tpu {order} {place}", f"install my-tpu {place}", f"run my-tpu {place} -- true"):
        one = printed(part, capsys)
        assert lines[: len(one)] == one
        lines = lines[len(one) :]
    assert lines == [
        "# every 30 s: is it still there, and does the job run?",
        *printed(f"status my-tpu {place}", capsys),
        "# when it is SUSPENDED, PREEMPTED or TERMINATED; then all of this again, from the first command on",
        "gcloud compute tpus queued-resources delete my-tpu --force --quiet --zone=us-west4-a",
        "# when the job has finished",
        *printed(f"delete my-tpu {place}", capsys),
    ]


def test_a_shell_runs_what_is_printed(google: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    assert tpu("create my-tpu --type v5e-8") == 0
    code = "import os; print(os.environ['A'], '$HOME')"
    run = f"run my-tpu --env 'A=x  \"y\"' -- python3 -c {shlex.quote(code)}"
    capsys.readouterr()
    lines = [line for words in ("install my-tpu", run, "logs my-tpu --follow") for line in printed(words, capsys)]
    script = "\n".join(lines).replace("CHECKOUT", str(remote.ROOT)).replace(" HOME/", f" {Path.home()}/")
    done = subprocess.run(["sh", "-e", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'x  "y" $HOME\n' in done.stdout


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck")
def test_what_is_printed_is_clean_shell(google: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for words in GOLDEN for line in printed(words, capsys)]
    sent = [word.partition("=")[2] for line in lines for word in shlex.split(line) if word.startswith("--command=")]
    for script in ("\n".join(lines), "\n".join(sent)):
        command = [str(SHELLCHECK), "--shell=sh", "--severity=warning", "-"]
        done = subprocess.run(command, input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not TREE.is_file(), reason="needs the Google Cloud CLI")
def test_gcloud_knows_every_command_and_flag(google: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    """The tree is that of gcloud's own completion."""
    spec = importlib.util.spec_from_file_location("gcloud_completions", TREE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = module.STATIC_COMPLETION_CLI_TREE
    lines = [line for words in GOLDEN for line in printed(words, capsys)]
    lines += [
        "gcloud storage rsync --recursive --exclude=x a b",
        "gcloud storage ls a",
        printed("job a --type v5e-16 --image i --spot -- true", capsys)[0].partition(": ")[2],
    ]
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] != ["gcloud"]:
            continue
        node, flags = root, set(root["flags"])
        for word in words[1:]:
            if word.startswith("--"):
                assert word.partition("=")[0] in flags, line
            elif word in node["commands"]:
                node = node["commands"][word]
                flags |= set(node["flags"])
        assert not node["commands"], f"no such command: {line}"


def test_a_jobset_has_a_pod_for_each_host(capsys: pytest.CaptureFixture[str]) -> None:
    yaml = pytest.importorskip("yaml")
    words = "--image i --spot --slices 2 --bucket gs://b --service-account s --env 'A=b: #c' -- python t.py --x ''"
    for name in ("v5e-16", "v4-8", "v6e-8", "v5p-16"):
        assert tpu(f"job my-job --type {name} {words}") == 0
        one = parse_slice(name)
        text = capsys.readouterr().out
        made = yaml.safe_load(text)
        (replicated,) = made["spec"]["replicatedJobs"]
        work = replicated["template"]["spec"]
        pod = work["template"]["spec"]
        (container,) = pod["containers"]
        assert (replicated["replicas"], work["parallelism"], work["completions"]) == (2, one.hosts, one.hosts)
        assert container["resources"]["limits"] == {"google.com/tpu": one.chips_per_host}
        assert container["command"] == ["python", "t.py", "--x", ""]
        assert container["env"] == [{"name": "A", "value": "b: #c"}]
        assert pod["nodeSelector"] == {
            "cloud.google.com/gke-tpu-accelerator": one.generation.gke,
            "cloud.google.com/gke-tpu-topology": one.topology,
            "cloud.google.com/gke-spot": "true",
        }
        assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b"
        assert pod["serviceAccountName"] == "s"
        assert f"--machine-type={one.machine} --tpu-topology={one.topology} --num-nodes={one.hosts}" in text


def test_the_command_of_xpk(capsys: pytest.CaptureFixture[str]) -> None:
    assert tpu("job a --type v5e-16 --image i --xpk c --zone z --env A=b --restarts 3 -- python t.py 'x y'") == 0
    assert capsys.readouterr().out == (
        "xpk workload create --cluster=c --workload=a --tpu-type=v5litepod-16 --num-slices=1 --docker-image=i "
        "--env=A=b --max-restarts=3 '--command=python t.py '\"'\"'x y'\"'\"'' --zone=z\n"
    )


def test_what_a_worker_installs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its own Python by way of uv, once; then the package, then the line of shell."""
    from tpu import worker

    monkeypatch.setattr(worker, "VENV", tmp_path / "venv")
    commands = [shlex.join(words[1:]) for words in worker.install_commands(["--editable", ".[tpu]"], "echo done")]
    python = tmp_path / "venv" / "bin" / "python"
    assert commands[:3] == [
        "-m pip install --quiet --user --upgrade uv",
        f"-m uv venv --python 3.12 {tmp_path / 'venv'}",
        f"-m uv pip install --python {python} --editable '.[tpu]'",
    ]
    assert commands[4] == "-c 'echo done'"
    python.parent.mkdir(parents=True)
    python.touch()
    assert len(worker.install_commands([".[tpu]"])) == 3


def test_a_worker_may_have_an_old_python() -> None:
    import ast

    ast.parse((Path(__file__).parents[2] / "tpu" / "worker.py").read_text(), feature_version=(3, 8))


def test_the_end_of_a_long_log(tmp_path: Path) -> None:
    from tpu import worker

    path = tmp_path / "log"
    lines = [json.dumps({"step": i, "pad": "x" * 50}) for i in range(5000)]
    path.write_text("\n".join(lines) + "\n")
    assert worker.tail(path, 3) == lines[-3:]
    assert worker.tail(path, 10_000) == lines
    assert worker.tail(path, 0) == []
    path.write_text("one\nunfinished")
    assert worker.tail(path, 1) == ["unfinished"]
    assert worker.tail(tmp_path / "none", 1) == []
