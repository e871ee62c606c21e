"""Why there is no plan: what no plan can meet, found without a solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from bigmodel.schedule import rates, rules
from bigmodel.schedule.problem import Job, Problem
from bigmodel.schedule.stretch import FAMILIES, Change, Deadline, listed, loosened, plural

_NAMED = 4  # jobs that a sentence names
_VALUE_COUNTS = "which counts only where cost has a weight, comes first in the order, or second to lateness (hard jobs)"


@dataclass(frozen=True)
class Cause:
    """A reason in words, proven. families: those of which one must be stretched, none if nothing helps. least: the
    change without which the reason stays, where there is one."""

    text: str
    families: frozenset[str] = field(default=frozenset(FAMILIES))
    least: Change | None = None


def necessary(problem: Problem) -> list[Cause]:
    """Jobs that fit nowhere, or not in time, or not in their budget; work that is more than all devices can do."""
    jobs = [job for job in problem.jobs if not rules.may_drop(problem, job)]
    hourly = [[rates.hourly(job, pool) for pool in problem.pools] for job in jobs]
    causes = [cause for job, rate in zip(jobs, hourly, strict=True) for cause in _alone(problem, job, rate)]
    causes = causes or _chains(problem)
    return causes or [*_crowded(problem, jobs, hourly), *_dear(problem)]


def together(problem: Problem) -> Cause:
    """What is said of a problem of which only its solution proves that it has no plan."""
    jobs = [job for job in problem.jobs if not rules.may_drop(problem, job)]
    meets = ["every deadline"] if any(job.deadline is not None and not job.soft for job in jobs) else []
    budgets = len(rules.budgets(problem))
    meets += ["every budget" if budgets > 1 else "the budget"] if budgets else []
    return Cause(f"no plan within capacity {'meets ' + listed(meets) if meets else 'ends before the horizon does'}")


def kept(problem: Problem) -> list[str]:
    """That some jobs have a value and may not be dropped all the same."""
    names = [job.name for job in problem.jobs if job.value is not None and not rules.may_drop(problem, job)]
    return [f"{listed(names)} may not be dropped despite a value, {_VALUE_COUNTS}"] if names else []


# --- one job ----------------------------------------------------------------------------------------------------------


def _alone(problem: Problem, job: Job, hourly: list[dict[int, float]]) -> list[Cause]:
    """hourly: the job's work per hour by devices, of each pool."""
    most = problem.count[:, problem.now :].max(axis=1)
    there = [{n: r for n, r in h.items() if n <= top} for h, top in zip(hourly, most, strict=True)]
    if not any(hourly):
        return [Cause(f"{job.name} fits on no pool: {_unfit(problem, job)}", frozenset())]
    if not any(there):
        least = min(n for h in hourly for n in h)
        text = f"{job.name} needs at least {plural(least, 'device')} of one pool, more than any has"
        return [Cause(text, frozenset({"capacity"}))]
    first, last = problem.window(job)
    short = first + rules.fastest_slots(problem, job) - last
    if short > 0:
        text = f"{job.name} misses {_end(job)} by {plural(short, 'slot')} even alone on the fastest devices"
        return [_late(problem, job, text, last + short, lambda wide: first + rules.fastest_slots(wide, job))]
    if job.budget is not None:
        cost = least_cost(problem, job) + job.spent
        if cost > job.budget * (1 + rules.TOLERANCE):
            text = f"{job.name} costs at least {cost:.2f} {problem.currency}, over its budget of {job.budget:.2f}"
            return [Cause(text)]
    return []


def _unfit(problem: Problem, job: Job) -> str:
    why = []
    for pool in problem.pools:
        most = rates.points(job, pool.name)[-1][0]
        if not most:
            continue
        if pool.memory is not None and job.memory > pool.memory:
            why.append(f"{pool.name} has {pool.memory:g} GiB a device, and it needs {job.memory:g}")
        elif job.counts is not None and min(job.counts) > most:
            why.append(f"its counts are above {most}, the most with a throughput on {pool.name}")
        else:
            why.append(
                f"{pool.name} gives more than a node of {pool.node_size} by whole nodes, and none of its counts is"
            )
    return "; ".join(why) or "it has a throughput on none"


def _end(job: Job) -> str:
    return "the horizon's end" if job.soft or job.deadline is None else "its deadline"


def _late(problem: Problem, job: Job, text: str, earliest: int, ends: Callable[[Problem], int]) -> Cause:
    """ends: the slot before which the job ends at the earliest in a problem, for one without capacity's limits."""
    hard = job.deadline is not None and not job.soft
    helps = {"deadlines"} if hard and earliest <= problem.slots else set()
    if ends(loosened(problem, {"capacity"})) <= problem.window(job)[1]:
        helps.add("capacity")
    least = Deadline(problem.job_index(job.name), earliest) if "deadlines" in helps else None
    return Cause(text, frozenset(helps), least)


def least_cost(problem: Problem, job: Job) -> float:
    """Currency: no plan does the job's remaining work for less."""
    first, last = problem.window(job)
    window = slice(first, max(last, first + 1))
    per_work = [
        problem.price[p, window].min() * n / rate
        for p, pool in enumerate(problem.pools)
        for n, rate in rates.hourly(job, pool).items()
        if n <= problem.count[p, problem.now :].max()
    ]
    return float(min(per_work, default=0.0) * (job.work - job.done))


# --- several ----------------------------------------------------------------------------------------------------------


def _chains(problem: Problem) -> list[Cause]:
    """Jobs that end too late after all that they follow, each as fast as it can be; the first of a chain."""
    ends, causes = _earliest(problem), []
    late: set[str] = set()
    for job in problem.jobs:
        last = problem.window(job)[1]
        if ends[job.name] > last and not rules.may_drop(problem, job):
            chain = _behind(problem, job, ends)
            if not late & set(chain):
                end = "the horizon's end" if _end(job) != "its deadline" else f"the deadline of {job.name}"
                text = f"{listed(chain)}, one after the other and on the fastest devices, miss {end}"
                short = ends[job.name] - last
                ends_in = partial(_ends_in, job.name)
                causes.append(_late(problem, job, f"{text} by {plural(short, 'slot')}", last + short, ends_in))
            late.add(job.name)
    return causes


def _ends_in(name: str, problem: Problem) -> int:
    return _earliest(problem)[name]


def _earliest(problem: Problem) -> dict[str, int]:
    """The slot before which each job ends at the earliest, devices being no matter."""
    ends: dict[str, int] = {}
    jobs = {job.name: job for job in problem.jobs}
    while len(ends) < len(jobs):
        for name, job in jobs.items():
            if name not in ends and all(before in ends for before in job.after):
                first = max([problem.window(job)[0], *(ends[before] for before in job.after)])
                ends[name] = first + rules.fastest_slots(problem, job)
    return ends


def _behind(problem: Problem, job: Job, ends: dict[str, int]) -> list[str]:
    """The chain that makes a job's earliest end what it is."""
    jobs = {other.name: other for other in problem.jobs}
    chain = [job.name]
    while jobs[chain[0]].after:
        before = max(jobs[chain[0]].after, key=ends.__getitem__)
        if ends[before] <= problem.window(jobs[chain[0]])[0]:
            break
        chain.insert(0, before)
    return chain


def _crowded(problem: Problem, jobs: list[Job], hourly: list[list[dict[int, float]]]) -> list[Cause]:
    """Jobs of the same pools and the same time that need more device-hours than there are."""
    if not jobs:
        return []
    rows = []
    for job, rate in zip(jobs, hourly, strict=True):
        hours = min(n / per_hour for h in rate for n, per_hour in h.items()) * (job.work - job.done)
        rows.append((job, frozenset(p for p, h in enumerate(rate) if h), *problem.window(job), hours))
    starts, first = np.unique([row[2] for row in rows], return_inverse=True)
    ends, last = np.unique([row[3] for row in rows], return_inverse=True)
    for pools in [*dict.fromkeys(row[1] for row in rows), frozenset(range(len(problem.pools)))]:
        mine = np.array([row[1] <= pools for row in rows])
        need = np.zeros((len(starts), len(ends)))
        np.add.at(need, (first[mine], last[mine]), np.array([row[4] for row in rows])[mine])
        need = need[::-1].cumsum(axis=0)[::-1].cumsum(axis=1)  # of jobs that begin and end within
        until = np.append(0, problem.count[sorted(pools)].sum(axis=0).cumsum()) * problem.slot_hours
        there = np.maximum(until[ends] - until[starts][:, None], 0)
        short = np.argwhere(need > there * (1 + rules.TOLERANCE) + rules.TOLERANCE)
        if len(short):
            a, z = min(short.tolist(), key=lambda pair: ends[pair[1]] - starts[pair[0]])
            within = [row[0] for row in rows if row[1] <= pools and row[2] >= starts[a] and row[3] <= ends[z]]
            return [_crowd(problem, within, pools, int(starts[a]), int(ends[z]), need[a, z], there[a, z])]
    return []


def _crowd(problem: Problem, jobs: list[Job], pools, first: int, last: int, need: float, there: float) -> Cause:
    who = f"{len(jobs)} jobs" if len(jobs) > _NAMED else listed([job.name for job in jobs])
    names = listed([problem.pools[p].name for p in sorted(pools)])
    needs = "needs" if len(jobs) == 1 else "need"
    text = f"{who} {needs} {need:.7g} device-hours of {names} in slots {first} to {last - 1}, which have {there:.7g}"
    helps = {"capacity"} | ({"deadlines"} if last < problem.slots else set())
    return Cause(text, frozenset(helps))


def _dear(problem: Problem) -> list[Cause]:
    """Budgets below the sum of what each job costs at least."""
    causes = []
    for budget in rules.budgets(problem):
        jobs = [problem.jobs[j] for j in budget.members]
        least = sum(job.spent for job in jobs)
        least += sum(least_cost(problem, job) for job in jobs if not rules.may_drop(problem, job))
        if budget.job is None and least > budget.limit * (1 + rules.TOLERANCE) + rules.TOLERANCE:
            who = "the jobs" if budget.owner is None else f"the jobs of {budget.owner}"
            over = f"{problem.currency}, over the {budget.name} of {budget.limit:.2f}"
            causes.append(Cause(f"{who} cost at least {least:.2f} {over}"))
    return causes
