"""Planning again: the past stays, the rest is planned from where the jobs really are."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bigmodel.schedule import explain, rates, rules, validate
from bigmodel.schedule.errors import Infeasible
from bigmodel.schedule.problem import Job, Objective, PerSlot, Problem, Rate, Running, When

if TYPE_CHECKING:
    from bigmodel.schedule.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What is known at `now` that the plan did not know.

    progress: work done since the job began, by job; without it, what was planned. throughput: points that replace a
    job's own on the same pools. failed: jobs that stopped (without progress, half a checkpoint's interval is lost).
    cancelled: jobs that end; what follows them no longer waits. gone: pools without devices from now on. prices,
    counts: per-slot values of pools. deadlines: by job; None takes one away. jobs: new ones.
    """

    progress: Mapping[str, float] = field(default_factory=dict)
    throughput: Mapping[str, Sequence[Rate]] = field(default_factory=dict)
    failed: Sequence[str] = ()
    cancelled: Sequence[str] = ()
    gone: Sequence[str] = ()
    prices: Mapping[str, PerSlot] = field(default_factory=dict)
    counts: Mapping[str, PerSlot] = field(default_factory=dict)
    deadlines: Mapping[str, When] = field(default_factory=dict)
    jobs: Sequence[Job] = ()


def replan(
    plan: Plan, now: When, changes: Changes | Mapping[str, Any] | None = None, *, stability=None, **options
) -> Plan:
    """Plans the rest of `plan` from slot `now` on; of an ISO time, from the first slot that begins at or after it.

    The new plan's problem holds the jobs that are not done; its allocation before `now`, and its `past`, are what was.
    A hard deadline that can no longer be met is noted and becomes "as soon as possible": lateness is minimised first.

    Args:
        stability: currency that moving a running job costs besides its restart; None keeps the problem's.
        options: of `solve`.

    Raises:
        ValueError: a `now` that is none, an unknown job or pool in `changes`, or nothing is left to do.
        Infeasible, Unknown: as `solve`.
    """
    from bigmodel.schedule.solver import TIME_LIMIT, solve

    begin = time.monotonic()
    changes = changes if isinstance(changes, Changes) else _changes(changes or {})
    now = _slot(plan, now)
    problem, rows, past = remaining(plan, now, changes)
    if stability is not None:
        problem = replace(problem, stability=stability)
    late = [job.name for job in problem.jobs if not job.soft and _hopeless(problem, job)]
    notes = [f"{name}: its deadline can no longer be met; it ends as soon as possible" for name in late]
    notes += _freed(plan.problem, problem, changes)
    problem = _soften(problem, late)
    hard = [job.name for job in problem.jobs if not job.soft and job.deadline is not None]
    try:
        found = solve(problem, **options | ({"explain": False} if hard else {}))
    except Infeasible:
        if not hard:
            raise
        problem = _soften(problem, hard)
        left = options.get("time_limit", TIME_LIMIT) - (time.monotonic() - begin)
        found = solve(problem, **options | {"time_limit": max(left, 0.1)})
        missed = [name for name in hard if name in found.finish and _is_late(problem, name, found.finish[name])]
        notes += [f"{name}: its deadline can no longer be met beside the others; it ends late" for name in missed]
    allocation = found.allocation.copy()
    allocation[:, :, :now] = rows
    return replace(
        found,
        allocation=allocation,
        notes=(*notes, *found.notes),
        past=tuple(past),
        moves=tuple(_moves(found)),
    )


def _slot(plan: Plan, now: When) -> int:
    if not isinstance(now, str):
        return now
    try:
        return plan.problem.clock.release(now)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"replan: now: {now!r} is neither a slot nor an ISO time ({error}).") from None


def remaining(plan: Plan, now: int, changes: Changes) -> tuple[Problem, np.ndarray, list[dict[str, Any]]]:
    """What is left to plan at slot `now`, the past allocation of its jobs, and all rows of the past."""
    old = plan.problem
    validate.whole(now, "replan: now", least=old.now, most=old.slots - 1)
    _known(old, changes)
    before = np.where(np.arange(old.slots)[None, None, :] < now, plan.allocation, 0)
    account = rules.check(old, before)
    pools = [_pool(old, p, now, changes) for p in range(len(old.pools))]
    counts = replace(old, pools=tuple(pools), jobs=old.jobs).count
    jobs: list[Job] = []
    rows: list[np.ndarray] = []
    gone: list[tuple[Job, rules.JobAccount]] = []
    finished = set(changes.cancelled) | {row["job"] for row in plan.past} - {job.name for job in old.jobs}
    for j, job in enumerate(old.jobs):
        cancelled = job.name in changes.cancelled
        current = None if cancelled else _job(old, job, account.jobs[j], now, changes, counts)
        if current is None:
            finished.add(job.name)
            gone.append((job, account.jobs[j]))
        else:
            jobs.append(current)
            rows.append(plan.allocation[j, :, :now])
    jobs += changes.jobs
    if not jobs:
        raise ValueError("replan: every job is done or cancelled, so nothing is left to plan.")
    jobs = [replace(job, after=tuple(name for name in job.after if name not in finished)) for job in jobs]
    # What runs although its predecessor turns out not to be done has to stop.
    jobs = [replace(job, running=None) if job.after else job for job in jobs]
    owners = {job.owner for job in jobs}
    budget = None if old.budget is None else max(0.0, old.budget - sum(job.spent + done.cost for job, done in gone))
    budgets = {owner: limit for owner, limit in old.budgets.items() if owner in owners}
    for job, done in gone:
        if job.owner in budgets:
            budgets[job.owner] = max(0.0, budgets[job.owner] - job.spent - done.cost)
    changed = replace(old, pools=tuple(pools), jobs=tuple(jobs), now=now, budget=budget, budgets=budgets)
    problem = changed.expanded
    rows += [np.zeros((len(pools), now), dtype=np.int64)] * (len(problem.jobs) - len(rows))
    return problem, np.array(rows), [*plan.past, *replace(plan, allocation=before).rows()]


def _changes(given: Mapping[str, Any]) -> Changes:
    if not isinstance(given, Mapping):
        raise ValueError(f"replan: changes: must be a table or Changes, got {given!r}.")
    known = [field.name for field in fields(Changes)]
    for name, value in given.items():
        validate.choice(name, "replan: changes", known)
        wanted = Mapping if name in ("progress", "throughput", "prices", "counts", "deadlines") else (list, tuple, set)
        if not isinstance(value, wanted):
            kind = "a table" if wanted is Mapping else "a list"
            raise ValueError(f"replan: changes.{name}: must be {kind}, got {value!r}.")
    return Changes(**given)


def _freed(old: Problem, new: Problem, changes: Changes) -> list[str]:
    """What no longer waits, since a job that it followed was cancelled."""
    left = {job.name for job in new.jobs}
    return [
        f"{job.name}: it no longer waits for {before}, which was cancelled"
        for job in old.jobs
        for before in job.after
        if job.name in left and before in changes.cancelled
    ]


def _known(problem: Problem, changes: Changes) -> None:
    jobs, pools = {job.name for job in problem.jobs}, {pool.name for pool in problem.pools}
    for name, given in vars(changes).items():
        if name != "jobs":
            for key in given:
                validate.choice(key, f"replan: changes.{name}", pools if name in ("gone", "prices", "counts") else jobs)


def _pool(old: Problem, p: int, now: int, changes: Changes):
    pool = old.pools[p]
    if pool.name in changes.prices:
        pool = replace(pool, price=changes.prices[pool.name])
    if pool.name in changes.counts:
        pool = replace(pool, count=changes.counts[pool.name])
    if pool.name in changes.gone:
        counts = old.count[p].copy()
        counts[now:] = 0
        pool = replace(pool, count={"slots": counts.tolist()})
    return pool


def _job(old: Problem, job: Job, done: rules.JobAccount, now: int, changes: Changes, counts: np.ndarray) -> Job | None:
    """The job as it stands at `now`; None if it is finished."""
    failed = job.name in changes.failed
    work = job.done + done.work if done.runs else job.done
    if failed and done.runs:
        p, n = done.runs[-1].devices[0]
        lost = rates.hourly(job, old.pools[p]).get(n, 0.0) * job.checkpoint_every / 2
        work = max(job.done, work - lost)
    work = changes.progress.get(job.name, work)
    if job.name in changes.progress:
        validate.number(work, f"replan: changes.progress.{job.name}")
    if work >= job.work * (1 - rules.TOLERANCE):
        return None
    points = list(job.throughput)
    if job.name in changes.throughput:
        new = list(changes.throughput[job.name])
        replaced = {point.pool for point in new}
        points = [point for point in points if point.pool not in replaced] + new
    running = None
    last = done.runs[-1] if done.runs else None
    if last is not None and last.last == now and not failed and not job.mix_pools:
        ((p, n),) = last.devices
        if counts[p, now] >= n:
            carried = (
                job.running if len(done.runs) == 1 and job.running and not rules.moved(old, job, done.runs) else None
            )
            slots = last.last - last.first + (carried.slots if carried else 0)
            left = max(0.0, last.lost_hours - (last.last - last.first) * old.slot_hours)
            running = Running(pool=old.pools[p].name, devices=n, slots=slots, setup_left=left)
    return replace(
        job,
        throughput=tuple(points),
        done=work,
        started=job.started or bool(done.runs),
        running=running,
        spent=job.spent + done.cost,
        deadline=changes.deadlines.get(job.name, job.deadline),
        release=min(old.clock.release(job.release), old.slots - 1),
    )


def _hopeless(problem: Problem, job: Job) -> bool:
    """Whether even alone the job cannot meet its deadline any more."""
    if job.deadline is None:
        return False
    alone = replace(problem, jobs=(replace(job, after=(), value=None, soft=True),), budgets={}, objective=Objective())
    first, _ = problem.window(job)
    fits = not explain.necessary(alone)
    return fits and problem.clock.deadline(job.deadline) - first < rules.fastest_slots(problem, job)


def _soften(problem: Problem, names: list[str]) -> Problem:
    if not names:
        return problem
    jobs = tuple(replace(job, soft=True) if job.name in names else job for job in problem.jobs)
    objective = problem.objective
    if objective.weights:
        largest = max(objective.weights.values())
        weights = dict(objective.weights) | {"lateness": max(objective.weights.get("lateness", 0.0), 1000 * largest)}
        objective = replace(objective, weights=weights)
    else:
        order = ("lateness", *(name for name in objective.order if name != "lateness"))
        objective = replace(objective, order=order)
    return replace(problem, jobs=jobs, objective=objective)


def _is_late(problem: Problem, name: str, finish: int) -> bool:
    return rules.late_hours(problem, problem.jobs[problem.job_index(name)], finish) > 0


def _moves(plan: Plan) -> list[str]:
    problem, told = plan.problem, []
    for job, done in zip(problem.jobs, plan.account.jobs, strict=True):
        if job.running is None or not rules.moved(problem, job, done.runs):
            continue
        where, lost, price = "is dropped", 0.0, 0.0
        if done.runs:
            where = "is paused" if done.runs[0].first > problem.now else "moves"
            p, n = done.runs[0].devices[0]
            lost = done.runs[0].lost_hours
            price = lost * n * problem.price[p, done.runs[0].first]
        told.append(
            f"{job.name} {where} from {job.running.devices} x {job.running.pool}: {lost:g} h lost to set-up, "
            f"{price:.2f} {problem.currency}; stability {problem.stability:.2f}"
        )
    return told
