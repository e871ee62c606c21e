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
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bigmodel.schedule.instance import JobData

# Units of the grid in a slot's work of the slowest configuration. A bound gives away half a unit per slot: 24 units
# gave away 1 %, 200 gave 0.05 to 0.3 % and took 1.5 times as long. Where nothing ties slots together a table is one
# vector per slot and not one per slot and configuration, so that it may be finer.
UNITS_PER_SLOT = {"up": 200, "near": 24, "down": 64}
FINE = 800
MOST_UNITS = {"tied": 25_000, "free": 100_000}
_EPS = 1e-9
_Held = tuple[np.ndarray, list[int]]  # as Table._held returns it


@dataclass(frozen=True)
class Schedule:
    """cost at the given prices; use: (slot, pool, devices) triples in order of slot."""

    cost: float
    use: tuple[tuple[int, int, int], ...]


class _Short(Exception):
    """Rounded "near", the grid let a schedule end before its real work was done."""


class _Scratch(threading.local):
    """Memory that the tables of a thread take turns in: its first touch cost a quarter of a table's time."""

    room = np.empty(0)

    def tables(self, count: int, shape: tuple[int, int]) -> np.ndarray:
        size = count * shape[0] * shape[1]
        if len(self.room) < size:
            self.room = np.empty(size)
        return self.room[:size].reshape(count, *shape)


_scratch = _Scratch()


class Table:
    """The values of one job at given prices; to be used before the next one is made.

    unit: currency per device-hour, (pools, slots). free: devices left, (pools, slots). first, last: the window.
    like: a schedule that resembles the one sought; the grid is chosen so that what it uses rounds least.
    """

    def __init__(
        self, data: JobData, unit, free, h: float, *, rounding: str, first: int, last: int, stability=0.0, units=None,
        like: Schedule | None = None,
    ):  # fmt: skip
        self.data, self.h, self.first, self.last = data, h, first, last
        self.rounding, self.stability = rounding, stability
        slots = np.arange(first, last)
        usable = free[data.pool][:, slots] >= data.devices[:, None]
        price = unit[data.pool][:, slots] * data.devices[:, None] * h
        self.price = np.where(usable, price, np.inf).tolist()  # lists: reading one number is most of what is done
        self._reach = _finite(usable)
        self.late = data.late.tolist()
        self.keep = [k for k in range(len(data.pool)) if usable[k].any()]
        self.loss = data.startup + data.job.restart
        self.units, self.step = self._grid(units or UNITS_PER_SLOT[rounding], like)
        self.idle = np.full((last - first + 1, self.units + 1), np.inf)
        self.idle[:, 0] = 0.0
        tied = [k for k in self.keep if self.loss[k] > 0 or data.job.min_run > 1]
        self.runs = dict(zip(tied, _scratch.tables(len(tied), self.idle.shape), strict=True))
        for run in self.runs.values():
            run[-1] = self.idle[-1]
        self._plans = {k: self._commit(k, float(self.loss[k])) for k in self.keep}
        self._on = {k: [(self._rounded(data.rate[k] * h), 0.0)] for k in self.keep}
        self._late_any = bool(data.late.any())
        starts = {k: self._held(k, self._plans[k]) for k in self.keep}
        stays = {k: self._held(k, self._on[k]) for k in self.runs}
        for s in range(last - first - 1, -1, -1):
            self._fill(s, starts, stays)

    def _grid(self, per_slot: int, like: Schedule | None) -> tuple[int, float]:
        """Units of work and the size of one, chosen so that the rates round little."""
        data = self.data
        if not self.keep:
            return 1, data.work
        gains = data.rate[self.keep] * self.h
        finest = max(gains.min() / per_slot, data.work / MOST_UNITS["tied" if data.switches else "free"])
        if like is not None and like.use:
            steps = self._matched(finest, like)
        else:
            steps = np.linspace(finest, min(1.4 * finest, data.work), 256 if self.rounding == "up" else 32)
        units = gains[None, :] / steps[:, None]
        whole = {"up": np.ceil(units), "near": np.round(units), "down": np.floor(units)}[self.rounding]
        error = np.abs(whole / units - 1)
        step = float(steps[np.argmin(error.mean(axis=1))])
        count = data.work / step
        return max(1, math.floor(count + _EPS) if self.rounding == "up" else math.ceil(count - _EPS)), step

    def _matched(self, finest: float, like: Schedule) -> np.ndarray:
        """Of the steps that divide the work, the 8 by which the rates and the starts of `like` are favoured least."""
        data = self.data
        count = math.ceil(data.work / finest - _EPS)
        counts = np.arange(max(1, math.floor(count / 1.4)), count + 1)
        favour, before = np.zeros(len(counts)), (-2, -1, -1)
        for slot, p, n in like.use:
            k = int(np.flatnonzero((data.pool == p) & (data.devices == n))[0])
            lost = 0.0 if before == (slot - 1, p, n) else self.loss[k]
            units = max(0.0, self.h - lost) * data.rate[k] / data.work * counts
            favour += np.ceil(units - _EPS) - units
            before = (slot, p, n)
        return data.work / counts[np.argsort(favour / counts, kind="stable")[:8]]

    def _rounded(self, work: float) -> int:
        units = work / self.step
        if self.rounding == "near":
            return round(units)
        return math.ceil(units - _EPS) if self.rounding == "up" else math.floor(units + _EPS)

    def _commit(self, k: int, loss: float, least: int | None = None) -> list[tuple[int, float]]:
        """(units done, hours lost in the slot) after each slot that a start commits to."""
        rate, h = self.data.rate[k], self.h
        slots = max(self.data.job.min_run if least is None else least, math.ceil(loss / h - _EPS), 1)
        slots = min(slots, self.last - self.first)  # what reaches past the window is never finished
        done = [max(0.0, q * h - loss) * rate for q in range(slots + 1)]
        return [(self._rounded(done[q + 1]), min(h, max(0.0, loss - q * h))) for q in range(slots)]

    def _ending(self, k: int, s: int, units: int, lost: float) -> float:
        """Cost of ending in slot s with so many units left after `lost` hours of it."""
        hours = self.h
        if self.data.second[k]:
            hours = min(self.h, lost + units * (self.step / self.data.rate[k]))
        return self.price[k][s] * (hours / self.h) + self.late[self.first + s + 1]

    def _held(self, k: int, plan: list[tuple[int, float]]) -> _Held:
        """(slots, units) the share of each slot of a plan that is held when 1, 2, ... units are left, and how many
        units end in each slot."""
        most = min(plan[-1][0], self.units)
        held = np.ones((len(plan), most))
        before, ends = 0, []
        for q, (done, lost) in enumerate(plan):
            top = min(done, most)
            if self.data.second[k]:
                units = np.arange(1, top - before + 1)
                held[q, before:top] = np.minimum(1.0, (lost + units * (self.step / self.data.rate[k])) / self.h)
            held[q + 1 :, before:top] = 0.0
            ends.append(top - before)
            before = top
        return held, ends

    def _started(self, k: int, s: int, plan: _Held, best: np.ndarray) -> None:
        """Lowers `best`, costs by units left, to those of configuration k held from slot s on for a plan's slots."""
        held, ends = plan
        slots, most = held.shape
        if self._reach[k][s] < slots:
            slots = self._reach[k][s]  # what does not end before the devices or the window do is not possible
            most = sum(ends[:slots])
            held = held[:slots, :most]
        paid = self.price[k][s : s + slots]
        cost = held[0] * paid[0] if slots == 1 else np.dot(paid, held)
        if self._late_any:
            late = self.data.late[self.first + s + 1 : self.first + s + slots + 1]
            cost += np.repeat(late, ends[:slots])
        part = best[1 : most + 1]
        np.minimum(part, cost, out=part)
        if slots == len(ends) and most < self.units:
            after = self.runs.get(k, self.idle)[s + slots]
            part = best[most + 1 :]
            np.minimum(part, after[1 : self.units - most + 1] + sum(paid), out=part)

    def _fill(self, s: int, starts: dict[int, _Held], stays: dict[int, _Held]) -> None:
        idle = self.idle[s]
        idle[:] = self.idle[s + 1]
        for k in self.keep:
            if self.price[k][s] < np.inf:
                self._started(k, s, starts[k], idle)
        for k, run in self.runs.items():
            run[s] = idle
            if self.price[k][s] < np.inf:
                self._started(k, s, stays[k], run[s])

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


def _finite(usable: np.ndarray) -> list[list[int]]:
    """How many slots from each on are usable without a break, by configuration."""
    reach = np.zeros((usable.shape[0], usable.shape[1] + 1), dtype=int)
    for s in range(usable.shape[1] - 1, -1, -1):
        reach[:, s] = np.where(usable[:, s], reach[:, s + 1] + 1, 0)
    return reach.tolist()


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
