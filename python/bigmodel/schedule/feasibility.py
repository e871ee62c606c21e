"""Whether a stage's deadlines can be met at all: a plan that meets them, or a proof that there is none.

Phase one of the simplex method, on the master: each job may be left out at a cost of 1, and devices cost nothing. If
the Lagrangian bound at some prices is above 0, every plan leaves a job out. Source: Farkas pricing, Lübbecke and
Desrosiers, Selected topics in column generation (2005).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from bigmodel.schedule import mip, path, programmes, rules
from bigmodel.schedule.bounds import Prices, lagrangian
from bigmodel.schedule.columns import Columns
from bigmodel.schedule.construct import construct
from bigmodel.schedule.instance import Instance, JobData, Stage, build
from bigmodel.schedule.problem import Problem
from bigmodel.schedule.search import Search, TimeUp
from bigmodel.schedule.state import State, cheapest
from bigmodel.schedule.worker import Overdue, Worker

_ROUNDS = 80
_ABOVE = 1e-6  # a bound on the number of jobs left out from which that is proven
_SMOOTHING = 0.5  # weight of the best prices against the master's; Wentges, Weighted Dantzig-Wolfe (1997)
_UNITS = 64  # per slot, of the grid of new schedules: at 24 some probes stayed undecided
_MODEL = 60000  # columns up to which the whole programme is built


@dataclass
class Probe:
    """plan: schedules by job; infeasible: proven; cut: the clock ended the last look before either."""

    problem: Problem
    stage: Stage
    worker: Worker
    seed: int
    plan: dict[int, tuple] | None = None
    infeasible: bool = False
    cut: bool = False

    @property
    def decided(self) -> bool:
        return self.infeasible or self.plan is not None

    def quick(self, end: float) -> None:
        """The relaxation and a first plan; else column generation, and a plan around what its master has chosen."""
        search = self._search(end)
        self.infeasible = any(_cramped(self.problem, data) for data in search.inst.jobs)
        if self.infeasible:
            return
        try:
            search.sketch()
        finally:
            self.plan = search.best
        self.infeasible = search.infeasible
        self.cut = search.cut
        if self.decided or self.cut:
            return
        try:
            # Column generation proves no more than the relaxation for jobs that mix pools, whose programmes are small.
            if all(data.job.mix_pools for data in search.inst.jobs):
                self._whole(search, end)
            else:
                self._generate(search, end)
        except (TimeUp, Overdue):
            self.cut = True

    def thorough(self, end: float) -> None:
        """The programme in whole numbers for half of the time, then the search of a stage."""
        search = self._search(end)
        self._whole(search, (time.monotonic() + end) / 2)
        if not self.decided:
            try:
                search.run()
            finally:
                self.plan = search.best
            self.infeasible = search.infeasible
            self.cut |= search.cut

    def _whole(self, search: Search, end: float) -> None:
        """The programme in whole numbers, without an objective."""
        inst = search.inst
        if inst.size > _MODEL:
            return
        model = programmes.model(inst, range(len(inst.jobs)), State(inst))
        program = model.program()
        program["c"] = np.zeros_like(program["c"])
        answer = mip.solve(self.worker, program, end - time.monotonic())
        self.infeasible, self.cut = answer.infeasible, answer.late
        if answer.x is not None:
            self._offer(State.holding(inst, {j: use for j, use in model.read(answer.x).items() if use}))

    def _search(self, end: float) -> Search:
        """Any plan will do, so its gap is infinite."""
        inst = build(self.problem, replace(self.stage, weights={"cost": 1.0}))
        return Search(inst, self.worker, end, gap=np.inf, seed=self.seed)

    def _offer(self, state: State) -> None:
        if state.score()[:2] == (0, 0.0):
            self.plan = {j: schedule.use for j, schedule in state.schedules.items()}

    def _generate(self, search: Search, end: float) -> None:
        inst = counting(build(self.problem, replace(self.stage, weights={})))
        columns, free = Columns(inst), inst.free()
        out = np.array([data.drop for data in inst.jobs])
        best, centre, current, keep = 0.0, Prices.zero(inst), Prices.zero(inst), _SMOOTHING
        for _ in range(_ROUNDS):
            value, new, shared = current.rent(inst), 0, current.shared(inst)
            for data in inst.jobs:
                search.tick()
                unit = current.unit(inst, data.index, shared)
                found = cheapest(inst, current.ordered(inst, data), unit, free, units=_UNITS)
                value += min(found.cost, data.drop)
                new += columns.add(data.index, found.use)
            if value > best:
                best, centre = value, current
                if value > _ABOVE and self._refuted(inst, current, search):
                    return
            master = self.worker.call("linprog", columns.master(out) | {"method": "highs"}, search.patience())
            if master["status"] != 0:
                return
            if master["value"] <= _ABOVE:
                begun = {j: schedule.use for j, schedule in columns.rounded(master["x"]).schedules.items()}
                self._offer(construct(search.inst, search.prices, 1.0, search.tick, State.holding(search.inst, begun)))
                return
            if not new and keep == 0.0:
                return
            keep = _SMOOTHING if new else 0.0
            current = centre.mixed(columns.prices(master["marginals"]), keep)

    def _refuted(self, inst: Instance, prices: Prices, search: Search) -> bool:
        late = lambda: search.left() < 0  # noqa: E731
        self.infeasible = any(lagrangian(inst, prices, late, units) > _ABOVE for units in (None, path.FINE))
        return self.infeasible


def counting(inst: Instance) -> Instance:
    """The instance whose objective is the number of jobs left out that may not be.

    Where no limit counts money, slots are billed whole: capacity has a price for as long as it is held.
    """
    jobs = []
    for data in inst.jobs:
        second = data.second if inst.stage.limits else np.zeros_like(data.second)
        jobs.append(replace(data, drop=min(data.drop, 1.0), second=second))
    return replace(inst, jobs=jobs)


def _cramped(problem: Problem, data: JobData) -> bool:
    return np.isinf(data.drop) and data.last - data.first < rules.fastest_slots(problem, data.job)
