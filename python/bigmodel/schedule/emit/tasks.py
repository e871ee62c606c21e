"""What every target writes: one task per run and pool, with what it waits for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from bigmodel.schedule import rules
from bigmodel.schedule.problem import Job, Pool

if TYPE_CHECKING:
    from bigmodel.schedule.plan import Plan

GRACE_MINUTES = 10  # that a run may take longer than planned before its engine ends it


@dataclass(frozen=True)
class Task:
    """One run on one pool. after: names of the last tasks of the jobs that it follows; previous: of its own job's runs
    that have ended when it begins; both without those that an earlier submission has started."""

    name: str
    job: Job
    pool: Pool
    devices: int
    begins: datetime
    minutes: int
    after: tuple[str, ...]
    previous: tuple[str, ...]
    resumes: bool
    label: str

    @property
    def nodes(self) -> int:
        size = self.pool.node_size or self.devices
        return max(1, self.devices // size) if self.devices > size else 1

    @property
    def per_node(self) -> int:
        return self.devices // self.nodes

    @property
    def variables(self) -> dict[str, str]:
        """The command's environment, as far as it is known now."""
        known = {
            "BIGMODEL_JOB": self.job.name,
            "BIGMODEL_NODES": str(self.nodes),
            "BIGMODEL_DEVICES": str(self.per_node),
        }
        return known | self.job.env

    def script(self, node: str, address: str, port: str) -> str:
        """Shell text for each node: the rest of its environment, in the engine's words, and the command; a later run's
        gets --resume."""
        rest = {"BIGMODEL_NODE": node, "MASTER_ADDR": address if self.nodes > 1 else "localhost", "MASTER_PORT": port}
        exports = " ".join(f"{name}={value}" for name, value in rest.items() if name not in self.job.env)
        command = self.job.command.rstrip()  # a text of several lines often ends in a newline
        return f"export {exports}\n{command}{' --resume' if self.resumes else ''}"


@dataclass(frozen=True)
class Tasks:
    """Every task in order of its beginning, and remarks that hold for every target."""

    tasks: list[Task]
    remarks: list[str]


@dataclass(frozen=True)
class _Part:
    """What a run does on one pool. going: it began before Problem.now and simply goes on."""

    name: str
    run: rules.Run
    pool: int
    devices: int
    number: int
    going: bool


def of(plan: Plan) -> Tasks:
    """The plan's runs from Problem.now on, without those that go on as they are."""
    problem, clock = plan.problem, plan.problem.clock
    parts = {job.name: _parts(plan, j) for j, job in enumerate(problem.jobs)}
    remarks = _replanned(plan, [part for items in parts.values() for part in items if part.going])
    tasks = []
    for job in problem.jobs:
        if not parts[job.name]:
            remarks.append(f"{job.name} is dropped by the plan and not emitted")
        if any(len(part.run.devices) > 1 for part in parts[job.name]):
            remarks.append(
                f"{job.name} runs on several pools at once: one task per pool, which the engine starts alone"
            )
        before = [end for name in job.after for end in _ends(parts[name])]
        for part in parts[job.name]:
            if part.going:
                continue
            run, pool = part.run, problem.pools[part.pool]
            previous = _ends([other for other in parts[job.name] if other.run.last <= run.first])
            task = Task(
                name=part.name,
                job=job,
                pool=pool,
                devices=part.devices,
                begins=clock.begins(run.first),
                minutes=math.ceil((run.last - run.first) * problem.slot_hours * 60 - 1e-6) + GRACE_MINUTES,
                after=tuple(other.name for other in before if not other.going),
                previous=tuple(other.name for other in previous if not other.going),
                resumes=part.number > 1 or job.started,
                label=f"{clock.label(run.first)} to {clock.label(run.last)}, {part.devices} x {pool.name}",
            )
            tasks.append(task)
            held = [other.name for other in (*before, *previous) if other.going]
            if held:
                remarks.append(
                    f"{task.name} follows {', '.join(held)}, which runs already: only its time holds it back"
                )
    tasks.sort(key=lambda task: (task.begins, task.name))  # what a task waits for has begun before it
    return Tasks(tasks, remarks + _general(tasks))


def _parts(plan: Plan, j: int) -> list[_Part]:
    """Numbers go on from the runs that began before Problem.now."""
    problem, job, runs = plan.problem, plan.problem.jobs[j], plan.account.jobs[j].runs
    begun = max(len(rules.runs_of(plan.allocation[j][:, : problem.now], 0)), int(job.started))
    going = job.running is not None and not rules.moved(problem, job, runs)
    parts = []
    for number, run in enumerate(runs, begun + (not going)):
        for p, devices in run.devices:
            pool = f"-{problem.pools[p].name}" if len(run.devices) > 1 else ""
            parts.append(_Part(f"{job.name}.run{number}{pool}", run, p, devices, number, going and run is runs[0]))
    return parts


def _replanned(plan: Plan, going: list[_Part]) -> list[str]:
    """What is to be done with the submission of the plan before."""
    problem, clock = plan.problem, plan.problem.clock
    if problem.now == 0:
        return []
    but = f", but for {', '.join(part.name for part in going)}" if going else ""
    first = (
        f"planned again from {clock.label(problem.now)}: end the earlier submit.sh and cancel what it submitted{but}"
    )
    return [first] + [
        f"{part.name} runs already and is not submitted again: leave it until {clock.label(part.run.last)}, which the "
        "time limit that it was given may not reach"
        for part in going
    ]


def _general(tasks: list[Task]) -> list[str]:
    remarks = []
    now = datetime.now(timezone.utc)
    late = [task for task in tasks if task.begins < now]
    if late:
        remarks.append(
            f"{len(late)} of {len(tasks)} runs should have begun by now, {late[0].name} first: they start at once"
        )
    wide = sorted({task.job.name for task in tasks if task.nodes > 1})
    if wide:
        remarks.append(
            f"on several nodes the command is started once on each, and finds the others by MASTER_ADDR, MASTER_PORT, "
            f"BIGMODEL_NODES and BIGMODEL_NODE: {', '.join(wide)}"
        )
    return remarks


def _ends(parts: list[_Part]) -> list[_Part]:
    """What a job ends with."""
    last = max((part.run.last for part in parts), default=0)
    return [part for part in parts if part.run.last == last]


def dns_labels(names: Iterable[str]) -> dict[str, str]:
    """A name for each of `names` that Kubernetes and SkyPilot take: a letter, then lower case, digits and '-'; 58 at
    most, which leaves room for a pod's index.

    Raises:
        ValueError: two would have the same.
    """
    owners: dict[str, str] = {}
    for name in names:
        label = re.sub(r"[^a-z0-9-]+", "-", name.lower())[-56:].lstrip("-")
        label = label if label[0].isalpha() else f"j-{label}"
        if label in owners:
            raise ValueError(f"{name}: as a label, {label!r}, its name is that of {owners[label]} too.")
        owners[label] = name
    return {name: label for label, name in owners.items()}


def check_labels(jobs: Iterable[Job]) -> None:
    dns_labels(f"{job.name}.run1" for job in jobs)


def comments(remarks: list[str]) -> str:
    return "".join(f"# {remark}\n" for remark in remarks)


_TIMED = """\
set -uo pipefail
cd "$(dirname "$0")" || exit
failed=0
start_at() {  # seconds since 1970, a command
  local left=$(($1 - $(date +%s)))
  if ((left > 0)); then sleep "$left"; fi
  shift
  "$@" || { echo "submit.sh: failed: $*" >&2; failed=1; }
}
"""


def timed(tasks: Tasks, remarks: list[str], start: Callable[[Task], str]) -> str:
    """A submit.sh that starts each task by `start`'s shell words at its time, whatever became of the others, and whose
    status says whether all were started."""
    lines = [f"start_at {int(task.begins.timestamp())} {start(task)}\n" for task in tasks.tasks]
    return f"#!/bin/bash\n{comments(remarks)}{_TIMED}{''.join(lines)}exit $failed\n"
