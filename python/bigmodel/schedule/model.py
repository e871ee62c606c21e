"""The mixed-integer programme: docs/planner.md names every variable and row below.

For a job j, configuration k = (pool, count) and slot s of its window:

    x[k,s]    j runs in k in slot s              n[p,s]  devices of pool p, for jobs that mix pools (an integer)
    u[k,s]    a run starts                       f[k,s]  the first run starts, which loses no restart
    done[s]   j has ended before slot s          e[k,s]  share of its last slot that j does not need
    drop      j is left out

Work is scaled to 1 per job and money to the problem's own size, so that coefficients stay within few orders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bigmodel.schedule.instance import Instance, JobData


@dataclass
class Elastic:
    """Which families of limits may be stretched, at the cost of the relative change: for explaining infeasibility."""

    deadlines: bool = False
    capacity: bool = False
    budgets: bool = False


@dataclass
class _Job:
    """Column numbers of one job; -1 where there is none. x, u, f, e: (configurations, slots); done: (slots + 1,)."""

    data: JobData
    first: int
    last: int
    x: np.ndarray
    u: np.ndarray | None = None
    f: np.ndarray | None = None
    e: np.ndarray | None = None
    done: np.ndarray | None = None
    drop: int = -1


class Model:
    """The programme of some jobs within `free` devices; the others stay where a plan has them.

    free: devices left, (pools, slots). windows: (first, last) by job. elastic: stretch limits instead of costs.
    """

    def __init__(self, inst: Instance, members, free, windows, room, elastic: Elastic | None = None):
        self.inst, self.elastic = inst, elastic
        self._cost: list[float] = []
        self._upper: list[float] = []
        self._whole: list[int] = []
        self._rows: list[tuple[list, list, float, float]] = []
        self.stretch: dict[tuple, int] = {}
        self.jobs: dict[int, _Job] = {}
        for j in members:
            self.jobs[j] = self._job(inst.jobs[j], *windows[j])
        for job in self.jobs.values():
            self._precedence(job)
        self._capacity(free)
        self._limits(room)

    @property
    def size(self) -> int:
        return len(self._cost)

    # --- columns and rows ---------------------------------------------------------------------------------------------

    def _new(self, cost: float, upper: float = 1.0, whole: bool = True) -> int:
        self._cost.append(0.0 if self.elastic else cost)
        self._upper.append(upper)
        self._whole.append(int(whole))
        return len(self._cost) - 1

    def _row(self, columns, values, low: float, high: float) -> None:
        self._rows.append((list(columns), list(values), low, high))

    def _job(self, data: JobData, first: int, last: int) -> _Job:
        slots = max(0, last - first)
        job = _Job(data, first, last, np.full((len(data.pool), slots), -1))
        work: list[tuple[int, float]] = []
        if np.isfinite(data.drop):
            job.drop = self._new(data.drop)
            work.append((job.drop, 1.0))
        if not data.job.mix_pools:
            self._binaries(job, work)
        else:
            self._mixed(job, work)
        self._row([c for c, _ in work], [v for _, v in work], 1.0, np.inf)
        if job.drop >= 0:
            for column in job.x[job.x >= 0]:
                self._row([column, job.drop], [1.0, float(self._upper[column])], -np.inf, float(self._upper[column]))
        return job

    def _price(self, data: JobData, k: Any, s: int) -> float:
        return float(self.inst.unit[data.pool[k], s] * data.devices[k] * self.inst.h)

    def _binaries(self, job: _Job, work: list) -> None:
        """x for every configuration and slot, with runs, set-up, min_run, the end and the last slot's share."""
        data, h = job.data, self.inst.h
        slots = range(job.first, job.last)
        for k in range(len(data.pool)):
            for i, s in enumerate(slots):
                job.x[k, i] = self._new(self._price(data, k, s))
                work.append((job.x[k, i], data.rate[k] * h / data.work))
        job.done = np.array([self._new(0.0) for _ in range(len(slots) + 1)])
        for i in range(len(slots)):
            self._row([job.done[i], job.done[i + 1]], [1, -1], -np.inf, 0)
            self._row([*job.x[:, i], job.done[i]], [1.0] * (len(data.pool) + 1), -np.inf, 1)
            # An end at i + 1 is an end in slot i: the job ran there.
            self._row([job.done[i + 1], job.done[i], *job.x[:, i]], [1, -1] + [-1] * len(data.pool), -np.inf, 0)
            if not self.elastic:
                self._cost[job.done[i + 1]] += float(data.late[job.first + i + 1])
                self._cost[job.done[i]] -= float(data.late[job.first + i + 1])
        ends = [job.done[-1], *([job.drop] if job.drop >= 0 else [])]
        self._row([job.done[0]], [1], 0, 0)
        self._row(ends, [1.0] * len(ends), 1, 1)
        self._shares(job, work)
        if data.switches or data.job.running is not None:
            self._runs(job, work)

    def _shares(self, job: _Job, work: list) -> None:
        """Billing by the second gives back what the job does not need of its last slot."""
        data, h = job.data, self.inst.h
        if not data.second.any():
            return
        job.e = np.full(job.x.shape, -1)
        assert job.done is not None
        for i in range(job.x.shape[1]):
            columns = []
            for k in np.flatnonzero(data.second):
                back = -self._price(data, k, job.first + i)
                if back < 0 or self.inst.stage.limits:
                    e = self._new(back, whole=False)
                    job.e[k, i] = e
                    columns.append(e)
                    self._row([e, job.x[k, i]], [1, -1], -np.inf, 0)
                    work.append((e, -data.rate[k] * h / data.work))
            if columns:
                self._row([*columns, job.done[i + 1], job.done[i]], [1.0] * len(columns) + [-1, 1], -np.inf, 0)

    def _runs(self, job: _Job, work: list) -> None:
        data, j = job.data, job.data.job
        assert job.done is not None
        shape = job.x.shape
        job.u = np.array([[self._new(0.0) for _ in range(shape[1])] for _ in range(shape[0])]).reshape(shape)
        loses = j.restart > 0 and not j.started
        if loses:
            job.f = np.array([[self._new(0.0) for _ in range(shape[1])] for _ in range(shape[0])]).reshape(shape)
            self._row(job.f.ravel(), [1.0] * job.f.size, 0, 1)
        stays = data.running if j.running is not None and job.first == self.inst.problem.now else None
        for k in range(shape[0]):
            for i in range(shape[1]):
                before = [(job.x[k, i - 1], 1.0)] if i else []
                free = 1.0 if i == 0 and stays == k else 0.0  # the job runs here already
                terms = [(job.u[k, i], 1.0), (job.x[k, i], -1.0), *before]
                self._row([c for c, _ in terms], [v for _, v in terms], -free, np.inf)
                self._row([job.u[k, i], job.x[k, i]], [1, -1], -np.inf, 0)
                if before:
                    self._row([job.u[k, i], before[0][0]], [1, 1], -np.inf, 1)
                elif free:
                    self._row([job.u[k, i]], [1], 0, 0)
                hours = data.startup[k] + j.restart
                if hours:
                    work.append((job.u[k, i], -data.rate[k] * hours / data.work))
                if job.f is not None:
                    self._row([job.f[k, i], job.u[k, i]], [1, -1], -np.inf, 0)
                    work.append((job.f[k, i], data.rate[k] * j.restart / data.work))
                self._min_run(job, k, i)
        if job.f is not None:
            for i in range(shape[1]):
                columns = [*job.x[:, i], *job.f[:, : i + 1].ravel()]
                self._row(columns, [1.0] * shape[0] + [-1.0] * (shape[0] * (i + 1)), -np.inf, 0)
        self._running(job, stays, work)
        if not j.preemptible:
            runs_already = 1.0 if stays is not None and j.running is not None else 0.0
            self._row(job.u.ravel(), [1.0] * job.u.size, 0, 1 - runs_already)

    def _min_run(self, job: _Job, k: int, i: int) -> None:
        """A run that started in the last min_run slots goes on, unless the job has ended."""
        least = job.data.job.min_run
        assert job.u is not None and job.done is not None
        if least > 1:
            recent = job.u[k, max(0, i - least + 1) : i + 1]
            self._row([*recent, job.x[k, i], job.done[i]], [1.0] * len(recent) + [-1, -1], -np.inf, 0)

    def _running(self, job: _Job, stays: int | None, work: list) -> None:
        """A job that runs at Problem.now: its set-up still to lose, its run's least length, and the price of moving."""
        running, inst = job.data.job.running, self.inst
        if running is None or not job.x.shape[1]:
            return
        stability = inst.problem.stability * inst.stage.weights.get("cost", 0.0)
        drop = [job.drop] if job.drop >= 0 else []
        if stability:
            kept = [self._new(stability, whole=False), *drop, *([job.x[stays, 0]] if stays is not None else [])]
            self._row(kept, [1.0] * len(kept), 1, np.inf)
        if stays is None:
            return
        if running.setup_left:
            work.append((job.x[stays, 0], -job.data.rate[stays] * running.setup_left / job.data.work))
        least = job.x.shape[1] if not job.data.job.preemptible else max(0, job.data.job.min_run - running.slots)
        assert job.done is not None
        for i in range(min(least, job.x.shape[1])):
            self._row([job.x[stays, i], job.done[i], *drop], [1.0] * (2 + len(drop)), 1, np.inf)

    def _mixed(self, job: _Job, work: list) -> None:
        """One integer per pool and slot where the rate is linear in devices, else one binary per count."""
        data, h = job.data, self.inst.h
        for p in np.unique(data.pool):
            mine = np.flatnonzero(data.pool == p)
            per_device = data.rate[mine] / data.devices[mine]
            every = np.array_equal(data.devices[mine], np.arange(1, len(mine) + 1))
            linear = every and np.allclose(per_device, per_device[0], rtol=1e-9)
            for i, s in enumerate(range(job.first, job.last)):
                late = self._mixed_late(job, i)
                if linear:
                    column = self._new(self._price(data, mine[0], s), upper=float(len(mine)))
                    job.x[mine[0], i] = column
                    work.append((column, data.rate[mine[0]] * h / data.work))
                    if late is not None:
                        self._row([column, late], [1, -float(len(mine))], -np.inf, 0)
                    continue
                for k in mine:
                    job.x[k, i] = self._new(self._price(data, k, s))
                    work.append((job.x[k, i], data.rate[k] * h / data.work))
                    if late is not None:
                        self._row([job.x[k, i], late], [1, -1], -np.inf, 0)
                self._row(job.x[mine, i], [1.0] * len(mine), 0, 1)
        self._mixed_end(job, work)

    def _mixed_end(self, job: _Job, work: list) -> None:
        """done[i]: nothing runs from slot i on, for who waits for it and for what the last slot gives back.

        The shares given back may differ between pools, which the rules do not allow: a relaxation, so the bound holds.
        """
        data, h = job.data, self.inst.h
        waited = any(data.index in other.after for other in self.inst.jobs)
        if not waited and not data.second.any():
            return
        job.done = np.array([self._new(0.0) for _ in range(job.x.shape[1] + 1)])
        job.e = np.full(job.x.shape, -1)
        self._row([job.done[0]], [1], 0, 0)
        for i in range(job.x.shape[1]):
            held = job.x[:, i][job.x[:, i] >= 0]
            self._row([job.done[i], job.done[i + 1]], [1, -1], -np.inf, 0)
            self._row([job.done[i + 1], job.done[i], *held], [1, -1] + [-1] * len(held), -np.inf, 0)
            for k in np.flatnonzero(job.x[:, i] >= 0):
                column, most = job.x[k, i], self._upper[job.x[k, i]]
                self._row([column, job.done[i]], [1, most], -np.inf, most)
                if data.second[k]:
                    e = self._new(-self._price(data, k, job.first + i), upper=most, whole=False)
                    job.e[k, i] = e
                    self._row([e, column], [1, -1], -np.inf, 0)
                    self._row([e, job.done[i + 1], job.done[i]], [1, -most, most], -np.inf, 0)
                    work.append((e, -data.rate[k] * h / data.work))

    def _mixed_late(self, job: _Job, i: int) -> int | None:
        late = job.data.late[job.first + i + 1] - (job.data.late[job.first + i] if i else 0.0)
        if not late or self.elastic:
            return None
        key = ("late", job.data.index, i)
        if key not in self.stretch:
            self.stretch[key] = self._new(late, whole=True)
            if ("late", job.data.index, i - 1) in self.stretch:
                before = self.stretch["late", job.data.index, i - 1]
                self._row([self.stretch[key], before], [1, -1], -np.inf, 0)
        return self.stretch[key]

    # --- what ties jobs together --------------------------------------------------------------------------------------

    def _precedence(self, job: _Job) -> None:
        """A job runs in a slot only if what it follows has ended before."""
        for before in job.data.after:
            if before not in self.jobs:
                continue
            other = self.jobs[before]
            if other.drop >= 0:
                drops = [(other.drop, 1.0), *([(job.drop, -1.0)] if job.drop >= 0 else [])]
                self._row([c for c, _ in drops], [v for _, v in drops], -np.inf, 0)
            assert other.done is not None
            for i in range(job.x.shape[1]):
                at = job.first + i - other.first
                columns = [c for c in job.x[:, i] if c >= 0]
                for c in columns:
                    if at < 0:
                        self._row([c], [1], 0, 0)
                    elif at < len(other.done):
                        self._row([c, other.done[at]], [1, -self._upper[c]], -np.inf, 0)

    def _capacity(self, free) -> None:
        inst = self.inst
        terms: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for job in self.jobs.values():
            data = job.data
            for k, i in np.argwhere(job.x >= 0):
                terms.setdefault((int(data.pool[k]), job.first + int(i)), []).append(
                    (job.x[k, i], float(data.devices[k]))
                )
        for (p, s), row in terms.items():
            self._stretched(row, float(free["pool"][p, s]), ("capacity", p, s), float(inst.count[p].max() or 1))
        for g, (members, _) in enumerate(inst.groups):
            for s in range(inst.problem.slots):
                row = [term for p in members for term in terms.get((p, s), [])]
                if row:
                    self._stretched(row, float(free["quota"][g][s]), ("quota", g, s), float(inst.groups[g][1] or 1))

    def _stretched(self, row, most: float, key: tuple, scale: float) -> None:
        columns, values = [c for c, _ in row], [v for _, v in row]
        if self.elastic and self.elastic.capacity:
            total = sum(self._upper[c] * v for c, v in row)
            extra = self._new(0.0, upper=max(0.0, total - most))
            self._cost[extra] = 1.0 / scale
            self.stretch[key] = extra
            columns, values = [*columns, extra], [*values, -1.0]
        self._row(columns, values, -np.inf, most)

    def _limits(self, room) -> None:
        """Budgets, and what earlier stages of the objective left."""
        for row, limit in enumerate(self.inst.stage.limits):
            scale = max(abs(limit.most), 1e-9)
            terms = []
            for j in set(limit.members) & set(self.jobs):
                terms += self._measure(self.jobs[j], limit.weights, 1.0 / scale)
            if not terms:
                continue
            columns, values = [c for c, _ in terms], [v for _, v in terms]
            if self.elastic and self.elastic.budgets:
                extra = self._new(0.0, upper=np.inf, whole=False)
                self._cost[extra] = 1.0
                self.stretch["budget", row] = extra
                columns, values = [*columns, extra], [*values, -1.0]
            self._row(columns, values, -np.inf, room[row] / scale)

    def _measure(self, job: _Job, weights: dict[str, float], scale: float) -> list[tuple[int, float]]:
        data, inst = job.data, self.inst
        unit = weights.get("cost", 0.0) * inst.problem.price + weights.get("carbon", 0.0) * inst.problem.carbon
        terms = []
        for k, i in np.argwhere(job.x >= 0):
            price = unit[data.pool[k], job.first + i] * data.devices[k] * inst.h * scale
            if price:
                terms.append((job.x[k, i], price))
                if job.e is not None and job.e[k, i] >= 0:
                    terms.append((job.e[k, i], -price))
        weight = weights.get("lateness", 0.0) * data.job.priority * inst.h * scale
        if weight and job.done is not None and data.job.deadline is not None:
            due = inst.problem.clock.deadline(data.job.deadline)
            for i in range(1, len(job.done)):
                late = max(0, job.first + i - due) * weight
                if late:
                    terms += [(job.done[i], late), (job.done[i - 1], -late)]
        return terms

    # --- in and out ---------------------------------------------------------------------------------------------------

    def deadline_costs(self, ends) -> None:
        """Makes running past `ends`, the slots of the jobs' own deadlines, cost its share of the window."""
        for j, job in self.jobs.items():
            span = max(1, ends[j] - self.inst.jobs[j].first)
            before = None
            for i in range(max(0, ends[j] - job.first), job.x.shape[1]):
                column = self._new(0.0)
                self._cost[column] = 1.0 / span
                for c in job.x[:, i][job.x[:, i] >= 0]:
                    self._row([c, column], [1, -self._upper[c]], -np.inf, 0)
                if before is not None:
                    self._row([column, before], [1, -1], -np.inf, 0)
                before = column

    def program(self) -> dict:
        from scipy.sparse import csr_array

        rows = np.repeat(np.arange(len(self._rows)), [len(row[0]) for row in self._rows])
        columns = np.concatenate([np.asarray(row[0], dtype=int) for row in self._rows])
        values = np.concatenate([np.asarray(row[1], dtype=float) for row in self._rows])
        matrix = csr_array((values, (rows, columns)), shape=(len(self._rows), self.size))
        low, high = np.array([row[2] for row in self._rows]), np.array([row[3] for row in self._rows])
        return {
            "c": np.array(self._cost),
            "rows": (matrix, low, high),
            "bounds": (np.zeros(self.size), np.array(self._upper)),
            "integrality": np.array(self._whole),
        }

    def read(self, x: np.ndarray) -> dict[int, tuple[tuple[int, int, int], ...]]:
        """Each job's (slot, pool, devices) triples; an empty tuple for a dropped one."""
        found = {}
        for j, job in self.jobs.items():
            use = []
            for k, i in np.argwhere(job.x >= 0):
                value = int(round(x[job.x[k, i]]))
                if value:
                    devices = value if self._upper[job.x[k, i]] > 1 else int(job.data.devices[k])
                    use.append((job.first + int(i), int(job.data.pool[k]), devices))
            found[j] = tuple(sorted(use))
        return found
