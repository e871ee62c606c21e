"""One job at given prices: its cheapest schedule by dynamic programming over (slot, work left, configuration).

Work left lives on a grid. Rounded "up", every rounding favours the job, and the value is a lower bound on the cost of
any schedule; rounded "down", every rounding is against it, and the schedule found does the whole work; rounded "near",
values are closest, and a schedule that ends short of the work is refused. Values at a slot:

    idle[s][i]    nothing runs at the beginning of s and i units are left; a start loses start-up and restart
    run[k][s][i]  configuration k ran in slot s - 1 and may go on without loss

A start commits to max(min_run, slots of set-up) slots, in which the job may only stop because it is done.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bigmodel.schedule.instance import JobData

# Units of the grid in a slot's work of the slowest configuration. A bound gives away half a unit per slot: 24 units
# gave away 1 %, 200 gave 0.05 % and took 1.5 times as long.
UNITS_PER_SLOT = {"up": 200, "near": 24, "down": 64}
MOST_UNITS = 25000
_EPS = 1e-9


@dataclass(frozen=True)
class Schedule:
    """cost at the given prices; use: (slot, pool, devices) triples in order of slot."""

    cost: float
    use: tuple[tuple[int, int, int], ...]


class _Short(Exception):
    """Rounded "near", the grid let a schedule end before its real work was done."""


class Table:
    """The values of one job at given prices.

    unit: currency per device-hour, (pools, slots). free: devices left, (pools, slots). first, last: the window.
    """

    def __init__(
        self, data: JobData, unit, free, h: float, *, rounding: str, first: int, last: int, stability=0.0, units=None
    ):
        self.data, self.h, self.first, self.last = data, h, first, last
        self.rounding, self.stability = rounding, stability
        slots = np.arange(first, last)
        usable = free[data.pool][:, slots] >= data.devices[:, None]
        price = unit[data.pool][:, slots] * data.devices[:, None] * h
        self.price = np.where(usable, price, np.inf).tolist()  # lists: reading one number is most of what is done
        self.late = data.late.tolist()
        self.keep = [k for k in range(len(data.pool)) if usable[k].any()]
        self.units, self.step = self._grid(units or UNITS_PER_SLOT[rounding])
        self.idle = np.full((last - first + 1, self.units + 1), np.inf)
        self.idle[:, 0] = 0.0
        self.loss = data.startup + data.job.restart
        self.runs = {k: self.idle.copy() for k in self.keep if self.loss[k] > 0 or data.job.min_run > 1}
        self._plans = {k: self._commit(k, float(self.loss[k])) for k in self.keep}
        self._rate = data.rate.tolist()
        self._second = data.second.tolist()
        self._on = {k: [(self._rounded(data.rate[k] * h), 0.0)] for k in self.keep}
        self._shares: dict[tuple[int, float], np.ndarray] = {}
        for s in range(last - first - 1, -1, -1):
            self._fill(s)

    def _grid(self, per_slot: int) -> tuple[int, float]:
        """Units of work and the size of one, chosen so that the rates round little."""
        data = self.data
        if not self.keep:
            return 1, data.work
        gains = data.rate[self.keep] * self.h
        finest = max(gains.min() / per_slot, data.work / MOST_UNITS)
        steps = np.linspace(finest, min(1.4 * finest, data.work), 256 if self.rounding == "up" else 32)
        units = gains[None, :] / steps[:, None]
        whole = {"up": np.ceil(units), "near": np.round(units), "down": np.floor(units)}[self.rounding]
        error = np.abs(whole / units - 1)
        step = float(steps[np.argmin(error.mean(axis=1))])
        count = data.work / step
        return max(1, math.floor(count + _EPS) if self.rounding == "up" else math.ceil(count - _EPS)), step

    def _rounded(self, work: float) -> int:
        units = work / self.step
        if self.rounding == "near":
            return round(units)
        return math.ceil(units - _EPS) if self.rounding == "up" else math.floor(units + _EPS)

    def _commit(self, k: int, loss: float, least: int | None = None) -> list[tuple[int, float]]:
        """(units done, hours lost in the slot) after each slot that a start commits to."""
        rate, h = self.data.rate[k], self.h
        slots = max(self.data.job.min_run if least is None else least, math.ceil(loss / h - _EPS), 1)
        done = [max(0.0, q * h - loss) * rate for q in range(slots + 1)]
        return [(self._rounded(done[q + 1]), min(h, max(0.0, loss - q * h))) for q in range(slots)]

    def _ending(self, k: int, s: int, units: int, lost: float) -> float:
        """Cost of ending in slot s with so many units left after `lost` hours of it."""
        hours = self.h
        if self.data.second[k]:
            hours = min(self.h, lost + units * (self.step / self.data.rate[k]))
        return self.price[k][s] * (hours / self.h) + self.late[self.first + s + 1]

    def _started(self, k: int, s: int, plan: list[tuple[int, float]], best: np.ndarray) -> None:
        """Lowers `best`, costs by units left, to those of starting configuration k in slot s."""
        paid, before, units = 0.0, 0, self.units
        for q, (done, lost) in enumerate(plan):
            if s + q >= self.last - self.first:
                return
            price = self.price[k][s + q]
            if price == np.inf:
                return
            top = min(done, units)
            if top > before:
                late = self.late[self.first + s + q + 1]
                part = best[before + 1 : top + 1]
                if self._second[k]:
                    np.minimum(part, self._hours(k, lost)[: top - before] * price + (paid + late), out=part)
                else:
                    np.minimum(part, paid + price + late, out=part)
                before = top
            paid += price
        if before < units:
            after = self.runs.get(k, self.idle)[s + len(plan)]
            part = best[before + 1 :]
            np.minimum(part, after[1 : units - before + 1] + paid, out=part)

    def _hours(self, k: int, lost: float) -> np.ndarray:
        """The share of a slot held when 1, 2, ... units are left after `lost` hours of it."""
        known = self._shares.get((k, lost))
        if known is None:
            most = self._rounded((self.h - lost) * self.data.rate[k]) + 2
            units = np.arange(1, most + 1)
            known = np.minimum(1.0, (lost + units * (self.step / self.data.rate[k])) / self.h)
            self._shares[k, lost] = known
        return known

    def _fill(self, s: int) -> None:
        idle = self.idle[s]
        idle[:] = self.idle[s + 1]
        for k in self.keep:
            if self.price[k][s] < np.inf:
                self._started(k, s, self._plans[k], idle)
        for k, run in self.runs.items():
            run[s] = idle
            if self.price[k][s] < np.inf:
                self._started(k, s, self._on[k], run[s])

    # --- the schedule -------------------------------------------------------------------------------------------------

    def best(self) -> Schedule:
        """The cheapest schedule from the job's state at the window's beginning; cost is inf where there is none."""
        data, job = self.data, self.data.job
        options: list[tuple[float, tuple]] = []
        if job.running is not None and data.running in self.keep:  # its window begins at Problem.now
            k = data.running
            plan = self._commit(k, job.running.setup_left, least=max(1, job.min_run - job.running.slots))
            options.append((self._cost(k, 0, plan, self.units), ("start", k, plan, 0)))
        leaves = job.running is None or (job.preemptible and job.running.slots >= job.min_run)
        if leaves or data.running is None:
            moved = self.stability if job.running is not None else 0.0
            options += [(cost + moved, how) for cost, how in self._first_starts()]
        cost, how = min(options, key=lambda option: option[0], default=(np.inf, ()))
        if cost == np.inf:
            return Schedule(np.inf, ())
        try:
            return Schedule(float(cost), tuple(self._follow(*how[1:])))
        except _Short:
            return Schedule(np.inf, ())

    def _first_starts(self) -> list[tuple[float, tuple]]:
        """The cheapest start of every configuration in every slot, the first losing no restart."""
        restart = self.data.job.restart if self.data.job.started else 0.0
        early = self.data.early
        if restart == self.data.job.restart and not early.any():  # the first start is like any other
            step = self._next(-1, 0, self.units)
            return [] if step is None else [(float(self.idle[0][self.units]), ("start", *step))]
        found = []
        for k in self.keep:
            plan = self._commit(k, float(self.data.startup[k]) + restart)
            cost, s = min(
                (
                    (self._cost(k, s, plan, self.units) + early[self.first + s], s)
                    for s in range(self.last - self.first)
                ),
                default=(np.inf, 0),
            )
            found.append((cost, ("start", k, plan, s)))
        return found

    def _cost(self, k: int, s: int, plan: list[tuple[int, float]], units: int) -> float:
        """What starting configuration k in slot s costs with so many units left."""
        paid = 0.0
        for q, (done, lost) in enumerate(plan):
            if s + q >= self.last - self.first:
                return np.inf
            if done >= units:
                before = plan[q - 1][0] if q else 0
                return paid + self._ending(k, s + q, units - before, lost)
            paid += self.price[k][s + q]
        return paid + self.runs.get(k, self.idle)[s + len(plan)][units - plan[-1][0]]

    def _follow(self, k: int, plan: list[tuple[int, float]], s: int):
        """The slots of a schedule, its real work followed; bounds stay on their own grid."""
        data, left, units = self.data, self.data.work, self.units
        while True:
            worked = 0.0
            for q, (done, lost) in enumerate(plan):
                if s + q >= self.last - self.first or self.price[k][s + q] == np.inf:
                    raise _Short
                yield self.first + s + q, int(data.pool[k]), int(data.devices[k])
                worked += (self.h - lost) * data.rate[k]
                if worked >= left * (1 - _EPS) or (self.rounding == "up" and done >= units):
                    return
            s += len(plan)
            left -= worked
            units = units - plan[-1][0] if self.rounding == "up" else min(units, math.ceil(left / self.step - _EPS))
            step = self._next(k, s, units)
            if step is None:
                raise _Short
            k, plan, s = step

    def _next(self, k: int, s: int, units: int):
        run = self.runs.get(k)
        if run is not None and run[s][units] < self.idle[s][units]:
            return k, self._on[k], s
        while s < self.last - self.first and self.idle[s][units] == self.idle[s + 1][units]:
            s += 1
        starts = [(self._cost(k, s, self._plans[k], units), k) for k in self.keep] if s < self.last - self.first else []
        cost, k = min(starts, default=(np.inf, -1))
        return None if cost == np.inf else (k, self._plans[k], s)


def unbroken(data: JobData, unit, free, h: float, first: int, last: int, stability: float = 0.0) -> Schedule:
    """The cheapest unbroken run of a job that is not preemptible: exact, by sums over every start."""
    best = np.inf
    use: tuple[tuple[int, int, int], ...] = ()
    starts: list[tuple[int, float, Iterable[int]]]
    if data.job.running is not None and data.running is not None:
        starts = [(data.running, data.job.running.setup_left, (first,))]
    else:
        restart = data.job.restart if data.job.started else 0.0
        starts = [(k, data.startup[k] + restart, range(first, last)) for k in range(len(data.pool))]
    for k, loss, slots in starts:
        hours = loss + data.work / data.rate[k]
        length = max(1, math.ceil(hours / h - _EPS))
        if length > last - first:
            continue
        p, n = data.pool[k], data.devices[k]
        price = np.where(free[p, first:last] >= n, unit[p, first:last] * n * h, np.inf)
        part = hours / h - (length - 1) if data.second[k] else 1.0
        for s in slots:
            run = price[s - first : s - first + length]
            if len(run) == length:
                cost = run[:-1].sum() + (run[-1] * part if run[-1] < np.inf else np.inf) + data.late[s + length]
                cost += data.early[s]
                if cost < best:
                    best, use = cost, tuple((s + i, int(p), int(n)) for i in range(length))
    if data.job.running is not None and data.running is None:
        best += stability
    return Schedule(float(best), use)
