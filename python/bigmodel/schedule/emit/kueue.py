"""Kueue: one suspended batch/v1 Job per run with its queue's label; submit.sh creates each at its time."""

from __future__ import annotations

import re
import shlex
from typing import Any

from bigmodel.schedule.emit.tasks import GRACE_MINUTES, WAIT, Task, Tasks, comments
from bigmodel.schedule.validate import NAME

_RESOURCE = {"tpu": "google.com/tpu", "fpga": "xilinx.com/fpga"}
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


def render(tasks: Tasks) -> tuple[dict[str, str], list[str]]:
    import yaml

    remarks = list(tasks.remarks)
    remarks.append("Kubernetes Jobs carry no start time: submit.sh must stay up and creates each run at its own")
    remarks.append("Kubernetes knows no afterok between Jobs: a run is created at its time whatever became of others")
    files: dict[str, str] = {}
    names: dict[str, str] = {}
    for task in tasks.tasks:
        if not task.job.image:
            raise ValueError(f"job {task.job.name}: image is missing, which Kubernetes needs.")
        if not task.pool.queue:
            raise ValueError(f"pool {task.pool.name}: queue is missing, the name of a Kueue LocalQueue.")
        for what in ("queue", "accelerator"):
            label = getattr(task.pool, what)
            if label and not NAME.fullmatch(label):
                raise ValueError(f"pool {task.pool.name}: {what} is {label!r}, which is no Kubernetes label.")
        name = _name(task)
        if name in names:
            raise ValueError(f"job {task.job.name}: in Kubernetes its name {name!r} is that of {names[name]} too.")
        names[name] = task.job.name
        files[f"{task.name}.yaml"] = comments([task.label]) + yaml.safe_dump(
            _job(task, name), sort_keys=False, width=1000
        )
    lines = ["#!/bin/bash", comments(remarks).rstrip("\n"), "set -euo pipefail", 'cd "$(dirname "$0")"', WAIT]
    for task in sorted(tasks.tasks, key=lambda task: task.begins):
        lines.append(f"wait_until {int(task.begins.timestamp())}")
        lines.append(f"kubectl create --filename {shlex.quote(task.name + '.yaml')}")
    files["submit.sh"] = "\n".join(lines) + "\n"
    return files, remarks


def _name(task: Task) -> str:
    """A DNS label: lower case, at most 63 characters."""
    return re.sub(r"[^a-z0-9-]+", "-", task.name.lower())[-63:].strip("-")


def _job(task: Task, name: str) -> dict[str, Any]:
    wanted: dict[str, Any] = {}
    if task.pool.kind == "cpu":
        wanted["cpu"] = str(task.per_node)
    else:
        wanted[_RESOURCE.get(task.pool.kind, "nvidia.com/gpu")] = str(task.per_node)
    if task.job.data_gb:
        wanted["ephemeral-storage"] = f"{task.job.data_gb:g}G"
    container: dict[str, Any] = {
        "name": "job",
        "image": task.job.image,
        "command": ["/bin/bash", "-c", task.command],
        "resources": {"requests": wanted, "limits": dict(wanted)},
    }
    if task.job.env:
        container["env"] = [{"name": key, "value": value} for key, value in task.job.env.items()]
    pod: dict[str, Any] = {"restartPolicy": "Never", "containers": [container]}
    if task.pool.accelerator:
        pod["nodeSelector"] = {"bigmodel/accelerator": task.pool.accelerator}
    spec: dict[str, Any] = {
        "suspend": True,
        "parallelism": task.nodes,
        "completions": task.nodes,
        "backoffLimit": 0,
        "activeDeadlineSeconds": task.minutes * 60,
        "template": {"spec": pod},
    }
    if task.nodes > 1:
        spec["completionMode"] = "Indexed"
    note = f"activeDeadlineSeconds is the run's length and {GRACE_MINUTES} minutes of grace"
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": {QUEUE_LABEL: task.pool.queue}, "annotations": {"bigmodel/note": note}},
        "spec": spec,
    }
