"""What every target writes: one task per run and pool, with what it waits for."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from bigmodel.schedule.problem import Job, Pool

if TYPE_CHECKING:
    from bigmodel.schedule.plan import Plan

GRACE_MINUTES = 10  # that a run may take longer than planned before its engine ends it


@dataclass(frozen=True)
class Task:
    """One run on one pool. after: names of the last tasks of the jobs that it follows; previous: of its own job's runs
    that have ended when it begins. last: whether the job ends with it."""

    name: str
    job: Job
    pool: Pool
    devices: int
    begins: datetime
    minutes: int
    after: tuple[str, ...]
    previous: tuple[str, ...]
    last: bool
    label: str

    @property
    def resumes(self) -> bool:
        return bool(self.previous) or self.job.started

    @property
    def nodes(self) -> int:
        size = self.pool.node_size or self.devices
        return max(1, self.devices // size) if self.devices > size else 1

    @property
    def per_node(self) -> int:
        return self.devices // self.nodes

    @property
    def command(self) -> str:
        """The job's command line; a later run's gets --resume."""
        command = self.job.command.rstrip()  # a text of several lines often ends in a newline
        return f"{command} --resume" if self.resumes else command

    @property
    def exports(self) -> str:
        return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in self.job.env.items())


@dataclass(frozen=True)
class Tasks:
    """Every task in order of its beginning, and remarks that hold for every target."""

    tasks: list[Task]
    remarks: list[str]


def of(plan: Plan) -> Tasks:
    """The plan's runs from Problem.now on.

    Raises:
        ValueError: a planned job has no command.
    """
    problem, clock = plan.problem, plan.problem.clock
    made: dict[str, list[tuple[Task, int, int]]] = {}
    remarks = []
    for j, (job, done) in enumerate(zip(problem.jobs, plan.account.jobs, strict=True)):
        if done.runs and not job.command.strip():
            raise ValueError(f"jobs[{j}].command: is empty, so {job.name} cannot be emitted.")
        if any(len(run.devices) > 1 for run in done.runs):
            remarks.append(
                f"{job.name} runs on several pools at once: one task per pool, which the engine starts alone"
            )
        if not done.runs:
            remarks.append(f"{job.name} is dropped by the plan and not emitted")
    names: dict[str, list] = {job.name: [] for job in problem.jobs}
    for job, done in zip(problem.jobs, plan.account.jobs, strict=True):
        for index, run in enumerate(done.runs):
            names[job.name] += [(_task_name(plan, job, index, run, p), run) for p, _ in run.devices]
    for job, done in zip(problem.jobs, plan.account.jobs, strict=True):
        made[job.name] = []
        for index, run in enumerate(done.runs):
            for p, devices in run.devices:
                name = _task_name(plan, job, index, run, p)
                hours = (run.last - run.first) * problem.slot_hours
                task = Task(
                    name=name,
                    job=job,
                    pool=problem.pools[p],
                    devices=devices,
                    begins=clock.begins(run.first),
                    minutes=math.ceil(hours * 60 - 1e-6) + GRACE_MINUTES,
                    after=tuple(other for before in job.after for other in _ends(names[before])),
                    previous=tuple(_ends([item for item in names[job.name] if item[1].last <= run.first])),
                    last=index == len(done.runs) - 1,
                    label=f"{clock.label(run.first)} to {clock.label(run.last)}, {devices} x {problem.pools[p].name}",
                )
                made[job.name].append((task, run.first, p))
    every = [item for items in made.values() for item in items]
    order = [task for task, _, _ in sorted(every, key=lambda item: (item[1], item[0].name))]
    return Tasks(_in_order(order), remarks)


def _task_name(plan: Plan, job: Job, index: int, run, p: int) -> str:
    pool = f"-{plan.problem.pools[p].name}" if len(run.devices) > 1 else ""
    return f"{job.name}.run{index + 1}{pool}"


def _ends(named) -> list[str]:
    """The tasks that a job ends with."""
    last = max((run.last for _, run in named), default=0)
    return [name for name, run in named if run.last == last]


def _in_order(tasks: list[Task]) -> list[Task]:
    """Every task after those that it names, which begin earlier or at the same time."""
    placed: list[Task] = []
    names: set[str] = set()
    while tasks:
        ready = [task for task in tasks if not ({*task.after, *task.previous} & {other.name for other in tasks})]
        placed.append(ready[0])
        names.add(ready[0].name)
        tasks = [task for task in tasks if task is not ready[0]]
    return placed


def comments(remarks: list[str]) -> str:
    return "".join(f"# {remark}\n" for remark in remarks)


WAIT = """\
wait_until() {  # seconds since 1970
  local left=$(($1 - $(date +%s)))
  if ((left > 0)); then sleep "$left"; fi
}
"""
