"""A problem as arrays: windows, configurations, prices of one stage of the objective. What every solving part reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from bigmodel import _planner
from bigmodel.schedule import rates, rules
from bigmodel.schedule.problem import Job, Problem


@dataclass(frozen=True)
class Limit:
    """sum over `members` of weights-weighted measures <= most. weights: of "cost", "carbon" and "lateness"."""

    name: str
    members: tuple[int, ...]
    weights: dict[str, float]
    most: float


@dataclass(frozen=True)
class Stage:
    """What one solve minimises: weights of the measures, deadlines that an earlier stage left, and its limits.

    ends: (jobs,) the slot before which each job must end, at most its own. Only separable measures ("cost", "carbon",
    "lateness") are priced; "makespan" and the fairnesses become `ends`.
    """

    weights: dict[str, float]
    ends: tuple[int, ...]
    limits: tuple[Limit, ...] = ()
    drops: frozenset[int] = frozenset()  # jobs that may be dropped

    @property
    def implied(self) -> Limit | None:
        """A limit on the money of all jobs where it is money that is minimised."""
        if set(self.weights) != {"cost"} or not self.weights["cost"]:
            return None
        everyone = tuple(range(len(self.ends)))
        return next((some for some in self.limits if some.members == everyone and set(some.weights) == {"cost"}), None)


@dataclass(frozen=True)
class JobData:
    """One job. pool, devices, rate (work per hour), startup (hours): (configurations,). first <= slot < last."""

    job: Job
    index: int
    first: int
    last: int
    work: float
    pool: np.ndarray
    devices: np.ndarray
    rate: np.ndarray
    startup: np.ndarray
    second: np.ndarray  # billed by the second
    drop: float  # what dropping it costs in this stage; inf where it may not be
    late: np.ndarray  # (slots + 1,): what ending at each slot costs in this stage
    early: np.ndarray  # (slots + 1,): what starting at each slot costs; 0 but for prices of precedence
    running: int | None  # the configuration in which it runs at Problem.now
    after: tuple[int, ...]

    @property
    def switches(self) -> bool:
        """Whether anything ties one slot to the next."""
        job = self.job
        return bool(job.min_run > 1 or job.restart > 0 or (self.startup > 0).any() or not job.preemptible)

    @cached_property
    def known(self) -> dict[tuple[int, int], tuple[float, float]]:
        """(rate, startup) by (pool, devices)."""
        columns = (column.tolist() for column in (self.pool, self.devices, self.rate, self.startup))
        return {(p, n): (rate, startup) for p, n, rate, startup in zip(*columns, strict=True)}

    @cached_property
    def native(self) -> _planner.Job:
        """The job as the compiled module takes it."""
        job, running = self.job, self.job.running
        columns = (self.pool, self.devices, self.rate, self.startup, self.second)
        return _planner.Job(
            configurations=list(zip(*(column.tolist() for column in columns), strict=True)),
            work=self.work,
            restart=job.restart,
            min_run=job.min_run,
            started=job.started,
            preemptible=job.preemptible,
            runs=running is not None,
            running=-1 if self.running is None else self.running,
            running_slots=0 if running is None else running.slots,
            setup_left=0.0 if running is None else running.setup_left,
            late=self.late,
            early=self.early,
        )


@dataclass
class Instance:
    """unit: what a device-hour of each pool and slot costs in this stage, (pools, slots)."""

    problem: Problem
    stage: Stage
    jobs: list[JobData]
    unit: np.ndarray
    count: np.ndarray
    groups: list[tuple[tuple[int, ...], int]] = field(default_factory=list)  # pools that share a quota

    @property
    def size(self) -> int:
        """About how many columns the whole programme has."""
        jobs = self.jobs
        return sum(max(0, data.last - data.first) * len(data.pool) * (3 if data.switches else 1) for data in jobs)

    @property
    def h(self) -> float:
        return self.problem.slot_hours

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(job, its successor) whose order can be priced: neither mixes pools, and the successor has not begun."""
        return [
            (before, data.index)
            for data in self.jobs
            for before in data.after
            if not (data.job.mix_pools or self.jobs[before].job.mix_pools or data.job.started or data.job.running)
        ]

    def free(self) -> np.ndarray:
        """Devices that one job could take alone, (pools, slots)."""
        count = self.count.copy()
        for members, limit in self.groups:
            count[list(members)] = np.minimum(count[list(members)], limit)
        return count


def stage_for(problem: Problem, weights: dict[str, float]) -> Stage:
    """The stage that minimises weighted separable measures under the problem's own deadlines and budgets."""
    ends = tuple(problem.window(job)[1] for job in problem.jobs)
    limits = []
    for budget in rules.budgets(problem):
        spent = sum(problem.jobs[j].spent for j in budget.members)
        limits.append(Limit(budget.name, tuple(budget.members), {"cost": 1.0}, budget.limit - spent))
    drops = frozenset(j for j, job in enumerate(problem.jobs) if rules.may_drop(problem, job))
    return Stage(weights, ends, tuple(limits), drops)


def build(problem: Problem, stage: Stage) -> Instance:
    """Arrays of an expanded problem; windows are tightened by what precedence leaves."""
    unit = stage.weights.get("cost", 0.0) * problem.price + stage.weights.get("carbon", 0.0) * problem.carbon
    count = problem.count.copy()
    count[:, : problem.now] = 0
    groups = [
        (tuple(p for p, pool in enumerate(problem.pools) if pool.quota_group == group), limit)
        for group, limit in problem.quotas.items()
    ]
    first, last = _windows(problem, stage)
    jobs = [_job(problem, stage, j, first[j], last[j]) for j in range(len(problem.jobs))]
    return Instance(problem, stage, jobs, unit, count, [group for group in groups if group[0]])


def _windows(problem: Problem, stage: Stage) -> tuple[list[int], list[int]]:
    """Earliest starts go forward along precedence, latest ends backward; a droppable job pushes nobody."""
    index = {job.name: j for j, job in enumerate(problem.jobs)}
    first = [problem.window(job)[0] for job in problem.jobs]
    last = list(stage.ends)
    least = [rules.fastest_slots(problem, job) for job in problem.jobs]
    for j in _topological(problem):
        for before in problem.jobs[j].after:
            first[j] = max(first[j], first[index[before]] + least[index[before]])
    for j in reversed(_topological(problem)):
        if j not in stage.drops:
            for before in problem.jobs[j].after:
                last[index[before]] = min(last[index[before]], last[j] - least[j])
    return first, last


def _topological(problem: Problem) -> list[int]:
    index = {job.name: j for j, job in enumerate(problem.jobs)}
    order: list[int] = []
    placed: set[int] = set()
    while len(order) < len(problem.jobs):
        for j, job in enumerate(problem.jobs):
            if j not in placed and all(index[before] in placed for before in job.after):
                placed.add(j)
                order.append(j)
    return order


def _job(problem: Problem, stage: Stage, j: int, first: int, last: int) -> JobData:
    job = problem.jobs[j]
    rows = []
    for p, pool in enumerate(problem.pools):
        rows += [
            (p, n, rate, pool.startup_hours, pool.billing == "second") for n, rate in rates.hourly(job, pool).items()
        ]
    pools, devices, rate, startup, second = (
        (np.array(column) for column in zip(*rows, strict=True)) if rows else [np.zeros(0, dtype=int)] * 5
    )
    weight = stage.weights.get("lateness", 0.0) * job.priority
    late = np.array([weight * rules.late_hours(problem, job, end) for end in range(problem.slots + 1)])
    drop = np.inf
    if j in stage.drops:
        moved = problem.stability if job.running is not None else 0.0
        drop = stage.weights.get("cost", 0.0) * ((job.value or 0.0) + moved)
    running = None
    if job.running is not None:
        same = (pools == problem.pool_index(job.running.pool)) & (devices == job.running.devices)
        running = int(np.flatnonzero(same)[0]) if same.any() else None
    index = {other.name: i for i, other in enumerate(problem.jobs)}
    return JobData(
        job=job,
        index=j,
        first=first,
        last=last,
        work=job.work - job.done,
        pool=pools.astype(int),
        devices=devices.astype(int),
        rate=rate.astype(float),
        startup=startup.astype(float),
        second=second.astype(bool),
        drop=drop,
        late=late,
        early=np.zeros(problem.slots + 1),
        running=running,
        after=tuple(index[before] for before in job.after),
    )
