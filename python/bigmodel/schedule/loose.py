"""Plans of problems of which some limits are stretched: any plan, and one that stretches them little."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace

import numpy as np

from bigmodel.schedule import explain, mip, rules
from bigmodel.schedule.bounds import Prices
from bigmodel.schedule.construct import construct
from bigmodel.schedule.improve import thrifty
from bigmodel.schedule.instance import Instance, build, stage_for
from bigmodel.schedule.model import Elastic, Model
from bigmodel.schedule.problem import Problem
from bigmodel.schedule.search import Search, TimeUp
from bigmodel.schedule.state import State, cheapest
from bigmodel.schedule.stretch import Change, loosened, made, needed
from bigmodel.schedule.worker import shared

_MODEL = 3000  # columns up to which the elastic programme is solved: it answers within seconds
_GAP = 0.02
_CHEAP = 1e-2  # weight of the money of all jobs together against a limit stretched to twice what it was


def feasible(problem: Problem, end: float) -> bool:
    """Whether a plan was found that keeps the rules."""
    if time.monotonic() >= end or explain.necessary(problem):
        return False
    inst = build(problem, stage_for(problem, {"cost": 1.0}))
    try:
        state = construct(inst, Prices.zero(inst), 0.0, _tick(end))
    except TimeUp:
        return False
    if state.score()[:2] != (0, 0.0):
        found = Search(inst, shared(), end, gap=1e9).run().best
        if found is None:
            return False
        state = State.holding(inst, found)
    return _kept(problem, state) is not None


def stretches(problem: Problem, families: tuple[str, ...], end: float) -> tuple[list[Change], np.ndarray | None]:
    """Changes of these families, as small as could be found, and a plan of the problem with them; none if none was."""
    if time.monotonic() >= end or ("budgets" in families and not rules.budgets(problem)):
        return [], None
    loose = loosened(problem, families)
    if explain.necessary(loose):
        return [], None
    half = time.monotonic() + 0.5 * (end - time.monotonic())
    state = _programme(problem, families, half)
    allocation = None if state is None else _kept(loose, state)
    if allocation is None:
        inst = build(loose, stage_for(loose, _weights(problem, families)))
        if "capacity" in families:
            state = _squeezed(problem, inst, end)
        else:
            thrift = families == ("budgets",) and any(len(b.members) < len(inst.jobs) for b in rules.budgets(problem))
            state = _searched(inst, half if thrift else end)
            state = _thrifty(problem, state, end) if thrift and state is not None else state
        allocation = None if state is None else _kept(loose, state)
    if allocation is None:
        return [], None
    changes = needed(problem, rules.check(loose, allocation), allocation)
    return changes, allocation if keeps(made(problem, changes), allocation) else None


def keeps(problem: Problem, allocation: np.ndarray) -> bool:
    return not rules.check(problem, allocation).violations


def _kept(problem: Problem, state: State) -> np.ndarray | None:
    allocation = rules.trimmed(problem, state.allocation())
    return allocation if keeps(problem, allocation) else None


def _tick(end: float) -> Callable[[], None]:
    def tick() -> None:
        if time.monotonic() > end:
            raise TimeUp

    return tick


def _weights(problem: Problem, families: Iterable[str]) -> dict[str, float]:
    """Of lateness, the sum of relative delays; and of money: relative to the least budget, or only little."""
    limits = [budget.limit for budget in rules.budgets(problem) if budget.limit > 0]
    if "budgets" in families and limits:
        money = 1.0 / max(limits)
    else:
        money = _CHEAP / max(sum(explain.least_cost(problem, job) for job in problem.jobs), 1e-9)
    return {"cost": money} | ({"lateness": 1.0} if "deadlines" in families else {})


def _searched(inst: Instance, end: float) -> State | None:
    found = Search(inst, shared(), end, _GAP).run().best
    return None if found is None else State.holding(inst, found)


def _thrifty(problem: Problem, state: State, end: float) -> State:
    """A search for the least cost of all spares no single job's budget, and no owner's."""
    inst = build(problem, stage_for(problem, {"cost": 1.0}))
    state = State.holding(inst, {j: schedule.use for j, schedule in state.schedules.items()})
    with suppress(TimeUp):
        thrifty(state, Prices.zero(inst), 0, _tick(end))
    return state


# --- capacity ---------------------------------------------------------------------------------------------------------


def _squeezed(problem: Problem, inst: Instance, end: float) -> State | None:
    """A plan with devices to spare, whose use beyond what there is is worked off: every job, then a few at a time, put
    back where they are least over."""
    try:
        state = construct(inst, Prices.zero(inst), 0.0, _tick(end))
    except TimeUp:
        return None
    if state.score()[:2] != (0, 0.0):
        found = _searched(inst, time.monotonic() + 0.5 * (end - time.monotonic()))
        if found is None:
            return None
        state = found
    return _Squeeze(problem, state).run(end)


class _Squeeze:
    """problem: with the limits that are meant; state: a plan that keeps all others."""

    def __init__(self, problem: Problem, state: State):
        self.state, self.rng = state, np.random.default_rng(0)
        self.count = problem.count.copy()
        self.count[:, : problem.now] = 0
        self.scale = np.maximum(problem.count.max(axis=1), 1.0)
        groups = [g for g in problem.quotas if any(pool.quota_group == g for pool in problem.pools)]
        self.quotas = [problem.quotas[group] for group in groups]

    def run(self, end: float) -> State:
        jobs = list(self.state.schedules)
        idle, most = 0, 2 * len(jobs) + 60
        try:
            for _ in range(3):
                for j in sorted(jobs, key=lambda j: -self._over(j)):
                    self._again([j], end)
            while idle < most:
                idle = 0 if self._again(self._chosen(), end) else idle + 1
        except TimeUp:
            pass
        return self.state

    def _used(self) -> np.ndarray:
        return self.state.inst.count - self.state.left

    def _excess(self) -> np.ndarray:
        """Relative use beyond what there is, (pools, slots); a quota's on the pools that share it."""
        used = self._used()
        excess = np.maximum(used - self.count, 0) / self.scale[:, None]
        for (members, _), limit in zip(self.state.inst.groups, self.quotas, strict=True):
            pools = list(members)
            over = np.maximum(used[pools].sum(axis=0) - limit, 0) / max(limit, 1)
            excess[pools] += over / len(pools)
        return excess

    def _score(self) -> tuple[float, float, float]:
        missing, over, value = self.state.score()
        return missing, over, value + float(self._excess().sum())

    def _over(self, j: int) -> float:
        excess = self._excess()
        return sum(excess[p, slot] for slot, p, _ in self.state.schedules[j].use)

    def _chosen(self) -> list[int]:
        """A job that is in the way, or any, and some that share its time."""
        state, rng = self.state, self.rng
        jobs = list(state.schedules)
        guilty = [j for j in jobs if self._over(j) > 0]
        first = int(rng.choice(guilty if guilty and rng.random() < 0.8 else jobs))
        data = state.inst.jobs
        near = [j for j in jobs if j != first and data[j].first < data[first].last and data[first].first < data[j].last]
        return [first, *rng.permutation(near)[: int(rng.integers(0, 4))].tolist()]

    def _again(self, chosen: list[int], end: float) -> bool:
        """Takes the jobs out and puts them back, unless that is worse; whether it helped."""
        _tick(end)()
        state, inst, score = self.state, self.state.inst, self._score()
        old = {j: state.remove(j) for j in chosen}
        order = sorted(chosen, key=lambda j: sum(other in inst.jobs[j].after for other in chosen))
        placed = all(self._put(j) for j in order)
        if placed and self._score() <= score:
            return self._score() < score
        for j in chosen:
            if j in state.schedules:
                state.remove(j)
        for j, use in old.items():
            state.put(j, use)
        return False

    def _put(self, j: int) -> bool:
        """At the best of: within what there is; what is over priced by the least and by the largest count."""
        state, inst = self.state, self.state.inst
        first, last = state.window(j)
        room = self.count - self._used()
        for (members, _), limit in zip(inst.groups, self.quotas, strict=True):
            pools = list(members)
            room[pools] = np.minimum(room[pools], limit - self._used()[pools].sum(axis=0))
        data, unit = inst.jobs[j], inst.unit
        found = cheapest(inst, data, unit, np.maximum(room, 0), first=first, last=last)
        if found.use:
            state.put(j, found.use)
            return True
        best, least = None, None
        for size in (np.min, np.max):
            n = np.ones(len(inst.problem.pools))
            for p in np.unique(data.pool):
                n[p] = size(data.devices[data.pool == p])
            share = np.clip(1 - np.maximum(room, 0) / n[:, None], 0, 1)
            priced = unit + share / self.scale[:, None] / inst.h
            found = cheapest(inst, data, priced, inst.free(), first=first, last=last)
            if not found.use:
                continue
            state.put(j, found.use)
            if least is None or self._score() < least:
                best, least = found.use, self._score()
            state.remove(j)
        if best is not None:
            state.put(j, best)
        return best is not None


# --- the elastic programme --------------------------------------------------------------------------------------------


def _programme(problem: Problem, families: tuple[str, ...], end: float) -> State | None:
    """The plan of the least sum of relative changes, where its programme is small."""
    elastic = Elastic(**dict.fromkeys(families, True))
    stage = stage_for(problem, {"cost": 1.0})
    wide = replace(stage, ends=(problem.slots,) * len(problem.jobs)) if elastic.deadlines else stage
    inst = build(problem, wide)
    if inst.size > _MODEL or any(d.last <= d.first or not len(d.pool) for d in inst.jobs if not np.isfinite(d.drop)):
        return None
    state = State(inst)
    room = [limit.most for limit in inst.stage.limits]
    windows = {data.index: (data.first, data.last) for data in inst.jobs}
    model = Model(inst, range(len(inst.jobs)), {"pool": state.left, "quota": state.quota}, windows, room, elastic)
    if elastic.deadlines:
        model.deadline_costs(stage.ends)
    answer = mip.solve(shared(), model.program(), end - time.monotonic(), gap=_GAP)
    if answer.x is None:
        return None
    return State.holding(inst, {j: use for j, use in model.read(answer.x).items() if use})
