"""A partial plan that jobs are put into and taken out of, with what is left of every pool, quota and budget."""

from __future__ import annotations

import math

import numpy as np

from bigmodel.schedule import fill, path, rules
from bigmodel.schedule.instance import Instance, JobData
from bigmodel.schedule.path import Schedule

_EPS = 1e-9


def cheapest(
    inst: Instance, data: JobData, unit, free, *, optimistic=False, first=None, last=None, units=None, quota=None
) -> Schedule:
    """One job's cheapest schedule at prices `unit` within `free` devices, whichever kind of job it is.

    units: of the grid in a slot's work, path.UNITS_PER_SLOT if None. quota: what is left of each, (groups, slots), for
    jobs that mix pools; all of it if None.
    """
    first = data.first if first is None else first
    last = data.last if last is None else last
    stability = inst.problem.stability * inst.stage.weights.get("cost", 0.0)
    if last <= first or not len(data.pool):
        return Schedule(np.inf, ())
    if data.job.mix_pools:
        if quota is None:
            quota = [np.full(inst.problem.slots, limit) for _, limit in inst.groups]
        quotas = [(members, room) for (members, _), room in zip(inst.groups, quota, strict=True)]
        return fill.cheapest(data, unit, free, inst.h, optimistic=optimistic, first=first, last=last, quotas=quotas)
    if not data.job.preemptible:
        return path.unbroken(data, unit, free, inst.h, first, last, stability)
    window = {"first": first, "last": last, "stability": stability}
    if optimistic:
        like: tuple[tuple[int, int, int], ...] = ()
        if units is None or units > path.UNITS_PER_SLOT["up"]:
            like = path.cheapest(data, unit, free, inst.h, rounding="nearest", **window).use
        return path.cheapest(data, unit, free, inst.h, rounding="up", units=units, like=like, **window)
    for rounding in ("nearest", "down"):
        schedule = path.cheapest(data, unit, free, inst.h, rounding=rounding, units=units, **window)
        if schedule.use:
            break
    return schedule


def by_slot(use) -> dict[int, list[tuple[int, int]]]:
    """A schedule's (pool, devices) by slot."""
    found: dict[int, list[tuple[int, int]]] = {}
    for slot, p, n in use:
        found.setdefault(slot, []).append((p, n))
    return found


def real_cost(inst: Instance, data: JobData, use, price: np.ndarray) -> float:
    """What a schedule costs at `price` per device-hour, its last slot pro rata where that is billed by the second.

    Does not know lateness or stability.
    """
    h, left, cost = inst.h, data.work, 0.0
    rate = data.known
    running, job = data.job.running, data.job
    lost, started = 0.0, job.started
    before: tuple[tuple[int, int], ...] = ()
    previous = inst.problem.now - 1
    if running is not None:
        before, lost = ((inst.problem.pool_index(running.pool), running.devices),), running.setup_left
    for slot, held in by_slot(use).items():
        if tuple(held) != before or slot != previous + 1:
            if not job.mix_pools:
                lost = rate[held[0]][1] + (job.restart if started else 0.0)
            before = tuple(held)
        started, previous = True, slot
        speed = sum(rate[key][0] for key in held)
        waste = min(h, lost)
        lost -= waste
        hours = min(h, waste + left / speed)
        left -= speed * (hours - waste)
        for p, n in held:
            second = inst.problem.pools[p].billing == "second" and left <= _EPS * data.work
            cost += price[p, slot] * n * (hours if second else h)
    return cost


class State:
    """Schedules by job index. free: devices left, (pools, slots); room: what is left of each limit of the stage."""

    def __init__(self, inst: Instance):
        self.inst = inst
        self.left = inst.count.copy()
        self.left[:, : inst.problem.now] = 0
        self.quota = [np.full(inst.problem.slots, limit) for _, limit in inst.groups]
        self.schedules: dict[int, Schedule] = {}
        self.worth: dict[int, float] = {}
        self.usage = np.zeros((len(inst.stage.limits), len(inst.jobs)))
        self.after: list[list[int]] = [[] for _ in inst.jobs]
        for data in inst.jobs:
            for before in data.after:
                self.after[before].append(data.index)

    @classmethod
    def holding(cls, inst: Instance, schedules: dict[int, tuple]) -> State:
        """The plan with these schedules, by job."""
        state = cls(inst)
        for j, use in schedules.items():
            state.put(j, use)
        return state

    def free(self) -> np.ndarray:
        free = self.left.copy()
        for (members, _), room in zip(self.inst.groups, self.quota, strict=True):
            free[list(members)] = np.minimum(free[list(members)], room)
        return np.maximum(free, 0)

    def short(self, held: list[tuple[int, int]], p: int, slot: int) -> bool:
        """Whether pool p, or a quota that it is in, has less in this slot than (pool, devices) of it ask for."""
        return any(self.left[q, slot] < n for q, n in held if q == p) or any(
            p in members and room[slot] < sum(n for q, n in held if q in members)
            for (members, _), room in zip(self.inst.groups, self.quota, strict=True)
        )

    def window(self, j: int) -> tuple[int, int]:
        """The job's window between what precedes and what follows it in this plan."""
        data = self.inst.jobs[j]
        first = max([data.first, *(self.finish(b) for b in data.after if b in self.schedules)])
        last = min([data.last, *(self.start(a) for a in self.after[j] if a in self.schedules)])
        return first, last

    def start(self, j: int) -> int:
        return self.schedules[j].use[0][0]

    def finish(self, j: int) -> int:
        return self.schedules[j].use[-1][0] + 1

    def put(self, j: int, use) -> None:
        inst, data = self.inst, self.inst.jobs[j]
        self._take(use, -1)
        worth = real_cost(inst, data, use, inst.unit)
        finish = use[-1][0] + 1
        late = float(data.late[finish])
        moved = 0.0
        if data.job.running is not None and inst.problem.stability:
            now = [(p, n) for slot, p, n in use if slot == inst.problem.now]
            stays = now == [(inst.problem.pool_index(data.job.running.pool), data.job.running.devices)]
            moved = 0.0 if stays else inst.problem.stability * inst.stage.weights.get("cost", 0.0)
        self.schedules[j] = Schedule(worth, tuple(use))
        self.worth[j] = worth + late + moved
        for row, limit in enumerate(inst.stage.limits):
            if j in limit.members:
                self.usage[row, j] = self._measure(limit.weights, data, use, finish)

    def _measure(self, weights: dict[str, float], data: JobData, use, finish: int) -> float:
        problem = self.inst.problem
        total = 0.0
        if weights.get("cost"):
            total += weights["cost"] * real_cost(self.inst, data, use, problem.price)
        if weights.get("carbon"):
            total += weights["carbon"] * real_cost(self.inst, data, use, problem.carbon)
        if weights.get("lateness"):
            total += weights["lateness"] * data.job.priority * rules.late_hours(problem, data.job, finish)
        return total

    def remove(self, j: int) -> tuple[tuple[int, int, int], ...]:
        use = self.schedules.pop(j).use
        del self.worth[j]
        self.usage[:, j] = 0.0
        self._take(use, 1)
        return use

    def _take(self, use, sign: int) -> None:
        for slot, p, n in use:
            self.left[p, slot] += sign * n
            for (members, _), room in zip(self.inst.groups, self.quota, strict=True):
                if p in members:
                    room[slot] += sign * n

    def over(self) -> float:
        """The sum of relative excesses over the stage's limits."""
        excess = 0.0
        for row, limit in enumerate(self.inst.stage.limits):
            drop = sum(self._dropped(limit, j) for j in limit.members if j not in self.schedules)
            paid = self.usage[row].sum() + drop
            excess += max(0.0, paid - limit.most * (1 + 1e-7) - 1e-7) / max(abs(limit.most), 1.0)
        return excess

    def _dropped(self, limit, j: int) -> float:
        """Only limits that an earlier stage's objective left count the value of what is dropped."""
        return limit.weights.get("value", 0.0) * (self.inst.jobs[j].job.value or 0.0)

    def score(self) -> tuple[float, float, float]:
        """(jobs missing that may not be, excess over limits, objective): smaller is better, from the left."""
        missing, total = 0, 0.0
        for data in self.inst.jobs:
            if data.index in self.worth:
                total += self.worth[data.index]
            elif math.isinf(data.drop):
                missing += 1
            else:
                total += data.drop
        return missing, self.over(), total

    def allocation(self) -> np.ndarray:
        problem = self.inst.problem
        table = np.zeros((len(problem.jobs), len(problem.pools), problem.slots), dtype=np.int64)
        for j, schedule in self.schedules.items():
            for slot, p, n in schedule.use:
                table[j, p, slot] += n
        return table
