"""Kueue: one suspended batch/v1 Job per run with its queue's label; submit.sh creates each at its time.

A run on several nodes is an Indexed Job with a headless Service, through which its pods find each other by name.
"""

from __future__ import annotations

import shlex
from typing import Any

from bigmodel.schedule.emit.tasks import GRACE_MINUTES, Task, Tasks, check_labels, comments, dns_labels, timed
from bigmodel.schedule.problem import Pool, Problem
from bigmodel.schedule.validate import NAME

_RESOURCE = {"cpu": "cpu", "gpu": "nvidia.com/gpu", "tpu": "google.com/tpu", "fpga": "xilinx.com/fpga"}
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


def check(problem: Problem, pools: list[Pool]) -> None:
    jobs = problem.expanded.jobs
    check_labels(jobs)
    for job in jobs:
        if not job.image:
            raise ValueError(f"job {job.name}: image is missing, which Kubernetes needs.")
    for pool in pools:
        if not pool.queue:
            raise ValueError(f"pool {pool.name}: queue is missing, the name of a Kueue LocalQueue.")
        if pool.kind not in _RESOURCE:
            raise ValueError(f"pool {pool.name}: kind is {pool.kind!r}; for Kubernetes it is {', '.join(_RESOURCE)}.")
        for what in ("queue", "accelerator"):
            label = getattr(pool, what)
            if label and not NAME.fullmatch(label):
                raise ValueError(f"pool {pool.name}: {what} is {label!r}, which is no Kubernetes label.")


def render(tasks: Tasks) -> tuple[dict[str, str], list[str]]:
    import yaml

    remarks = [
        *tasks.remarks,
        "Kubernetes Jobs carry no start time: submit.sh must stay up and creates each run at its own",
        "Kubernetes knows no afterok between Jobs: a run is created at its time whatever became of others",
    ]
    if any(task.nodes > 1 for task in tasks.tasks):
        remarks.append("the Service of a run on several nodes stays until kubectl delete --filename is given its file")
    labels = dns_labels(task.name for task in tasks.tasks)
    files = {}
    for task in tasks.tasks:
        name = labels[task.name]
        objects = [_service(name), _job(task, name)] if task.nodes > 1 else [_job(task, name)]
        text = yaml.safe_dump_all(objects, sort_keys=False, width=1000)
        files[f"{task.name}.yaml"] = comments([task.label]) + text
    files["submit.sh"] = timed(
        tasks, remarks, lambda task: f"kubectl create --filename {shlex.quote(task.name + '.yaml')}"
    )
    return files, remarks


def _service(name: str) -> dict[str, Any]:
    """Gives the pods of Job `name` the host names NAME-INDEX.NAME, before they are ready, too."""
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": name}}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def _literal(text: str) -> str:
    """Kubernetes takes $(NAME) and $$ in a container's command and environment for its own."""
    return text.replace("$", "$$")


def _job(task: Task, name: str) -> dict[str, Any]:
    wanted = {_RESOURCE[task.pool.kind]: str(task.per_node)}
    if task.job.data_gb:
        wanted["ephemeral-storage"] = f"{task.job.data_gb:g}G"
    script = task.script("${JOB_COMPLETION_INDEX:-0}", f"{name}-0.{name}", "29500")
    container: dict[str, Any] = {
        "name": "job",
        "image": task.job.image,
        "command": ["/bin/bash", "-euo", "pipefail", "-c", _literal(script)],
        "env": [{"name": key, "value": _literal(value)} for key, value in task.variables.items()],
        "resources": {"requests": wanted, "limits": dict(wanted)},
    }
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
        pod["subdomain"] = name
    note = f"activeDeadlineSeconds is the run's length and {GRACE_MINUTES} minutes of grace"
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": {QUEUE_LABEL: task.pool.queue}, "annotations": {"bigmodel/note": note}},
        "spec": spec,
    }
