"""Keep a job running on a slice that may be taken away.

Spot chips can be taken back at any time. The loop here asks every ``poll`` seconds how slice and job are; when the
slice is gone, it withdraws what is left of it, asks for another, installs, and starts the same command again. The
command must find its own work again: ``--resume_from_checkpoint latest`` with an ``--output_dir`` that outlives the
machine, on a mounted bucket or copied with ``--sync``.
"""

from __future__ import annotations

import shlex
import time

from tpu import cloud, remote
from tpu.cloud import Order, State
from tpu.gcloud import Failed, Gcloud, call, say
from tpu.remote import Job, Source

TROUBLES = 5
"""Failures in a row, of gcloud or of installing, after which the loop gives up."""
GONE = ("SUSPENDED", "PREEMPTED", "TERMINATED")
GOING = ("SUSPENDING", "DELETING")


class Ended(Failed):
    """The loop is over: another try would end the same way."""


def keep(
    gcloud: Gcloud, order: Order, source: Source, job: Job, *, poll: float = 30, then_delete: bool = False
) -> None:
    """Run a job to its end, on as many slices as it takes; a job that is already running is only watched.

    Raises:
      Failed: the job failed (with its exit status), or there can be no slice for it.
    """
    remote.run_command(gcloud, order.name, job)  # mistakes in it are found before anything costs money
    remote.requirement_of(source)
    if gcloud.dry_run:
        return plan(gcloud, order, source, job, poll, then_delete)
    name = order.name
    try:
        if cloud.state_of(gcloud, name) == State(None, None):
            cloud.create(gcloud, order, wait=False)
        there, troubles = True, 0
        while True:
            found = ""
            try:
                if not there and cloud.state_of(gcloud, name) == State(None, None):
                    cloud.create(gcloud, order, wait=False)
                there = True
                found = look(gcloud, order, source, job, poll)
                if found == "finished":
                    break
                if found == "gone":
                    cloud.delete(gcloud, name, yes=True)
                    there = False
                troubles = 0
            except Ended:
                raise
            except Failed as error:
                troubles += 1
                say(f"{error}\n({troubles} of {TROUBLES} failures in a row)")
                if troubles == TROUBLES:
                    raise Failed(f"given up. {cloud.left(gcloud, name)}", error.status) from None
            if found != "gone":
                time.sleep(poll)
    except KeyboardInterrupt:
        raise Failed(f"interrupted; a job that runs goes on. {cloud.left(gcloud, name)}", 130) from None
    say(f"{job.name} has finished on all workers")
    if then_delete:
        cloud.delete(gcloud, name, yes=True)
    else:
        say(cloud.left(gcloud, name))


def look(gcloud: Gcloud, order: Order, source: Source, job: Job, poll: float) -> str:
    """Look once, and do what is needed: "finished" if the job has, "gone" if the slice was taken away, else ""."""
    name = order.name
    state = cloud.state_of(gcloud, name)
    if state == State(None, None):
        raise Ended(f"{name} was deleted by somebody; the loop ends here")
    if state.request in GONE or state.node in GONE:
        say(f"{name} was taken away ({state}); asking for another")
        return "gone"
    if state.request in GOING or state.node in GOING:
        return ""
    if not state.ready:
        if not state.pending:
            raise Ended(f"{name} will not become ready ({state}). {cloud.left(gcloud, name)}")
        try:
            cloud.await_ready(gcloud, name, poll=poll)
        except Failed:
            return ""  # the next look finds out why
    return "finished" if tend(gcloud, order, source, job, poll) else ""


def tend(gcloud: Gcloud, order: Order, source: Source, job: Job, poll: float) -> bool:
    """See to the job on a slice that is ready; True if it has finished on all workers."""
    try:
        records = remote.job_status(gcloud, order.name, job.name)
    except Failed as error:
        if "run install first" not in str(error):
            raise
        records = []
    others = [record for record in records if record["command"] not in (None, [*job.command])]
    if any(record["state"] == "running" for record in others):
        raise Ended(f"another command is running as {job.name!r} ({shlex.join(others[0]['command'])}); stop it first")
    records = [] if others else records  # an earlier job, which has ended
    states = {record["state"] for record in records}
    if states <= {"none"}:
        remote.install(gcloud, order.name, source)
        remote.run(gcloud, order.name, job)
        return False
    if states == {"finished"}:
        return True
    if states - {"running", "finished"}:
        # When chips are taken away, jobs end a moment before the state of the slice says so.
        time.sleep(poll)
        if not cloud.state_of(gcloud, order.name).ready:
            return False
        settle(gcloud, order.name, source, job)
    return False


def settle(gcloud: Gcloud, name: str, source: Source, job: Job) -> None:
    """Deal with a job that has ended on some workers of a slice that is still there.

    Raises:
      Ended: it failed, or somebody stopped it.
    """
    records = remote.job_status(gcloud, name, job.name)
    states = {record["state"] for record in records}
    for record in records:
        if record["state"] in ("failed", "stopped"):
            remote.stop(gcloud, name, job.name)  # the others would wait for that worker for ever
            say("\n".join(map(remote.describe_job, records)))
            how = "failed" if record["state"] == "failed" else "was stopped"
            logs = call(gcloud, "logs", f"{name} --job {job.name} --worker {record['worker']}")
            raise Ended(
                f"{job.name} {how} on worker {record['worker']}; its log: {logs}. {cloud.left(gcloud, name)}",
                record["code"] or 1,
            )
    if not states - {"running", "finished"}:
        return
    if "running" in states:
        return remote.stop(gcloud, name, job.name, again=True)  # it starts again once it has ended everywhere
    say(f"{job.name} was interrupted (the machines restarted?); starting it again")
    if "none" in states:  # a worker that was replaced
        remote.install(gcloud, name, source)
    remote.run(gcloud, name, job)


def plan(gcloud: Gcloud, order: Order, source: Source, job: Job, poll: float, then_delete: bool) -> None:
    """Print what :func:`keep` runs."""
    cloud.create(gcloud, order, poll=poll)
    remote.install(gcloud, order.name, source)
    remote.run(gcloud, order.name, job)
    gcloud.note(f"every {poll:g} s: is it still there, and does the job run?")
    cloud.state_of(gcloud, order.name)
    remote.job_status(gcloud, order.name, job.name)
    gcloud.note("when it is SUSPENDED, PREEMPTED or TERMINATED; then all of this again, from the first command on")
    gcloud.run(gcloud.command("queued-resources", "delete", order.name, "--force", "--quiet"))
    if then_delete:
        gcloud.note("when the job has finished")
        cloud.delete(gcloud, order.name, yes=True)
