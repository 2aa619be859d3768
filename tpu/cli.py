"""The commands of ``python -m tpu``; every one takes ``--dry-run``, which prints what would run and runs nothing."""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tpu import cloud, jobs, keep, remote, slices
from tpu.cloud import Order
from tpu.gcloud import INSTALL, PROGRAM, Failed, Gcloud, say
from tpu.remote import Job, Source

DESCRIPTION = """Cloud TPUs from a laptop: create a slice, install diffuse_jax on it, run a job on every worker.

  python -m tpu create my-tpu --type v5e-8 --zone us-west4-a --spot
  python -m tpu install my-tpu --zone us-west4-a
  python -m tpu run my-tpu --zone us-west4-a -- python tpu/check.py
  python -m tpu logs my-tpu --zone us-west4-a --follow
  python -m tpu delete my-tpu --zone us-west4-a

--dry-run prints the commands of gcloud instead of running them."""


UNREAD = 128 + 13
"""The exit status of a process whose output nobody reads any more, as a shell gives it for SIGPIPE."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted, gcloud's own if
    it failed, and a job's where the command waits for one."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args = build_parser().parse_args(words[:cut])
    rest = tuple(words[cut + 1 :])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without the letter is no reason to fail
    try:
        if rest and not getattr(args, "takes_command", False):
            raise Failed(f"{args.verb} takes no command: {shlex.join(rest)}")
        args.command = rest
        if not args.dry_run and args.needs_gcloud and shutil.which("gcloud") is None:
            raise Failed(f"gcloud is not on PATH; install it: {INSTALL} (--dry-run works without it)")
        args.act(args)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return UNREAD
    except OSError as error:
        say(f"{PROGRAM} {args.verb}: {error}")
        _discard_output()
        return 1
    except Failed as error:
        say(f"{PROGRAM} {args.verb}: {error}")
        return error.status
    except KeyboardInterrupt:
        say(f"{PROGRAM} {args.verb}: interrupted")
        return 130
    return 0


def _discard_output() -> None:
    """Send what is still buffered nowhere; Python would complain about it at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=PROGRAM, description=DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    def command(
        verb: str, act: Callable[[argparse.Namespace], None], what: str, *groups: Groups, name: str | None = "NAME"
    ) -> argparse.ArgumentParser:
        one = commands.add_parser(verb, help=what, description=what[0].upper() + what[1:] + ".", formatter_class=raw)
        if name:
            one.add_argument("name", metavar=name, nargs="?" if name == "[NAME]" else None, help="of the slice")
        one.add_argument("--zone", type=_zone, help="of the slice; gcloud's compute/zone if omitted")
        one.add_argument("--project", help="gcloud's project if omitted")
        one.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
        one.set_defaults(act=act, needs_gcloud=True, takes_command=False)
        for add in groups:
            add(one)
        return one

    command("types", lambda args: print(slices.table()), "list the types of slices", _local, name=None)
    command("create", create, "create a slice and wait until it is ready", _type, _order, _now, _poll)
    command("wait", wait, "wait until a slice is ready", _poll)
    command("install", install, "put diffuse_jax on every worker, with its own Python, JAX and libtpu", _source)
    command("run", run, "start a command on every worker, in the background", _job, _runs)
    command("logs", logs, "print what a job has printed", _name_of_job, _logs)
    command("status", status, "show a slice and its job, or all slices of the zone", _name_of_job, name="[NAME]")
    command("stop", stop, "end a job on every worker; training saves a checkpoint first", _name_of_job)
    command("sync", sync, "copy a folder of a worker to a bucket, or back", _sync)
    command(
        "keep", keep_running, "run a job to its end, on another slice if one is taken away",
        *(_type, _order, _source, _job, _runs, _poll, _keep),
    )  # fmt: skip
    command("ssh", ssh, "open a shell on a worker, or run a command after --", _ssh, _runs)
    command("delete", delete, "delete a slice, which ends its costs", _delete)
    command("job", job, "print a JobSet for GKE, or the command of XPK", _local, _type, _cluster, _runs)
    return parser


Groups = Callable[[argparse.ArgumentParser], None]


def _local(one: argparse.ArgumentParser) -> None:
    one.set_defaults(needs_gcloud=False)


def _runs(one: argparse.ArgumentParser) -> None:
    one.set_defaults(takes_command=True)
    one.usage = one.format_usage().removeprefix("usage: ").rstrip() + " -- COMMAND ..."


def _type(one: argparse.ArgumentParser) -> None:
    what = f"such as v5e-8, gcloud's v5litepod-8, or v5e:2x4; `{PROGRAM} types` lists them"
    one.add_argument("--type", required=True, help=what)
    one.add_argument("--spot", action="store_true", help="much cheaper, but taken away at any time")


def _order(one: argparse.ArgumentParser) -> None:
    one.add_argument("--reserved", action="store_true", help="use the project's reservation")
    one.add_argument("--runtime", help="software version of the machines; that of the type if omitted")
    one.add_argument("--valid-until", metavar="TIME", help="withdraw the request if it waits so long, e.g. 6h")
    what = "further flag for gcloud's create command, e.g. --gcloud=--network=NAME; may be repeated"
    one.add_argument("--gcloud", action="append", default=[], metavar="FLAG", help=what)


def _now(one: argparse.ArgumentParser) -> None:
    one.add_argument("--now", action="store_true", help="fail if there is no capacity, instead of waiting for it")
    one.add_argument("--no-wait", action="store_true", help="return once the request is in the queue")


def _poll(one: argparse.ArgumentParser) -> None:
    one.add_argument("--poll", type=_seconds, default=30.0, metavar="SECONDS", help="time between two looks (30)")


def _source(one: argparse.ArgumentParser) -> None:
    group = one.add_mutually_exclusive_group()
    group.add_argument("--version", help="install this release; without one of these three, this checkout")
    group.add_argument("--git", metavar="URL[@REF]", help="install from a git repository")
    group.add_argument("--wheel", type=Path, help="install a wheel of this machine")
    one.add_argument("--extras", default="tpu,train", help="extras to install with it (tpu,train)")
    one.add_argument("--setup", metavar="SHELL", help="a line of shell for every worker, e.g. to mount a bucket")


def _name_of_job(one: argparse.ArgumentParser) -> None:
    one.add_argument("--job", default="job", help="name of the job (job)")


def _job(one: argparse.ArgumentParser) -> None:
    _name_of_job(one)
    one.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="may be repeated")
    what = "copy the folder from the bucket before the job, and to it during and after; may be repeated"
    one.add_argument("--sync", action="append", default=[], metavar="FOLDER=gs://BUCKET/FOLDER", help=what)
    one.add_argument("--every", type=_seconds, default=600.0, metavar="SECONDS", help="time between two copies (600)")


def _logs(one: argparse.ArgumentParser) -> None:
    one.add_argument("--worker", type=_worker, default="0", help="number of a worker, or all (0)")
    one.add_argument("--lines", type=_natural, default=100, help="how many lines from the end (100)")
    one.add_argument("--follow", action="store_true", help="until the job ends, with its exit status")


def _sync(one: argparse.ArgumentParser) -> None:
    one.add_argument("source", help="a folder on the worker, from ~/diffuse_jax, or gs://BUCKET/FOLDER")
    one.add_argument("target", help="the other of the two")
    one.add_argument("--worker", type=_worker, default="0", help="number of a worker, or all (0)")


def _keep(one: argparse.ArgumentParser) -> None:
    one.add_argument("--delete", action="store_true", help="delete the slice when the job has finished")


def _ssh(one: argparse.ArgumentParser) -> None:
    one.add_argument("--worker", type=_worker, default="0", help="number of a worker; all for a command (0)")


def _delete(one: argparse.ArgumentParser) -> None:
    one.add_argument("--yes", action="store_true", help="without asking")


def _cluster(one: argparse.ArgumentParser) -> None:
    one.add_argument("--image", type=_word, required=True, help="container image, for example from tpu/Dockerfile")
    one.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="may be repeated")
    one.add_argument("--slices", type=_count, default=1, help="how many work together (1); more than one is untested")
    one.add_argument("--restarts", type=_natural, default=100, help="after failures and preemptions (100)")
    one.add_argument("--bucket", help="mounted at /bucket")
    one.add_argument("--service-account", help="of Kubernetes, which may use the bucket")
    one.add_argument("--xpk", type=_word, metavar="CLUSTER", help="print the command of XPK for this cluster instead")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 1e7:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return value


def _word(text: str) -> str:
    if not text or text.split() != [text]:
        raise argparse.ArgumentTypeError(f"must be a name without spaces, got {text!r}")
    return text


def _zone(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9-]+", text):
        raise argparse.ArgumentTypeError(f"must be a zone such as us-west4-a, got {text!r}")
    return text


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not _natural(text):
        raise argparse.ArgumentTypeError("must be at least 1, got 0")
    return int(text)


def _worker(text: str) -> str:
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number from 0, or all, got {text!r}")
    return text


def _gcloud(args: argparse.Namespace) -> Gcloud:
    if getattr(args, "name", None) is not None:
        cloud.check_name(args.name)
    return Gcloud(args.zone, args.project, args.dry_run)


def _order_of(args: argparse.Namespace) -> Order:
    if args.spot and args.reserved:
        raise Failed("--spot and --reserved exclude each other")
    now = getattr(args, "now", False)
    if now and args.valid_until:
        raise Failed("--valid-until is for a request that waits; --now does not wait")
    capacity = "spot" if args.spot else "reserved" if args.reserved else "on-demand"
    return Order(
        name=args.name,
        slice=slices.parse_slice(args.type),
        capacity=capacity,
        now=now,
        runtime=args.runtime,
        valid_until=args.valid_until,
        more=tuple(args.gcloud),
    )


def _source_of(args: argparse.Namespace) -> Source:
    return Source(version=args.version, git=args.git, wheel=args.wheel, extras=args.extras, setup=args.setup)


def _job_of(args: argparse.Namespace) -> Job:
    return Job(command=args.command, name=args.job, env=tuple(args.env), sync=tuple(args.sync), every=args.every)


def create(args: argparse.Namespace) -> None:
    cloud.create(_gcloud(args), _order_of(args), wait=not args.no_wait, poll=args.poll)


def wait(args: argparse.Namespace) -> None:
    gcloud = _gcloud(args)
    try:
        cloud.await_ready(gcloud, args.name, poll=args.poll)
    except KeyboardInterrupt:
        raise Failed(f"interrupted. {cloud.left(gcloud, args.name)}", 130) from None


def install(args: argparse.Namespace) -> None:
    remote.install(_gcloud(args), args.name, _source_of(args))


def run(args: argparse.Namespace) -> None:
    remote.run(_gcloud(args), args.name, _job_of(args))


def logs(args: argparse.Namespace) -> None:
    remote.logs(_gcloud(args), args.name, args.job, worker=args.worker, lines=args.lines, follow=args.follow)


def status(args: argparse.Namespace) -> None:
    """Exit status 1 if the slice is not ready, or the job has failed on a worker."""
    gcloud = _gcloud(args)
    if args.name is None:
        return cloud.listing(gcloud)
    state = cloud.state_of(gcloud, args.name)
    if not gcloud.dry_run:
        print(f"{args.name}: {state}" + (f", {state.workers} worker(s)" if state.workers else ""), flush=True)
        if not state.ready:
            raise Failed(f"{args.name} is not ready")
    records = remote.job_status(gcloud, args.name, args.job)
    for record in records:
        print(remote.describe_job(record), flush=True)
    bad = [str(record["worker"]) for record in records if record["state"] in ("failed", "interrupted")]
    if bad:
        raise Failed(f"{args.job} failed on worker {', '.join(bad)}")


def stop(args: argparse.Namespace) -> None:
    remote.stop(_gcloud(args), args.name, args.job)


def sync(args: argparse.Namespace) -> None:
    remote.sync(_gcloud(args), args.name, args.source, args.target, args.worker)


def keep_running(args: argparse.Namespace) -> None:
    order, job = _order_of(args), _job_of(args)
    keep.keep(_gcloud(args), order, _source_of(args), job, poll=args.poll, then_delete=args.delete)


def ssh(args: argparse.Namespace) -> None:
    if args.worker == "all" and not args.command:
        raise Failed("a shell is on one worker; for all of them give a command after --")
    remote.ssh(_gcloud(args), args.name, args.worker, args.command)


def delete(args: argparse.Namespace) -> None:
    cloud.delete(_gcloud(args), args.name, yes=args.yes)


def job(args: argparse.Namespace) -> None:
    work = jobs.ClusterJob(
        name=args.name,
        slice=slices.parse_slice(args.type),
        image=args.image,
        command=args.command,
        env=tuple(args.env),
        slices=args.slices,
        spot=args.spot,
        restarts=args.restarts,
        bucket=args.bucket,
        service_account=args.service_account,
    )
    if args.xpk is not None:
        print(shlex.join(jobs.xpk_command(work, args.xpk, args.zone, args.project)))
    else:
        print(jobs.jobset(work), end="")
