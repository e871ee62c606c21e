"""SkyPilot: one task per run as a managed job; submit.sh starts each at its time, since a task carries none."""

from __future__ import annotations

import shlex
from typing import Any

from bigmodel.schedule.emit.tasks import GRACE_MINUTES, WAIT, Task, Tasks, comments


def render(tasks: Tasks) -> tuple[dict[str, str], list[str]]:
    import yaml

    remarks = list(tasks.remarks)
    remarks.append("SkyPilot tasks carry no start time: submit.sh must stay up and starts each run at its own")
    remarks.append("SkyPilot knows no afterok between managed jobs: a run starts at its time whatever became of others")
    files = {}
    for task in tasks.tasks:
        if task.pool.kind != "cpu" and not (task.pool.accelerator or task.pool.model):
            raise ValueError(f"pool {task.pool.name}: accelerator is missing, which SkyPilot needs.")
        head = comments([task.label, *[remark for remark in remarks if remark.startswith(f"{task.job.name} ")]])
        files[f"{task.name}.yaml"] = head + yaml.safe_dump(_task(task), sort_keys=False, width=1000)
    lines = ["#!/bin/bash", comments(remarks).rstrip("\n"), "set -euo pipefail", 'cd "$(dirname "$0")"', WAIT]
    for task in sorted(tasks.tasks, key=lambda task: task.begins):
        lines.append(f"wait_until {int(task.begins.timestamp())}")
        name = shlex.quote(_name(task))
        lines.append(f"sky jobs launch --yes --detach-run --name {name} {shlex.quote(task.name + '.yaml')}")
    files["submit.sh"] = "\n".join(lines) + "\n"
    return files, remarks


def _name(task: Task) -> str:
    return task.name.replace(".", "-").replace("_", "-")


def _task(task: Task) -> dict[str, Any]:
    resources: dict[str, Any] = {}
    if task.pool.kind == "cpu":
        resources["cpus"] = f"{task.per_node}+"
    else:
        resources["accelerators"] = f"{task.pool.accelerator or task.pool.model}:{task.per_node}"
    if task.pool.ownership == "spot":
        resources["use_spot"] = True
    if task.pool.region:
        resources["region"] = task.pool.region
    if task.job.image:
        resources["image_id"] = f"docker:{task.job.image}"
    if task.job.data_gb:
        resources["disk_size"] = int(max(64, task.job.data_gb * 1.5))
    body: dict[str, Any] = {"name": _name(task), "resources": resources, "num_nodes": task.nodes}
    if task.job.env:
        body["envs"] = dict(task.job.env)
    # A run before the last stops at its time; the job's checkpoint is what the next one resumes from.
    seconds = task.minutes * 60
    body["run"] = (
        f"# at most the run's length and {GRACE_MINUTES} minutes of grace\n"
        f"timeout {seconds} bash -c {shlex.quote(task.command)}\n"
    )
    return body
