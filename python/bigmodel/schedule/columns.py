"""The restricted master: one column per schedule seen, choose one for each job within capacity, quotas and limits.

Its relaxation gives prices of capacity better than those of the slot-wise relaxation, since a column carries set-up,
min_run and rounding; its integer programme recombines schedules of many incumbents. Source: Dantzig and Wolfe (1960).
"""

from __future__ import annotations

import numpy as np

from bigmodel.schedule.bounds import Prices
from bigmodel.schedule.instance import Instance
from bigmodel.schedule.state import State, by_slot

_MOSTLY = 0.3  # weight from which a schedule of the master's is put into a plan


class Columns:
    """Schedules by job, each once."""

    def __init__(self, inst: Instance):
        self.inst = inst
        self.job: list[int] = []
        self.use: list[tuple[tuple[int, int, int], ...]] = []
        self.cost: list[float] = []
        self._seen: set[tuple] = set()
        self._probe = State(inst)
        self._usage: list[np.ndarray] = []
        self._alone = inst.free()

    def add(self, j: int, use) -> bool:
        """Adds a schedule that does the job's whole work; whether it is new."""
        if not use or (j, use) in self._seen:
            return False
        self._seen.add((j, use))
        self._probe.put(j, use)
        self.job.append(j)
        self.use.append(tuple(use))
        self.cost.append(self._probe.worth[j])
        self._usage.append(self._probe.usage[:, j].copy())
        self._probe.remove(j)
        return True

    def master(self, penalty: np.ndarray, keep: np.ndarray | None = None) -> dict:
        """The master as arrays: variables are the columns, then one per job for leaving it out.

        keep: which columns take part; None for all. penalty: by job, of leaving out one that may not be dropped;
        a small one keeps the duals from running wild while there are few columns.
        """
        from scipy.sparse import csr_array

        inst = self.inst
        slots, jobs = inst.problem.slots, len(inst.jobs)
        chosen = np.arange(len(self.job)) if keep is None else np.asarray(keep)
        base_quota = jobs + inst.count.size
        base_limit = base_quota + len(inst.groups) * slots
        base_order = base_limit + len(inst.stage.limits)
        pairs = inst.pairs
        rows: list[np.ndarray] = []
        columns: list[np.ndarray] = []
        values: list[np.ndarray] = []
        for column, i in enumerate(chosen):
            use = np.array(self.use[i])
            rows.append(np.array([self.job[i]]))
            values.append(np.ones(1))
            rows.append(jobs + use[:, 1] * slots + use[:, 0])
            values.append(use[:, 2].astype(float))
            for g, (members, _) in enumerate(inst.groups):
                mine = use[np.isin(use[:, 1], members)]
                rows.append(base_quota + g * slots + mine[:, 0])
                values.append(mine[:, 2].astype(float))
            limits = np.flatnonzero(self._usage[i])
            rows.append(base_limit + limits)
            values.append(self._usage[i][limits])
            for row, (before, after) in enumerate(pairs):
                # Outside of the slots where both may run the row says nothing.
                first, last = inst.jobs[after].first, inst.jobs[before].last
                if self.job[i] == before:
                    last = use[-1, 0] + 1
                elif self.job[i] == after:
                    first = use[0, 0]
                else:
                    continue
                held = np.arange(first, last)
                rows.append(base_order + row * slots + held)
                values.append(np.ones(len(held)))
            columns.append(np.full(sum(map(len, rows)) - sum(map(len, columns)), column))
        out = len(chosen) + np.arange(jobs)
        rows.append(np.arange(jobs))
        values.append(np.ones(jobs))
        columns.append(out)
        drop = np.array([data.drop if np.isfinite(data.drop) else penalty[data.index] for data in inst.jobs])
        shape = (base_order + len(pairs) * slots, len(chosen) + jobs)
        matrix = csr_array((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=shape)
        right = np.concatenate(
            [
                inst.count.ravel(),
                np.repeat([float(limit) for _, limit in inst.groups], slots),
                [limit.most for limit in inst.stage.limits],
                np.ones(len(pairs) * slots),
            ]
        )
        return {
            "c": np.concatenate([np.array(self.cost)[chosen], drop]),
            "A_eq": matrix[:jobs],
            "b_eq": np.ones(jobs),
            "A_ub": matrix[jobs:],
            "b_ub": right,
        }

    def rounded(self, x: np.ndarray) -> State:
        """The schedules that a solution of the master mostly consists of, the surest first, as far as there is room."""
        state = State(self.inst)
        for i in np.argsort(-x[: len(self.job)], kind="stable"):
            if x[i] <= _MOSTLY:
                break
            j, use = self.job[i], self.use[i]
            first, last = state.window(j)
            fits = all(
                first <= s < last and not any(state.short(held, p, s) for p, _ in held)
                for s, held in by_slot(use).items()
            )
            if j not in state.schedules and fits:
                state.put(j, use)
        return state

    def slack(self, prices: Prices) -> np.ndarray:
        """By column, its cost at these prices above the least of its job's columns."""
        inst, shared = self.inst, prices.shared(self.inst)
        ordered = [prices.ordered(inst, data) for data in inst.jobs]
        reduced = np.array(
            [
                cost
                + sum(shared[p, s] * n * inst.h for s, p, n in use)
                + (ordered[j].late - inst.jobs[j].late)[use[-1][0] + 1]
                + ordered[j].early[use[0][0]]
                for j, cost, use in zip(self.job, self.cost, self.use, strict=True)
            ]
        )
        job = np.array(self.job)
        least = np.array([reduced[job == j].min(initial=np.inf) for j in range(len(inst.jobs))])
        return reduced - least[job]

    def boxed(self, penalty: np.ndarray, centre: Prices, width: float) -> dict:
        """The master with each price of capacity kept within `width` devices' mean price, and that share, of centre's.

        Capacity may be bought above the box and sold below it; the columns for it come last. Source: boxstep, Marsten,
        Hogan and Blankenship (1975); du Merle et al. (1999).
        """
        from scipy.sparse import csr_array, hstack

        inst, master = self.inst, self.master(penalty)
        price = centre.capacity.ravel()
        unit = float(inst.unit[inst.count > 0].mean()) * inst.h if (inst.count > 0).any() else 0.0
        reach = width * (unit + price)
        sold = np.flatnonzero(price > reach)
        row = np.concatenate([np.arange(len(price)), sold])
        value = np.concatenate([-np.ones(len(price)), np.ones(len(sold))])
        shape = (master["A_ub"].shape[0], len(row))
        trade = csr_array((value, (row, np.arange(len(row)))), shape=shape)
        return master | {
            "c": np.concatenate([master["c"], price + reach, (reach - price)[sold]]),
            "A_eq": hstack([master["A_eq"], csr_array((len(inst.jobs), len(row)))]).tocsr(),
            "A_ub": hstack([master["A_ub"], trade]).tocsr(),
        }

    def prices(self, marginals: np.ndarray) -> Prices:
        """Prices from the duals of the relaxed master's inequality rows."""
        inst, (pools, slots) = self.inst, self.inst.count.shape
        duals = np.maximum(0.0, -marginals)
        quota = pools * slots
        limit = quota + len(inst.groups) * slots
        order = limit + len(inst.stage.limits)
        capacity, quotas = duals[:quota].reshape(pools, slots), duals[quota:limit].reshape(len(inst.groups), slots)
        return Prices(capacity, quotas, duals[limit:order], duals[order:].reshape(len(inst.pairs), slots))
