"""SkyPilot: one task per run as a managed job; submit.sh starts each at its time, since a task carries none."""

from __future__ import annotations

import shlex
from typing import Any

from bigmodel.schedule.emit.tasks import GRACE_MINUTES, Task, Tasks, check_labels, comments, dns_labels, timed
from bigmodel.schedule.problem import Pool, Problem


def check(problem: Problem, pools: list[Pool]) -> None:
    check_labels(problem.expanded.jobs)
    for pool in pools:
        if pool.kind != "cpu" and not (pool.accelerator or pool.model):
            raise ValueError(f"pool {pool.name}: accelerator is missing, which SkyPilot needs.")


def render(tasks: Tasks) -> tuple[dict[str, str], list[str]]:
    import yaml

    remarks = [
        *tasks.remarks,
        "SkyPilot tasks carry no start time: submit.sh must stay up and starts each run at its own",
        "SkyPilot knows no afterok between managed jobs: a run starts at its time whatever became of others",
    ]
    labels = dns_labels(task.name for task in tasks.tasks)
    files = {
        f"{task.name}.yaml": comments([task.label])
        + yaml.safe_dump(_task(task, labels[task.name]), sort_keys=False, width=1000)
        for task in tasks.tasks
    }

    def start(task: Task) -> str:
        return f"sky jobs launch --yes --detach-run --name {labels[task.name]} {shlex.quote(task.name + '.yaml')}"

    files["submit.sh"] = timed(tasks, remarks, start)
    return files, remarks


def _task(task: Task, name: str) -> dict[str, Any]:
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
    script = task.script("$SKYPILOT_NODE_RANK", '$(head -n 1 <<< "$SKYPILOT_NODE_IPS")', "29500")
    # A run before the last stops at its time; the job's checkpoint is what the next one resumes from.
    run = (
        f"# at most the run's length and {GRACE_MINUTES} minutes of grace\n"
        f"timeout {task.minutes * 60} bash -euo pipefail -c {shlex.quote(script)}\n"
    )
    return {"name": name, "resources": resources, "num_nodes": task.nodes, "envs": task.variables, "run": run}
