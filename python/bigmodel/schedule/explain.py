"""Why there is no plan, and the least changes that would give one; each is applied and solved before it is told."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from bigmodel.schedule import mip, rates, rules
from bigmodel.schedule.errors import Infeasible, Unknown
from bigmodel.schedule.instance import build, stage_for
from bigmodel.schedule.model import Elastic, Model
from bigmodel.schedule.problem import Problem
from bigmodel.schedule.state import State
from bigmodel.schedule.worker import shared

FAMILIES = ("deadlines", "capacity", "budgets")
_MODEL = 40000  # columns up to which an elastic programme is solved
_ROUNDING = 1.0005  # budgets are told a little above the least that was found


def necessary(problem: Problem) -> list[str]:
    """What no plan can meet, found without a solver: jobs that fit nowhere, or not in time, or not in their budget."""
    reasons = []
    for job in problem.jobs:
        if rules.may_drop(problem, job):
            continue
        first, last = problem.window(job)
        hourly = [rates.hourly(job, pool) for pool in problem.pools]
        most = problem.count[:, problem.now :].max(axis=1)
        there = [{n: r for n, r in h.items() if n <= top} for h, top in zip(hourly, most, strict=True)]
        if not any(hourly):
            reasons.append(f"{job.name} fits on no pool: its memory of {job.memory:g} GiB or its counts rule all out")
        elif not any(there):
            least = min(n for h in hourly for n in h)
            devices = f"{least} device{'s' if least > 1 else ''}"
            reasons.append(f"{job.name} needs at least {devices} of one pool, more than any has")
        elif rules.fastest_slots(problem, job) > last - first:
            short = rules.fastest_slots(problem, job) - (last - first)
            slots = f"{short} slot{'s' if short > 1 else ''}"
            what = "the horizon's end" if job.soft or job.deadline is None else "its deadline"
            reasons.append(f"{job.name} misses {what} by {slots} even alone on the fastest devices")
        elif job.budget is not None:
            least_cost = _least_cost(problem, job, there)
            if least_cost + job.spent > job.budget * (1 + rules.TOLERANCE):
                least_cost += job.spent
                over = f"{least_cost:.2f} {problem.currency}, over its budget of {job.budget:.2f}"
                reasons.append(f"{job.name} costs at least {over}")
    return reasons


def _least_cost(problem: Problem, job, hourly: list[dict[int, float]]) -> float:
    first, last = problem.window(job)
    prices = problem.price[:, first:last].min(axis=1)
    per_work = [price * n / rate for price, h in zip(prices, hourly, strict=True) for n, rate in h.items()]
    return min(per_work) * (job.work - job.done)


@dataclass
class _Cure:
    """A change to the problem: its size relative to what was, what it says, and the problem with it."""

    size: float
    text: str
    reasons: list[str]
    problem: Problem


def infeasible(problem: Problem, reasons: list[str], seconds: float) -> Infeasible:
    """The error to raise: reasons, and at most three changes that were each seen to give a plan."""
    end = time.monotonic() + seconds
    cures = []
    for family in FAMILIES:
        cure = _cure(problem, Elastic(**{family: True}), end)
        if cure is not None:
            cures.append(cure)
    if not cures:
        cure = _cure(problem, Elastic(True, True, True), end)
        cures = [cure] if cure is not None else []
    cures.sort(key=lambda cure: cure.size)
    told = list(reasons)
    for reason in [reason for cure in cures for reason in cure.reasons]:
        if not any(known.startswith(reason) for known in told):
            told.append(reason)
    return Infeasible(told, [cure.text for cure in cures[:3]], [cure.problem for cure in cures[:3]])


def _cure(problem: Problem, elastic: Elastic, end: float) -> _Cure | None:
    """The least change of this family that gives a plan, seen to; None where there is none or time is over."""
    program = _program(problem, elastic)
    if program is None:
        return None
    model, arrays = program
    for gap in (0.05, 0.0):
        left = end - time.monotonic()
        if left <= 0.2:
            return None
        answer = mip.solve(shared(), arrays, min(left / 2, 8.0), gap=gap)
        if answer.x is None:
            return None
        cure = _read(problem, model, answer.x, elastic)
        if cure is not None and _works(cure.problem, end):
            return cure
    return None


def _program(problem: Problem, elastic: Elastic):
    stage = stage_for(problem, {"cost": 1.0})
    wide = replace(stage, ends=(problem.slots,) * len(problem.jobs)) if elastic.deadlines else stage
    inst = build(problem, wide)
    if inst.size > _MODEL or any(d.last <= d.first or not len(d.pool) for d in inst.jobs if not np.isfinite(d.drop)):
        return None
    state = State(inst)
    room = [limit.most for limit in inst.stage.limits]
    windows = {data.index: (data.first, data.last) for data in inst.jobs}
    free = {"pool": state.left, "quota": state.quota}
    model = Model(inst, range(len(inst.jobs)), free, windows, room, elastic)
    if elastic.deadlines:
        model.deadline_costs(stage.ends)
    return model, model.program()


def _read(problem: Problem, model: Model, x: np.ndarray, elastic: Elastic) -> _Cure | None:
    size = float(model.program()["c"] @ x)
    changed = problem
    texts: list[str] = []
    reasons: list[str] = []
    taken = {key: x[column] for key, column in model.stretch.items() if x[column] > 1e-6}
    if elastic.deadlines:
        changed, text, reason = _deadlines(changed, model.read(x))
        texts, reasons = texts + text, reasons + reason
    if elastic.capacity:
        changed, text = _capacity(changed, taken)
        texts += text
    if elastic.budgets:
        changed, text = _budgets(changed, model, taken)
        texts += text
    if not texts:
        return None
    return _Cure(size, " and ".join(texts), reasons, changed)


def _deadlines(problem: Problem, schedules) -> tuple[Problem, list[str], list[str]]:
    jobs, texts, reasons = list(problem.jobs), [], []
    for j, use in schedules.items():
        job = jobs[j]
        _, last = problem.window(job)
        finish = use[-1][0] + 1 if use else 0
        if finish > last:
            jobs[j] = replace(job, deadline=finish)
            late = finish - last
            reasons.append(f"{job.name} misses its deadline by {late} slot{'s' if late > 1 else ''}")
            texts.append(f"a deadline of slot {finish} for {job.name} ({problem.clock.label(finish)})")
    return replace(problem, jobs=tuple(jobs)), texts, reasons


def _capacity(problem: Problem, taken: dict) -> tuple[Problem, list[str]]:
    extra = np.zeros_like(problem.count)
    quotas = dict(problem.quotas)
    groups = [g for g in problem.quotas if any(pool.quota_group == g for pool in problem.pools)]
    for key, value in taken.items():
        if key[0] == "capacity":
            extra[key[1], key[2]] = int(np.ceil(value - 1e-6))
        elif key[0] == "quota":
            name = groups[key[1]]
            quotas[name] = max(quotas[name], problem.quotas[name] + int(np.ceil(value - 1e-6)))
    pools, texts = list(problem.pools), []
    for p in np.flatnonzero(extra.any(axis=1)):
        slots = np.flatnonzero(extra[p])
        hours = extra[p].sum() * problem.slot_hours
        most, name = extra[p].max(), pools[p].name
        devices = f"up to {most} more device{'s' if most > 1 else ''} from slot {slots[0]}"
        texts.append(f"{hours:g} more {name}-hours before slot {slots[-1] + 1} ({devices})")
        pools[p] = replace(pools[p], count={"slots": (problem.count[p] + extra[p]).tolist()})
    for name, limit in quotas.items():
        if limit > problem.quotas[name]:
            texts.append(f"a quota of {limit} devices for {name}")
    return replace(problem, pools=tuple(pools), quotas=quotas), texts


def _budgets(problem: Problem, model: Model, taken: dict) -> tuple[Problem, list[str]]:
    texts = []
    for row, (name, limit, _) in enumerate(rules.budgets(problem)):
        if ("budget", row) not in taken:
            continue
        room = model.inst.stage.limits[row].most
        more = float(np.ceil((limit + taken["budget", row] * max(abs(room), 1e-9)) * _ROUNDING * 100) / 100)
        texts.append(f"a {name} of {more:.2f} {problem.currency} instead of {limit:.2f}")
        if name == "budget":
            problem = replace(problem, budget=more)
        elif name.startswith("budget of owner "):
            problem = replace(problem, budgets=problem.budgets | {name.removeprefix("budget of owner "): more})
        else:
            j = problem.job_index(name.removeprefix("budget of "))
            jobs = (*problem.jobs[:j], replace(problem.jobs[j], budget=more), *problem.jobs[j + 1 :])
            problem = replace(problem, jobs=jobs)
    return problem, texts


def _works(problem: Problem, end: float) -> bool:
    from bigmodel.schedule.solver import solve

    left = end - time.monotonic()
    if left <= 0.1:
        return False
    try:
        solve(problem, time_limit=left, gap=1e9, explain=False)
    except (Infeasible, Unknown):
        return False
    return True
