"""Jobs for Google Kubernetes Engine: a JobSet, or the command of XPK, which writes one itself."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import Any

from tpu.gcloud import Failed
from tpu.slices import Slice


@dataclass(frozen=True)
class ClusterJob:
    """What runs in a cluster.

    Attributes:
      name: of the JobSet.
      slice: the chips.
      image: a container image with the package, e.g. from ``tpu/Dockerfile``.
      command: the words of the command.
      env: ``NAME=VALUE`` pairs.
      slices: number of slices that work together.
      spot: run on spot nodes.
      restarts: how often the job starts again after a failure or a preemption.
      bucket: a bucket that is mounted at ``/bucket``; None for none.
      service_account: the Kubernetes service account that may use the bucket; None for the namespace's default.
    """

    name: str
    slice: Slice
    image: str
    command: tuple[str, ...]
    env: tuple[str, ...] = ()
    slices: int = 1
    spot: bool = False
    restarts: int = 100
    bucket: str | None = None
    service_account: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise Failed(f"the name {self.name!r} must be of at most 40 lower-case letters, digits and hyphens")
        if not self.command:
            raise Failed("no command; give it after --, e.g. -- python tpu/check.py")
        if self.bucket is not None and not re.fullmatch(r"(gs://)?[a-z0-9][a-z0-9._-]*/?", self.bucket):
            raise Failed(f"--bucket {self.bucket!r} must be the name of a bucket, which is mounted whole at /bucket")
        for pair in self.env:
            if not re.match(r"[A-Za-z_]\w*=", pair):
                raise Failed(f"--env {pair!r} must be NAME=VALUE")


def jobset(job: ClusterJob) -> str:
    """The JobSet as YAML, with the commands for it as comments."""
    one = job.slice
    spot = " --spot" if job.spot else ""
    pool = (
        f"gcloud container node-pools create {job.name} --cluster=CLUSTER --location=LOCATION "
        f"--machine-type={one.machine} --tpu-topology={one.topology} --num-nodes={one.hosts}{spot}"
    )
    comments = (
        f"A pool of nodes for each slice: {pool}",
        f"Start: kubectl apply --filename=FILE.yaml   End: kubectl delete jobset {job.name}",
        f"Logs: kubectl logs --selector=jobset.sigs.k8s.io/jobset-name={job.name} --prefix --follow",
    )
    return "".join(f"# {line}\n" for line in comments) + yaml(manifest(job))


def manifest(job: ClusterJob) -> dict[str, Any]:
    """The JobSet: one Job for each slice, one Pod for each of its hosts. GKE tells the Pods of each other, which is
    what JAX needs to join them."""
    one = job.slice
    selector = {"gke-tpu-accelerator": one.generation.gke, "gke-tpu-topology": one.topology}
    if job.spot:
        selector["gke-spot"] = "true"
    container: dict[str, Any] = {"name": "job", "image": job.image, "command": [*job.command]}
    if job.env:
        container["env"] = [{"name": name, "value": value} for name, _, value in (p.partition("=") for p in job.env)]
    container["resources"] = {"limits": {"google.com/tpu": one.chips_per_host}}
    pod: dict[str, Any] = {"restartPolicy": "Never"}
    if job.service_account:
        pod["serviceAccountName"] = job.service_account
    pod["nodeSelector"] = {f"cloud.google.com/{name}": value for name, value in selector.items()}
    pod["containers"] = [container]
    template: dict[str, Any] = {"spec": pod}
    if job.bucket:
        container["volumeMounts"] = [{"name": "bucket", "mountPath": "/bucket"}]
        attributes = {"bucketName": job.bucket.removeprefix("gs://").strip("/"), "mountOptions": "implicit-dirs"}
        volume = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}
        pod["volumes"] = [{"name": "bucket", "csi": volume}]
        template = {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}, "spec": pod}
    work = {"parallelism": one.hosts, "completions": one.hosts, "backoffLimit": 0, "template": template}
    apart = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name, "annotations": apart},
        "spec": {
            "failurePolicy": {"maxRestarts": job.restarts},
            "replicatedJobs": [{"name": "slice", "replicas": job.slices, "template": {"spec": work}}],
        },
    }


def yaml(value: Any, indent: str = "") -> str:
    """A tree of dicts, lists and scalars as YAML: strings are quoted as in JSON, of which YAML is a superset."""
    lines = ""
    for key, item in value.items():
        if isinstance(item, dict):
            lines += f"{indent}{key}:\n{yaml(item, indent + '  ')}"
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            parts = (yaml(part, indent + "    ") for part in item)
            lines += f"{indent}{key}:\n" + "".join(f"{indent}  - {part.lstrip()}" for part in parts)
        else:
            lines += f"{indent}{key}: {json.dumps(item)}\n"
    return lines


def xpk_command(job: ClusterJob, cluster: str, zone: str | None, project: str | None) -> list[str]:
    """The command that starts the same job with XPK.

    Raises:
      Failed: XPK cannot mount the bucket this way.
    """
    if job.bucket or job.service_account:
        raise Failed("--bucket and --service-account are for a JobSet; with XPK, attach storage to the cluster")
    place = [f"--{name}={value}" for name, value in (("zone", zone), ("project", project)) if value]
    return [
        *("xpk", "workload", "create", f"--cluster={cluster}", f"--workload={job.name}"),
        *(f"--tpu-type={job.slice.accelerator_type}", f"--num-slices={job.slices}", f"--docker-image={job.image}"),
        *(f"--env={pair}" for pair in job.env),
        *(("--spot",) if job.spot else ()),
        *(f"--max-restarts={job.restarts}", f"--command={shlex.join(job.command)}", *place),
    ]
