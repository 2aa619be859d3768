"""Slices in the cloud: create, wait, status, delete.

A slice is made by a *queued resource*, a request that waits until chips are free, whose node has the same name; with
``--now`` by ``tpu-vm create``, which fails at once if there are none.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from tpu.gcloud import Failed, Gcloud, call, say
from tpu.slices import Slice

WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
"""States of a request that may become ACTIVE."""
STARTING = ("CREATING", "STARTING", "RESTARTING", "REPAIRING", "REIMAGING", "UNHIDING")
"""States of a node that may become READY."""
CAPACITIES = {"on-demand": [], "spot": ["--spot"], "reserved": ["--reserved"]}


@dataclass(frozen=True)
class Order:
    """What to create.

    Attributes:
      name: of the request and of its node.
      slice: the chips.
      capacity: "on-demand", "spot" (much cheaper, taken away at any time) or "reserved" (bought beforehand).
      now: fail if there is no capacity instead of waiting in the queue.
      runtime: the software version; None for that of the generation.
      valid_until: give up if the request has waited so long, e.g. "6h"; None for never.
      more: further flags for gcloud, as they are.
    """

    name: str
    slice: Slice
    capacity: str = "on-demand"
    now: bool = False
    runtime: str | None = None
    valid_until: str | None = None
    more: tuple[str, ...] = ()


class State(NamedTuple):
    """What there is of a slice.

    Attributes:
      request: state of the queued resource, e.g. "WAITING_FOR_RESOURCES"; None if there is none.
      node: state of the node, e.g. "READY"; None if there is none.
      detail: what went wrong, if the request says so.
      workers: number of virtual machines of the node.
    """

    request: str | None
    node: str | None
    detail: str = ""
    workers: int = 0

    @property
    def ready(self) -> bool:
        return self.node == "READY" and self.request in (None, "ACTIVE")

    @property
    def pending(self) -> bool:
        """Whether waiting may help."""
        if self.request is None:
            return self.node in STARTING
        return self.request in WAITING or (self.request == "ACTIVE" and self.node in (None, *STARTING))

    def __str__(self) -> str:
        request = f"request {self.request}" if self.request else ""
        node = f"node {self.node}" if self.node else ""
        return (", ".join(filter(None, (request, node))) or "nothing") + (f": {self.detail}" if self.detail else "")


def check_name(name: str) -> str:
    """A name that gcloud accepts.

    Raises:
      Failed: it does not.
    """
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,60}[a-z0-9])?", name):
        raise Failed(
            f"the name {name!r} must be of lower-case letters, digits and hyphens, begin with a letter, not end with a "
            "hyphen, and have at most 62 characters"
        )
    return name


def check_zone(gcloud: Gcloud, one: Slice) -> None:
    """Refuse a zone that does not have the type. The table of zones may be behind, so for others gcloud is asked.

    Raises:
      Failed: the zone does not have it.
    """
    zones = one.generation.zones
    if gcloud.zone is None or gcloud.zone in zones:
        return
    known = f"{one.generation.name} ({', '.join(zones)})"
    gcloud.note(f"{gcloud.zone} is not among the known zones of {known}: is it there?")
    types = gcloud.read(gcloud.command("accelerator-types", "list", "--format=value(type)"))
    if not gcloud.dry_run and one.accelerator_type not in (types or "").split():
        raise Failed(f"{gcloud.zone} has no {one.accelerator_type}; {one.generation.name} is in {', '.join(zones)}")


def create_command(gcloud: Gcloud, order: Order) -> list[str]:
    """The command that creates the request, or with ``now`` the node."""
    runtime = order.runtime or order.slice.generation.runtime
    rest = [f"--accelerator-type={order.slice.accelerator_type}", *CAPACITIES[order.capacity], *order.more]
    if order.now:
        return gcloud.command("tpu-vm", "create", order.name, f"--version={runtime}", *rest)
    if order.valid_until:
        rest.append(f"--valid-until-duration={order.valid_until}")
    words = ("queued-resources", "create", order.name, f"--node-id={order.name}", f"--runtime-version={runtime}")
    return gcloud.command(*words, *rest)


def state_of(gcloud: Gcloud, name: str) -> State:
    """What there is of this name."""
    request, node = gcloud.describe("queued-resources", name), gcloud.describe("tpu-vm", name)
    said = (request or {}).get("state", {})
    return State(
        request=said.get("state", "STATE_UNSPECIFIED") if request else None,
        node=node.get("state", "STATE_UNSPECIFIED") if node else None,
        detail=_reason(said),
        workers=len((node or {}).get("networkEndpoints", ())),
    )


def _reason(state: dict[str, Any]) -> str:
    """The message of a failed request, which is in the part of its state that is named after it."""
    parts = [part.get("error", {}).get("message", "") for part in state.values() if isinstance(part, dict)]
    return " ".join(filter(None, parts))


def create(gcloud: Gcloud, order: Order, *, wait: bool = True, poll: float = 30) -> None:
    """Create a slice and wait until it is ready.

    Raises:
      Failed: there is one of this name, the zone does not have the type, or gcloud failed.
    """
    check_zone(gcloud, order.slice)
    gcloud.note("refused if one of these finds something")
    there = state_of(gcloud, order.name)
    if there.request or there.node:
        how = f"wait for it: {call(gcloud, 'wait', order.name)}" if there.pending else "use it"
        raise Failed(
            f"{order.name} exists already ({there}); {how}, or delete it: {call(gcloud, 'delete', order.name)}"
        )
    if not gcloud.dry_run:
        say(f"creating {order.name}: {order.slice.accelerator_type}, {order.slice.hosts} worker(s), {order.capacity}")
    try:
        gcloud.run(create_command(gcloud, order))
        if wait:
            await_ready(gcloud, order.name, poll=poll)
    except KeyboardInterrupt:
        raise Failed(f"interrupted. {left(gcloud, order.name)}", 130) from None


def left(gcloud: Gcloud, name: str) -> str:
    """What remains when waiting ends early, and what it costs."""
    return (
        f"{name} is still requested or running: once its state is ACTIVE or READY it costs money. "
        f"Wait for it: {call(gcloud, 'wait', name)}   Give it up: {call(gcloud, 'delete', name)}"
    )


def await_ready(gcloud: Gcloud, name: str, *, poll: float = 30) -> State:
    """Wait until a slice is ready, and say when its state changes.

    Raises:
      Failed: it will not become ready, or there is none.
    """
    gcloud.note(f"every {poll:g} s, until the request is ACTIVE and the node is READY")
    last, began = None, time.monotonic()
    while True:
        now = state_of(gcloud, name)
        if gcloud.dry_run or now.ready:
            if not gcloud.dry_run:
                end = call(gcloud, "delete", name)
                say(f"{name} is ready with {now.workers} worker(s). It costs money until: {end}")
            return now
        if not now.pending:
            there = f" It is still listed: {call(gcloud, 'delete', name)}" if now.request or now.node else ""
            raise Failed(f"{name} will not become ready ({now}).{there}")
        if now != last:
            say(f"[{time.monotonic() - began:5.0f} s] {now}")
            last = now
        time.sleep(poll)


def delete(gcloud: Gcloud, name: str, *, yes: bool = False) -> None:
    """Delete the node and its request, after asking.

    Raises:
      Failed: the user does not want to, or gcloud failed. That there is nothing to delete is no error.
    """
    found = state_of(gcloud, name)
    if not gcloud.dry_run:
        if not (found.request or found.node):
            return say(f"{name}: nothing to delete")
        if not yes and not _agreed(f"delete {name} ({found}) and everything on its disks?"):
            raise Failed("not deleted; --yes deletes without asking")
    if gcloud.dry_run or found.request:
        gcloud.note("if there is a request; it takes its node with it")
        gcloud.run(gcloud.command("queued-resources", "delete", name, "--force", "--quiet"))
    if gcloud.dry_run or not found.request:
        gcloud.note("if there is only a node")
        gcloud.run(gcloud.command("tpu-vm", "delete", name, "--quiet"))
    if not gcloud.dry_run:
        say(f"{name} is deleted")


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        return False
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        return False


def listing(gcloud: Gcloud) -> None:
    """Print all requests and nodes of the zone: what may cost money."""
    gcloud.run(gcloud.command("queued-resources", "list"))
    gcloud.run(gcloud.command("tpu-vm", "list"))
