"""The rules of docs/planner.md, read from an allocation alone: what each job does, what it costs, what it breaks.

Knows no variable and no row of the solver's model. Every plan passes through here before it is returned, and every
figure of a plan comes from here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bigmodel.schedule import rates

if TYPE_CHECKING:
    from bigmodel.schedule.problem import Job, Problem

TOLERANCE = 1e-6  # relative, on work and money


@dataclass(frozen=True)
class Run:
    """An unbroken stretch on one pool and count: slots first to last - 1. devices by pool for jobs that mix pools."""

    first: int
    last: int
    devices: tuple[tuple[int, int], ...]  # (pool, devices) pairs
    lost_hours: float = 0.0  # set-up, at its start
    hours: float = 0.0  # until the job's work is done, or the run ends


@dataclass
class JobAccount:
    """What a job does from Problem.now on. cost_by_pool: currency, (pools,). finish: the slot after its last."""

    runs: list[Run] = field(default_factory=list)
    work: float = 0.0
    cost_by_pool: np.ndarray | None = None
    carbon: float = 0.0
    device_hours: float = 0.0
    restart_hours: float = 0.0
    start: int | None = None
    finish: int | None = None
    idle: int | None = None  # the first slot that it holds after its work is done

    @property
    def cost(self) -> float:
        return 0.0 if self.cost_by_pool is None else float(self.cost_by_pool.sum())


@dataclass
class Account:
    """One JobAccount per job, and every broken rule as a sentence."""

    problem: Problem
    jobs: list[JobAccount]
    violations: list[str]

    @cached_property
    def dropped(self) -> list[int]:
        return [j for j, job in enumerate(self.jobs) if not job.runs]

    def measure(self, name: str) -> float:
        """The objective `name` of docs/planner.md: currency, hours, or kg."""
        problem, h = self.problem, self.problem.slot_hours
        pairs = zip(problem.jobs, self.jobs, strict=True)
        kept = [(job, done.runs[-1].last) for job, done in pairs if done.runs]
        if name == "cost":
            lost = sum(problem.jobs[j].value or 0.0 for j in self.dropped)
            return sum(done.cost for done in self.jobs) + lost + stability_cost(problem, self.jobs)
        if name == "carbon":
            return float(sum(done.carbon for done in self.jobs))
        if name == "makespan":
            return max((last * h for _, last in kept), default=0.0)
        if name == "lateness":
            return float(sum(job.priority * late_hours(problem, job, last) for job, last in kept))
        finish = {j: done.finish for j, done in enumerate(self.jobs) if done.finish is not None}
        return max(slowdowns(problem, name, finish).values(), default=0.0)


def check(problem: Problem, allocation: np.ndarray) -> Account:
    """Accounts for an allocation of devices, integers of shape (jobs, pools, slots); slots before Problem.now are past.

    Raises:
        ValueError: the shape is another.
    """
    problem = problem.expanded
    shape = (len(problem.jobs), len(problem.pools), problem.slots)
    if np.shape(allocation) != shape:
        raise ValueError(f"check: allocation has shape {np.shape(allocation)}, but jobs, pools and slots are {shape}.")
    allocation = np.asarray(allocation)
    if allocation.dtype.kind not in "iuf":
        raise ValueError(f"check: allocation must hold whole numbers, got {allocation.dtype}.")
    broken: list[str] = []
    jobs = [_job(problem, job, allocation[j], broken) for j, job in enumerate(problem.jobs)]
    _capacity(problem, allocation, broken)
    _precedence(problem, jobs, broken)
    _budgets(problem, jobs, broken)
    return Account(problem, jobs, broken)


def runs_of(job_allocation: np.ndarray, now: int) -> list[Run]:
    """Maximal stretches of one unchanged allocation from slot `now` on."""
    table = job_allocation[:, now:]
    runs: list[Run] = []
    for column in range(table.shape[1]):
        devices = tuple((int(p), int(table[p, column])) for p in np.flatnonzero(table[:, column]))
        slot = now + column
        if runs and runs[-1].last == slot and runs[-1].devices == devices:
            runs[-1] = Run(runs[-1].first, slot + 1, devices)
        elif devices:
            runs.append(Run(slot, slot + 1, devices))
    return runs


def late_hours(problem: Problem, job: Job, finish: int) -> float:
    if job.deadline is None:
        return 0.0
    return max(0, finish - problem.clock.deadline(job.deadline)) * problem.slot_hours


def moved(problem: Problem, job: Job, runs: list[Run]) -> bool:
    """Whether a job that runs at Problem.now does not go on as it is."""
    if job.running is None:
        return False
    return not (runs and runs[0].first == problem.now and runs[0].devices == _running(problem, job))


def stability_cost(problem: Problem, jobs: list[JobAccount]) -> float:
    pairs = zip(problem.jobs, jobs, strict=True)
    return problem.stability * sum(moved(problem, job, done.runs) for job, done in pairs)


def may_drop(problem: Problem, job: Job) -> bool:
    """A job with a value may be left out where its loss counts: cost has a weight, or comes first, or only lateness
    comes before it. A job whose deadline is soft is not dropped to keep lateness low."""
    if job.value is None:
        return False
    objective = problem.objective
    if objective.weights:
        return objective.weights.get("cost", 0.0) > 0
    return objective.order[0] == "cost" or objective.order[:2] == ("lateness", "cost") and not job.soft


def fastest_slots(problem: Problem, job: Job) -> int:
    """Slots that the job's remaining work takes alone, on its fastest pool and count: no plan takes fewer."""
    # What runs may go on without loss; what has begun and does not run loses its restart first.
    setup = 0.0 if job.running is not None else job.restart if job.started else 0.0
    return _fastest(problem, job, job.work - job.done, problem.count[:, problem.now :], setup, job.running is None)


def alone_slots(problem: Problem, job: Job) -> int:
    """Slots of the fastest possible run alone, of the whole job: what slowdowns are measured by."""
    return _fastest(problem, job, job.work, problem.count, 0.0, True)


def _fastest(problem: Problem, job: Job, work: float, count: np.ndarray, setup: float, starts: bool) -> int:
    hours = []
    rate = 0.0
    for p, pool in enumerate(problem.pools):
        most = count[p].max()
        fits = [rate for n, rate in rates.hourly(job, pool).items() if n <= most]
        if fits:
            rate += max(fits)
            hours.append(setup + (pool.startup_hours if starts else 0.0) + work / max(fits))
    if job.mix_pools and rate:
        hours = [work / rate]
    return max(1, int(np.ceil(min(hours) / problem.slot_hours - TOLERANCE))) if hours else problem.slots + 1


def sharer(name: str, job: Job) -> str:
    """Whose slowdown "fairness" or "owner_fairness" looks at: the job itself, or its owner."""
    return job.name if name == "fairness" else job.owner


def scales(problem: Problem, name: str, members: Iterable[int]) -> dict[str, tuple[int, int]]:
    """By job or owner: the first release of those of its jobs that are in `members`, and the least slots from there in
    which each of them could end alone."""
    rows: dict[str, list[tuple[int, int]]] = {}
    for j in members:
        job = problem.jobs[j]
        release = problem.clock.release(job.release)
        rows.setdefault(sharer(name, job), []).append((release, release + alone_slots(problem, job)))
    found = {}
    for key, pairs in rows.items():
        first = min(release for release, _ in pairs)
        found[key] = (first, max(end for _, end in pairs) - first)
    return found


def slowdowns(problem: Problem, name: str, finish: dict[int, int]) -> dict[str, float]:
    """(finish - release) / (fastest possible run alone), by job; by owner, the last finish - the first release, over
    the least time in which each of the owner's jobs could end alone. finish: of each job that is planned."""
    last: dict[str, int] = {}
    for j, end in finish.items():
        key = sharer(name, problem.jobs[j])
        last[key] = max(end, last.get(key, end))
    return {key: (last[key] - first) / least for key, (first, least) in scales(problem, name, finish).items()}


def _running(problem: Problem, job: Job) -> tuple[tuple[int, int], ...]:
    assert job.running is not None
    return ((problem.pool_index(job.running.pool), job.running.devices),)


def _job(problem: Problem, job: Job, table: np.ndarray, broken: list[str]) -> JobAccount:
    if not ((table >= 0) & (table == np.floor(table)) & np.isfinite(table)).all():
        broken.append(f"{job.name}: a device count is negative or not whole")
        return JobAccount(cost_by_pool=np.zeros(len(problem.pools)))
    runs = runs_of(table, problem.now)
    done = JobAccount(runs=runs, cost_by_pool=np.zeros(len(problem.pools)))
    if not runs:
        if job.value is None:
            broken.append(f"{job.name}: is not planned")
        return done
    _shape(problem, job, runs, broken)
    _walk(problem, job, done, broken)
    return done


def _shape(problem: Problem, job: Job, runs: list[Run], broken: list[str]) -> None:
    first, last = problem.window(job)
    if runs[0].first < first:
        broken.append(f"{job.name}: starts in slot {runs[0].first}, before slot {first}")
    if runs[-1].last > last:
        broken.append(f"{job.name}: runs until slot {runs[-1].last}, past slot {last}")
    for run in runs:
        if len(run.devices) > 1 and not job.mix_pools:
            broken.append(f"{job.name}: runs on several pools in slot {run.first}")
        for p, devices in run.devices:
            if devices not in rates.counts(job, problem.pools[p]):
                broken.append(f"{job.name}: may not run on {devices} devices of {problem.pools[p].name}")
    if job.mix_pools:
        return
    stays = job.running is not None and not moved(problem, job, runs)
    lengths = [run.last - run.first for run in runs]
    if stays:
        assert job.running is not None
        lengths[0] += job.running.slots
    elif job.running is not None:
        lengths.insert(0, job.running.slots)
    if any(length < job.min_run for length in lengths[:-1]):
        broken.append(f"{job.name}: a run before the last is shorter than {job.min_run} slots")
    if not job.preemptible and len(lengths) > 1:
        broken.append(f"{job.name}: is interrupted, but not preemptible")


def _walk(problem: Problem, job: Job, done: JobAccount, broken: list[str]) -> None:
    """Follows the job slot by slot: work, hours lost to set-up, money and carbon."""
    h, left = problem.slot_hours, job.work - job.done
    stays = job.running is not None and not moved(problem, job, done.runs)
    hourly = [rates.hourly(job, pool) for pool in problem.pools]
    done.start = done.runs[0].first
    for index, run in enumerate(done.runs):
        rate = sum(hourly[p].get(devices, 0.0) for p, devices in run.devices)
        startup = 0.0 if job.mix_pools else max(problem.pools[p].startup_hours for p, _ in run.devices)
        restart = job.restart if index or job.started else 0.0
        lost = job.running.setup_left if stays and not index and job.running else startup + restart
        hours = 0.0
        for slot in range(run.first, run.last):
            if left <= TOLERANCE * job.work:
                broken.append(f"{job.name}: holds devices in slot {slot} after its work is done")
                done.idle = slot
                return
            waste = min(h, max(0.0, lost - (slot - run.first) * h))
            needed = min(h, waste + left / rate) if rate else h
            left -= rate * (needed - waste)
            ends = left <= TOLERANCE * job.work
            hours += needed
            for p, devices in run.devices:
                held = needed if ends and problem.pools[p].billing == "second" else h
                done.cost_by_pool[p] += held * devices * problem.price[p, slot]  # type: ignore[index]
                done.carbon += held * devices * problem.carbon[p, slot]
                done.device_hours += held * devices
        done.restart_hours += min(lost, (run.last - run.first) * h)
        done.runs[index] = Run(run.first, run.last, run.devices, lost, hours)
    done.finish = done.runs[-1].last
    done.work = job.work - job.done - left
    if left > TOLERANCE * job.work:
        broken.append(f"{job.name}: {left:g} of {job.work:g} {job.unit} are not done")


def _capacity(problem: Problem, allocation: np.ndarray, broken: list[str]) -> None:
    used = allocation.sum(axis=0)
    for p, slot in np.argwhere(used > problem.count):
        if slot >= problem.now:
            has = problem.count[p, slot]
            broken.append(f"{problem.pools[p].name}: {used[p, slot]} devices in slot {slot}, which has {has}")
    for group, limit in problem.quotas.items():
        members = [p for p, pool in enumerate(problem.pools) if pool.quota_group == group]
        total = used[members].sum(axis=0)
        for slot in np.flatnonzero(total > limit):
            if slot >= problem.now:
                broken.append(f"quota {group}: {total[slot]} devices in slot {slot}, over {limit}")


def _precedence(problem: Problem, jobs: list[JobAccount], broken: list[str]) -> None:
    index = {job.name: j for j, job in enumerate(problem.jobs)}
    for j, job in enumerate(problem.jobs):
        for before in job.after if jobs[j].runs else ():
            finish = jobs[index[before]].finish
            if finish is None:
                broken.append(f"{job.name}: runs, but {before}, which it follows, does not")
            elif jobs[j].runs[0].first < finish:
                broken.append(f"{job.name}: starts before {before} has ended")


def _budgets(problem: Problem, jobs: list[JobAccount], broken: list[str]) -> None:
    for budget in budgets(problem):
        paid = sum(problem.jobs[j].spent + jobs[j].cost for j in budget.members)
        if paid > budget.limit * (1 + TOLERANCE) + TOLERANCE:
            broken.append(f"{budget.name}: {paid:.2f} {problem.currency}, over {budget.limit:.2f}")


class Budget(NamedTuple):
    """Most that the jobs `members` may cost: one job's budget, or an owner's, or, with neither, that of all."""

    name: str
    limit: float
    members: list[int]
    job: int | None = None
    owner: str | None = None


def budgets(problem: Problem) -> list[Budget]:
    jobs = problem.jobs
    rows = [Budget(f"budget of {job.name}", job.budget, [j], j) for j, job in enumerate(jobs) if job.budget is not None]
    for owner, limit in problem.budgets.items():
        members = [j for j, job in enumerate(jobs) if job.owner == owner]
        rows.append(Budget(f"budget of owner {owner}", limit, members, owner=owner))
    if problem.budget is not None:
        rows.append(Budget("budget", problem.budget, list(range(len(jobs)))))
    return rows


def trimmed(problem: Problem, allocation: np.ndarray) -> np.ndarray:
    """The allocation without slots that a job holds after its work is done."""
    while True:
        idle = [(j, job.idle) for j, job in enumerate(check(problem, allocation).jobs) if job.idle is not None]
        if not idle:
            return allocation
        allocation = allocation.copy()
        for j, slot in idle:
            allocation[j, :, slot:] = 0
