"""Slurm: one batch script per run, and a submit.sh that chains their ids.

afterok between jobs (what follows needs success), afterany between runs of one job (a run that its time ends is what
the plan wants). --begin is counted from now by the cluster's own clock: its zone may be another than the problem's, and
where clocks are put back a local time would be two.
"""

from __future__ import annotations

import shlex

from bigmodel.schedule.emit.tasks import GRACE_MINUTES, Task, Tasks, comments
from bigmodel.schedule.problem import Pool, Problem

# Below the ports that Linux hands out by itself; runs that share a node have ports of their own.
_PORT = "$((20000 + SLURM_JOB_ID % 10000))"


def check(problem: Problem, pools: list[Pool]) -> None:
    for pool in pools:
        if pool.kind not in ("cpu", "gpu") and not pool.gres:
            raise ValueError(f"pool {pool.name}: gres is missing, Slurm's name for devices of kind {pool.kind!r}.")


def render(tasks: Tasks) -> tuple[dict[str, str], list[str]]:
    remarks = list(tasks.remarks)
    for pool in {task.pool.name: task.pool for task in tasks.tasks}.values():
        if pool.ownership == "spot":
            remarks.append(f"pool {pool.name} is spot: Slurm requeues a job only if its partition preempts by requeue")
    jobs = {task.job.name: task.job for task in tasks.tasks}.values()
    if any(job.image for job in jobs):
        remarks.append("images need a container plugin of Slurm, so they are not asked for")
    if any(job.data_gb for job in jobs):
        remarks.append("data are to be in place when a run begins; --tmp asks for their room alone")
    files = {f"{task.name}.sbatch": _script(task) for task in tasks.tasks}
    files["submit.sh"] = _submit(tasks.tasks, remarks)
    return files, remarks


def _script(task: Task) -> str:
    lines = [f"--job-name={task.name}", f"--nodes={task.nodes}", "--ntasks-per-node=1"]
    if task.pool.partition:
        lines.append(f"--partition={shlex.quote(task.pool.partition)}")
    if task.pool.kind == "cpu":
        lines.append(f"--cpus-per-task={task.per_node}")
    else:
        lines.append(f"--gres={shlex.quote(task.pool.gres or 'gpu')}:{task.per_node}")
    lines.append(f"--time={task.minutes}")
    if task.job.data_gb:
        lines.append(f"--tmp={task.job.data_gb:g}G")
    lines.append("--output=%x-%j.out")
    options = "".join(f"#SBATCH {line}\n" for line in lines)
    note = f"# {task.label}; --time is the run's length and {GRACE_MINUTES} minutes of grace, --begin is submit.sh's\n"
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in task.variables.items())
    return f"#!/bin/bash\n{options}{note}set -euo pipefail\n{exports}{_command(task)}\n"


def _command(task: Task) -> str:
    """A batch script runs on its first node alone; srun starts what it is given once on each."""
    script = task.script("$SLURM_NODEID", '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)', _PORT)
    if task.nodes == 1:
        return script
    cpus = f" --cpus-per-task={task.per_node}" if task.pool.kind == "cpu" else ""  # srun does not take sbatch's
    return f"srun --kill-on-bad-exit=1{cpus} bash -euo pipefail -c {shlex.quote(script)}"


_BEGIN = """\
begin() {  # seconds since 1970
  local left=$(($1 - $(date +%s)))
  echo "--begin=now+$((left > 0 ? left : 0))"
}"""


def _submit(tasks: list[Task], remarks: list[str]) -> str:
    ids = {task.name: f"id_{index}" for index, task in enumerate(tasks)}
    head = f"#!/bin/bash\n{comments(remarks)}set -euo pipefail"
    lines = [head, 'cd "$(dirname "$0")"', _BEGIN]
    for task in tasks:
        waits = [f"afterok:${ids[name]}" for name in task.after] + [f"afterany:${ids[name]}" for name in task.previous]
        option = f' "$(begin {int(task.begins.timestamp())})"'
        if waits:
            option += f' --dependency="{",".join(waits)}"'
        lines.append(f"{ids[task.name]}=$(sbatch --parsable{option} {shlex.quote(task.name + '.sbatch')})")
        lines.append(f"{ids[task.name]}=${{{ids[task.name]}%%;*}}")  # on a federation the cluster's name follows
        lines.append(f'echo "{task.name} ${ids[task.name]}"')
    return "\n".join(lines) + "\n"
