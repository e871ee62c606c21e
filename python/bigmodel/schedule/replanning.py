"""Planning again: the past stays, the rest is planned from where the jobs really are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bigmodel.schedule import explain, rates, rules, validate
from bigmodel.schedule.capacity import Free
from bigmodel.schedule.changes import Changes, load
from bigmodel.schedule.errors import Infeasible
from bigmodel.schedule.plan import Plan
from bigmodel.schedule.problem import Job, Objective, Pool, Problem, Running, When, replica_names
from bigmodel.schedule.solver import TIME_LIMIT, solve


def replan(
    plan: Plan, now: When, changes: Changes | Mapping[str, Any] | None = None, *, stability=None, **options
) -> Plan:
    """Plans the rest of `plan` from slot `now` on; of an ISO time, from the first slot that begins at or after it.

    The new plan's problem holds the jobs that are not done; its allocation before `now`, and its `past`, are what was.
    A hard deadline that can no longer be met is noted and becomes "as soon as possible": lateness is minimised first,
    until the job is given another deadline.

    Args:
        stability: currency that moving a running job costs besides its restart; None keeps the problem's.
        options: of `solve`.

    Raises:
        ValueError: an unknown job or pool in `changes`, or nothing is left to do. Infeasible, Unknown: as `solve`.
    """
    begin = time.monotonic()
    changes = Changes.of(changes)
    rest = remaining(plan, _slot(plan.problem, now), changes)
    problem = rest.problem if stability is None else replace(rest.problem, stability=stability)
    late = [job.name for job in problem.jobs if not job.soft and _hopeless(problem, job)]
    notes = [f"{name}: its deadline can no longer be met; it ends as soon as possible" for name in late]
    softened = [*rest.softened, *late]
    planned = _soften(problem, softened)
    hard = [job.name for job in planned.jobs if not job.soft and job.deadline is not None]
    try:
        found = solve(planned, **options | ({"explain": False} if hard else {}))
    except Infeasible:
        if not hard:
            raise
        softened += hard
        planned = _soften(problem, softened)
        left = options.get("time_limit", TIME_LIMIT) - (time.monotonic() - begin)
        found = solve(planned, **options | {"time_limit": max(left, 0.1)})
        missed = [name for name in hard if name in found.finish and _is_late(planned, name, found.finish[name])]
        notes += [f"{name}: its deadline can no longer be met beside the others; it ends late" for name in missed]
    allocation = found.allocation.copy()
    allocation[:, :, : planned.now] = rest.rows
    return replace(
        found,
        allocation=allocation,
        notes=(*notes, *rest.notes, *found.notes),
        past=rest.past,
        moves=tuple(_moves(found)),
        softened=tuple(softened),
        wished=problem.objective if softened else None,
    )


def again(path: str, now: str, changes: Path | None) -> tuple[Callable[..., Plan], Plan]:
    """`replan` of a plan's JSON file with all but its options, and that plan. now: a slot's number, or an ISO time.

    Raises:
        OSError: a file cannot be read. ValueError: as Plan.from_json, Changes and replan.
    """
    try:
        plan = Plan.from_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    known = Changes() if changes is None else load(changes)
    return partial(replan, plan, int(now) if now.isdecimal() else now, known), plan


@dataclass(frozen=True)
class Rest:
    """What is left to plan. rows: the past allocation of its jobs, (jobs, pools, now); past: every row of the past;
    softened: its jobs whose deadlines an earlier plan has given up."""

    problem: Problem
    rows: np.ndarray
    past: tuple[dict[str, Any], ...]
    softened: tuple[str, ...]
    notes: tuple[str, ...]


def remaining(plan: Plan, now: int, changes: Changes) -> Rest:
    """What is left to plan at slot `now`, under the objective that was asked for."""
    old = plan.problem
    validate.whole(now, "replan: now", least=old.now, most=old.slots - 1)
    _known(plan, changes)
    before = np.where(np.arange(old.slots)[None, None, :] < now, plan.allocation, 0)
    account = rules.check(old, before)
    pools = tuple(_pool(old, p, now, changes) for p in range(len(old.pools)))
    jobs: list[Job] = []
    rows: list[np.ndarray] = []
    spent: list[tuple[str, float]] = []  # by whom, of jobs that are over
    finished = set(changes.cancelled) | {row["job"] for row in plan.past} - {job.name for job in old.jobs}
    for job, done, row in zip(old.jobs, account.jobs, plan.allocation, strict=True):
        current = _job(plan, job, done, now, changes)
        if current is None:
            finished.add(job.name)
            spent.append((job.owner, job.spent + done.cost))
        else:
            jobs.append(current)
            rows.append(row[:, :now])
    jobs += changes.jobs
    if not jobs:
        raise ValueError("replan: every job is done or cancelled, so nothing is left to plan.")
    jobs = [replace(job, after=tuple(name for name in job.after if name not in finished)) for job in jobs]
    # What runs although its predecessor turns out not to be done has to stop.
    jobs = [replace(job, running=None) if job.after else job for job in jobs]
    budget = None if old.budget is None else max(0.0, old.budget - sum(cost for _, cost in spent))
    left = {owner: limit - sum(cost for who, cost in spent if who == owner) for owner, limit in old.budgets.items()}
    owners = {job.owner for job in jobs}
    # Before slot 0 nothing is spent, and a problem's budgets are of its jobs' owners.
    budgets = {owner: max(0.0, limit) for owner, limit in left.items() if now or owner in owners}
    wished = plan.wished or old.objective
    changed = replace(
        old, pools=pools, jobs=tuple(jobs), now=now, budget=budget, budgets=budgets, objective=wished
    )  # fmt: skip
    problem, cut = _interrupted(changed.expanded)
    rows += [np.zeros((len(pools), now), dtype=np.int64)] * (len(problem.jobs) - len(rows))
    names = {job.name for job in problem.jobs}
    softened = tuple(name for name in plan.softened if name in names and name not in changes.deadlines)
    past = (*plan.past, *replace(plan, allocation=before).rows())
    return Rest(problem, np.array(rows), past, softened, (*_freed(old, problem, changes), *cut))


def _slot(problem: Problem, now: When) -> int:
    if not isinstance(now, str):
        return now
    try:
        return problem.clock.release(now)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"replan: now: {now!r} is neither a slot number nor an ISO time ({error}).") from None


def _freed(old: Problem, new: Problem, changes: Changes) -> list[str]:
    """What no longer waits, since a job that it followed was cancelled."""
    left = {job.name for job in new.jobs}
    return [
        f"{job.name}: it no longer waits for {before}, which was cancelled"
        for job in old.jobs
        for before in job.after
        if job.name in left and before in changes.cancelled
    ]


def _known(plan: Plan, changes: Changes) -> None:
    problem = plan.problem
    jobs, pools = {job.name for job in problem.jobs}, {pool.name for pool in problem.pools}
    for name, given in vars(changes).items():
        if name != "jobs":
            for key in given:
                validate.choice(key, f"replan: changes.{name}", pools if name in ("gone", "prices", "counts") else jobs)
    taken = jobs | {row["job"] for row in plan.past}
    for index, job in enumerate(changes.jobs):
        for name in taken.intersection(replica_names(job)):
            validate.fail(f"replan: changes.jobs[{index}].name", f"{name!r} is the name of a job of this plan already")


def _pool(old: Problem, p: int, now: int, changes: Changes) -> Pool:
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


def _job(plan: Plan, job: Job, done: rules.JobAccount, now: int, changes: Changes) -> Job | None:
    """The job as it stands at `now`; None if it is over."""
    old, failed = plan.problem, job.name in changes.failed
    work = job.done + done.work if done.runs else job.done
    if failed and done.runs:
        held = done.runs[-1].devices
        rate = sum(rates.hourly(job, old.pools[p]).get(n, 0.0) for p, n in held)
        work = max(job.done, work - rate * job.checkpoint_every / 2)
    work = changes.progress.get(job.name, work)
    if job.name in changes.cancelled or work >= job.work * (1 - rules.TOLERANCE):
        return None
    new = list(changes.throughput.get(job.name, ()))
    replaced = {point.pool for point in new}
    points = [point for point in job.throughput if point.pool not in replaced] + new
    deadline = changes.deadlines.get(job.name, job.deadline)
    given_up = job.name in plan.softened and job.name not in changes.deadlines
    soft = given_up or job.soft and job.name not in plan.softened
    return replace(
        job,
        throughput=tuple(points),
        done=work,
        started=job.started or bool(done.runs),
        running=None if failed or job.mix_pools else _running(old, job, done, now),
        spent=job.spent + done.cost,
        deadline=deadline,
        soft=soft and deadline is not None,
        release=min(old.clock.release(job.release), old.slots - 1),
    )


def _running(old: Problem, job: Job, done: rules.JobAccount, now: int) -> Running | None:
    """What the job is doing at `now` by the plan."""
    last = done.runs[-1] if done.runs else None
    if last is None or last.last != now:
        return None
    ((p, n),) = last.devices
    slots = last.last - last.first
    if len(done.runs) == 1 and job.running and not rules.moved(old, job, done.runs):
        slots += job.running.slots
    left = max(0.0, last.lost_hours - (last.last - last.first) * old.slot_hours)
    return Running(pool=old.pools[p].name, devices=n, slots=slots, setup_left=left)


def _interrupted(problem: Problem) -> tuple[Problem, list[str]]:
    """The problem without the runs whose devices are gone, and a note of each.

    Runs that may not be broken off keep their devices first, by priority and then by deadline; which of the others go
    on is the solver's choice.
    """
    free, now = Free(problem, problem.count[:, problem.now :]), problem.now
    bound = {job.name: _bound_slots(problem, job) for job in problem.jobs if job.running is not None}

    def rank(job: Job) -> tuple[bool, float, float]:
        due = math.inf if job.deadline is None else problem.clock.deadline(job.deadline)
        return not bound[job.name], -job.priority, due

    notes = {}
    for job in sorted((job for job in problem.jobs if job.name in bound), key=rank):
        assert job.running is not None
        p, n, slots = problem.pool_index(job.running.pool), job.running.devices, bound[job.name]
        if n not in rates.counts(job, problem.pools[p]):
            notes[job.name] = f"{job.name}: is interrupted, since it may no longer run on {n} x {job.running.pool}"
        elif not (free.take(p, n, slots) if slots else n <= problem.count[p, now]):
            notes[job.name] = f"{job.name}: is interrupted, since its {n} x {job.running.pool} are no longer there"
    jobs = tuple(replace(job, running=None) if job.name in notes else job for job in problem.jobs)
    return replace(problem, jobs=jobs), [notes[job.name] for job in jobs if job.name in notes]


def _bound_slots(problem: Problem, job: Job) -> int:
    """Slots from Problem.now on in which the job's run may not be broken off."""
    assert job.running is not None
    rate = rates.hourly(job, problem.pools[problem.pool_index(job.running.pool)]).get(job.running.devices)
    if rate is None:
        return 0
    least = problem.slots if not job.preemptible else max(0, job.min_run - job.running.slots)
    hours = job.running.setup_left + (job.work - job.done) / rate
    to_do = max(1, math.ceil(hours / problem.slot_hours - rules.TOLERANCE))
    return min(least, to_do, problem.slots - problem.now)


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
