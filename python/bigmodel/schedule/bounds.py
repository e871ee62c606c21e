"""Lower bounds: the linear relaxation, and the Lagrangian bound that prices capacity and solves each job exactly.

For any prices of capacity, limits and order that are not negative,

    L = sum_j min(drop_j, cheapest schedule of j at those prices) - sum (price x capacity) - sum (price x limit)
        - sum (price of order)

is at most the cost of every plan, since a plan pays no more for capacity than there is. Order: of job b before job a,
at most one of "b ends after slot t" and "a starts by slot t" is true, so that a plan pays each slot's price at most
once: b pays the prices of the slots before its end, a those of the slots from its start on.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

import numpy as np

from bigmodel.schedule import fill
from bigmodel.schedule.fill import hull
from bigmodel.schedule.instance import Instance, JobData
from bigmodel.schedule.state import cheapest

_BUSY = 0.6  # share of its window in which a job is likely to run


@dataclass
class Prices:
    """Multipliers: capacity (pools, slots), quotas (groups, slots), limits (limits,), order (Instance.pairs, slots)."""

    capacity: np.ndarray
    quota: np.ndarray
    limit: np.ndarray
    order: np.ndarray

    @classmethod
    def zero(cls, inst: Instance) -> Prices:
        slots = inst.problem.slots
        return cls(
            np.zeros((len(inst.problem.pools), slots)),
            np.zeros((len(inst.groups), slots)),
            np.zeros(len(inst.stage.limits)),
            np.zeros((len(inst.pairs), slots)),
        )

    def mixed(self, other: Prices, keep: float) -> Prices:
        """`keep` of these prices and the rest of the other's."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Prices(*(keep * mine + (1 - keep) * theirs for mine, theirs in pairs))

    def rent(self, inst: Instance) -> float:
        """What L takes off: the prices of all that there is, negative."""
        limits = sum(price * limit.most for price, limit in zip(self.limit, inst.stage.limits, strict=True))
        quotas = sum(float(row.sum()) * most for row, (_, most) in zip(self.quota, inst.groups, strict=True))
        return -float((self.capacity * inst.count).sum() + quotas + limits + self.order.sum())

    def shared(self, inst: Instance) -> np.ndarray:
        """What a device-hour pays for capacity and quotas, (pools, slots)."""
        total = self.capacity.copy()
        for row, (members, _) in enumerate(inst.groups):
            total[list(members)] += self.quota[row]
        return total / inst.h

    def ordered(self, inst: Instance, data: JobData) -> JobData:
        """The job with what order makes its start and its end cost."""
        late, early = data.late, data.early
        for (before, after), price in zip(inst.pairs, self.order, strict=True):
            if data.index in (before, after) and price.any():
                until = np.concatenate([[0.0], np.cumsum(price)])
                if data.index == before:
                    late = late + until
                else:
                    early = early + until[-1] - until
        return data if late is data.late and early is data.early else replace(data, late=late, early=early)

    def unit(self, inst: Instance, j: int, shared: np.ndarray) -> np.ndarray:
        """Job j's price of a device-hour, (pools, slots)."""
        unit = inst.unit + shared
        for row, limit in enumerate(inst.stage.limits):
            if self.limit[row] and j in limit.members:
                unit = unit + self.limit[row] * (
                    limit.weights.get("cost", 0.0) * inst.problem.price
                    + limit.weights.get("carbon", 0.0) * inst.problem.carbon
                )
        return unit


class Relaxation:
    """The linear relaxation: `program`, linprog's arguments for the worker, and what its answer says.

    A column is the share of a slot that a job spends in a configuration. A job whose window is wide has one column per
    pool and slot, its most efficient configuration at up to its largest count; one that may need more has them all.

    rough: one column per pool and slot for every job, at the efficiency of the count that it is likely to need. Its
    prices come sooner (0.4 s against 4.3 s at 100 x 4 x 168, 17 s at 200 x 5 x 168), but its value is no bound.
    """

    def __init__(self, inst: Instance, rough: bool = False):
        self.inst, self.rough = inst, rough
        self.cost: list[np.ndarray] = []
        self.upper: list[np.ndarray] = []
        self.entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.held: list[tuple[int, int, int, np.ndarray, int]] = []  # job, pool, devices, slots, first column
        self.size = 0
        pools, slots = inst.count.shape
        self.capacity = len(inst.jobs)
        self.quota = self.capacity + pools * slots
        self.limit = self.quota + len(inst.groups) * slots
        self.rows = self.limit + len(inst.stage.limits)
        self.right = np.concatenate(
            [
                [-1.0] * len(inst.jobs),
                inst.count.ravel(),
                np.repeat([float(limit) for _, limit in inst.groups], slots),
                [limit.most for limit in inst.stage.limits],
            ]
        )
        for data in inst.jobs:
            self._job(data)

    def _job(self, data: JobData) -> None:
        slots = np.arange(data.first, data.last)
        tight = not self.rough and self._tight(data, len(slots))
        one_per_slot = None
        if tight and len(slots):
            one_per_slot = self.rows + np.arange(len(slots))
            self.rows += len(slots)
            self.right = np.concatenate([self.right, np.ones(len(slots))])
        for p in np.unique(data.pool):
            mine = data.pool == p
            most = int(data.devices[mine].max())
            points = hull(data.devices[mine], data.rate[mine])[1:]
            if not tight:
                efficient = max(rate / n for n, rate in points)
                if self.rough:
                    efficient = _likely(points, data.work / (_BUSY * max(1, len(slots)) * self.inst.h))
                points = [(most, efficient * most)]
            for n, rate in points:
                self._add(data, int(p), n, rate, slots, one_per_slot)
        if np.isfinite(data.drop):
            self._append(np.array([data.drop]), np.ones(1), [(data.index, -1.0)])
        elif not len(data.pool) or not len(slots):
            self._append(np.zeros(1), np.zeros(1), [(data.index, -1.0)])

    def _tight(self, data: JobData, slots: int) -> bool:
        if not len(data.pool) or data.job.mix_pools:
            return False
        efficient = [np.argmax(np.where(data.pool == p, data.rate / data.devices, 0)) for p in np.unique(data.pool)]
        return bool(data.work > 0.6 * slots * self.inst.h * min(data.rate[k] for k in efficient))

    def _add(self, data: JobData, p: int, n: int, rate: float, slots: np.ndarray, one_per_slot) -> None:
        inst, h = self.inst, self.inst.h
        share = rate * h / data.work
        cost = inst.unit[p, slots] * n * h + data.late[slots + 1] * min(share, 1.0)
        rows: list[tuple] = [(data.index, -share), (self.capacity + p * inst.problem.slots + slots, float(n))]
        for row, (members, _) in enumerate(inst.groups):
            if p in members:
                rows.append((self.quota + row * inst.problem.slots + slots, float(n)))
        for row, limit in enumerate(inst.stage.limits):
            if data.index in limit.members:
                price = limit.weights.get("cost", 0.0) * inst.problem.price[p, slots]
                price = price + limit.weights.get("carbon", 0.0) * inst.problem.carbon[p, slots]
                rows.append((self.limit + row, price * n * h))
        if one_per_slot is not None:
            rows.append((one_per_slot, 1.0))
        self.held.append((data.index, p, n, slots, self.size))
        self._append(cost, np.ones(len(slots)), rows)

    def _append(self, cost: np.ndarray, upper: np.ndarray, rows: list[tuple]) -> None:
        columns = self.size + np.arange(len(cost))
        for row, value in rows:
            self.entries.append((np.broadcast_to(row, len(cost)), columns, np.broadcast_to(value, len(cost))))
        self.cost.append(cost)
        self.upper.append(upper)
        self.size += len(cost)

    def program(self) -> dict:
        from scipy.sparse import csr_array

        rows, columns, values = (np.concatenate(part) for part in zip(*self.entries, strict=True))
        matrix = csr_array((values, (rows, columns)), shape=(self.rows, self.size))
        upper = np.concatenate(self.upper)
        return {
            "c": np.concatenate(self.cost),
            "A_ub": matrix,
            "b_ub": self.right,
            "bounds": np.stack([np.zeros_like(upper), upper], axis=1),
        }

    def prices(self, marginals: np.ndarray) -> Prices:
        """Prices from the duals of the rows."""
        inst, (pools, slots) = self.inst, self.inst.count.shape
        duals = np.maximum(0.0, -marginals)
        capacity = duals[self.capacity : self.quota].reshape(pools, slots)
        quota = duals[self.quota : self.limit].reshape(len(inst.groups), slots)
        order = np.zeros((len(inst.pairs), slots))
        return Prices(capacity, quota, duals[self.limit : self.limit + len(inst.stage.limits)], order)

    def devices(self, x: np.ndarray) -> np.ndarray:
        """What each job holds, (jobs, pools, slots)."""
        held = np.zeros((len(self.inst.jobs), *self.inst.count.shape))
        for j, p, n, slots, first in self.held:
            held[j, p, slots] += n * x[first : first + len(slots)]
        return held


def _likely(points: list[tuple[int, float]], rate: float) -> float:
    """Work per device-hour at the count that gives `rate` per hour, between the hull's points."""
    known = [(0, 0.0), *points]
    for (n0, r0), (n1, r1) in zip(known, points, strict=False):
        if rate <= r1:
            return rate / (n0 + (n1 - n0) * (rate - r0) / (r1 - r0))
    return points[-1][1] / points[-1][0]


def lagrangian(inst: Instance, prices: Prices, late=lambda: False, units: int | None = None) -> float:
    """L at these prices; inf if a job fits nowhere even alone.

    late: asked before each job; from when it is true, jobs count with their relaxation, which is quick and no dearer.
    units: of the dynamic programme's grid in a slot's work; a coarser one gives a lower bound, sooner.
    """
    free, shared = inst.free(), prices.shared(inst)
    total = prices.rent(inst)
    for data in inst.jobs:
        unit = prices.unit(inst, data.index, shared)
        if late():
            best = fill.cheapest(data, unit, free, inst.h, optimistic=True, first=data.first, last=data.last)
        else:
            best = cheapest(inst, prices.ordered(inst, data), unit, free, optimistic=True, units=units)
        total += min(data.drop, best.cost)
    return float(total)
