"""One stage of the objective: an incumbent first and always kept, then better ones and bounds until gap or time.

relaxation -> prices -> construct -> one programme, if small; else columns, or where nothing ties the slots of a large
problem together its relaxation rounded; neighbourhoods by dynamic programming and by milp -> Lagrangian bound
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from bigmodel.schedule import bounds, mip, path, programmes
from bigmodel.schedule.bounds import Prices
from bigmodel.schedule.columns import Columns
from bigmodel.schedule.construct import construct, rounded
from bigmodel.schedule.improve import Improver, thrifty, tidy
from bigmodel.schedule.instance import Instance, Limit, build
from bigmodel.schedule.programmes import Programme
from bigmodel.schedule.state import State, cheapest
from bigmodel.schedule.worker import Lost, Overdue, Worker

_TINY_MODEL = 400  # columns up to which the whole programme is given to milp at once
_WHOLE_MODEL = 6000  # the same when nothing else gets on
_ROUGH_MODEL = 30000  # columns from which the relaxation only gives prices, and a bound's grid fits no job
_COARSE = 48  # units per slot of a first bound, a quarter of the last one's time
_ROUND_SHARE = 0.85  # of the time left: most that the relaxation in full is given where nothing ties slots together
_FEASIBILITY_MODEL = 60000  # the same where nothing else has found a plan
_EASED = 0.6  # of the time left: most for the search without a budget that is the objective itself
_ROUNDS = 60  # of column generation
_MILP_SECONDS = 2.0  # most of a neighbourhood's programme, and half of a tiny problem's
_PAUSE = 150  # steps of dynamic programming while the worker solves one: as long as most programmes take
_NODES = 200  # of a neighbourhood's programme: a limit that does not depend on the machine
_MILD = 3.0  # times a job's cost: the master's penalty for leaving it out
_SMOOTHING = 0.5  # weight of the best prices against the master's; Wentges, Weighted Dantzig-Wolfe (1997)
_WIDTH = 0.1  # of the first box around the best prices: wider after better ones are found, else narrower


class TimeUp(Exception):
    """Raised by a tick once the time is over."""


@dataclass
class Search:
    """The state of one stage's search. best: schedules by job of the incumbent; bound: proven; cut: time ran out."""

    inst: Instance
    worker: Worker
    end: float
    gap: float
    seed: int = 0
    report: Callable[[float, float], None] = lambda value, bound: None
    best: dict[int, tuple] | None = None
    value: float = np.inf
    bound: float = -np.inf
    infeasible: bool = False
    cut: bool = False
    prices: Prices = field(init=False)
    _due: float = field(default=np.inf, init=False)  # when the neighbourhood's answer is to be there

    def __post_init__(self) -> None:
        self.prices = Prices.zero(self.inst)

    def tick(self) -> None:
        if time.monotonic() > self.end:
            raise TimeUp

    def left(self) -> float:
        return self.end - time.monotonic()

    def patience(self) -> float:
        """Seconds that the worker is given: what is left, less most of what it may overstay."""
        return self.left() - 0.3

    def closed(self) -> bool:
        return self.value < np.inf and self.value - self.bound <= self.gap * abs(self.value) + 1e-9

    def sketch(self) -> Search:
        """The relaxation, a first plan and one sweep over it: for who plans again every hour."""
        try:
            self._relax()
            if not self.infeasible:
                state = self._first()
                Improver(state, self.prices, self.seed).sweep(self.tick)
                self._offer(state)
        except TimeUp:
            self.cut = True
        return self

    def run(self, start: dict[int, tuple] | None = None) -> Search:
        """Searches until the gap is proven, nothing is left to try, or time is over; a keyboard interrupt passes.

        start: a plan of another stage, taken as incumbent if it keeps this stage's windows.
        """
        try:
            if start is not None and self._inside(start):
                self._offer(State.holding(self.inst, start))
            self._relax()
            if not self.infeasible and not self.closed():
                self._search()
            if self.best is not None:
                self._tidy(State.holding(self.inst, self.best))
        except TimeUp:
            self.cut = True
            if self.bound == -np.inf and self.value < np.inf:
                self._certify(self.prices)
        return self

    def _inside(self, start: dict[int, tuple]) -> bool:
        jobs = self.inst.jobs
        return all(jobs[j].first <= use[0][0] and use[-1][0] < jobs[j].last for j, use in start.items())

    # --- steps --------------------------------------------------------------------------------------------------------

    def _relax(self) -> None:
        """The relaxation, and while it runs a first plan without its prices."""
        rough = self.inst.size > _ROUGH_MODEL
        relaxation = bounds.Relaxation(self.inst, rough)
        self.worker.begin("linprog", relaxation.program() | {"method": "highs-ipm"}, self.patience())
        begin = time.monotonic()
        try:
            self._offer(construct(self.inst, self.prices, 0.0, self.tick))
        except BaseException:
            self.worker.kill()  # whoever calls next need not wait for this answer
            raise
        try:
            found = self.worker.finish(max(0.0, 0.6 * (self.end - begin) - (time.monotonic() - begin)))
        except Overdue:
            self.cut = True
            return
        self._believe(relaxation, found)

    def _believe(self, relaxation: bounds.Relaxation, found: dict) -> bool:
        """Takes what a relaxation's answer says of prices, bound and feasibility; whether it has a solution."""
        if found["status"] == 2:
            exact = bounds.Relaxation(self.inst).program() | {"method": "highs", "options": {"presolve": False}}
            self.infeasible = self._linprog(exact)["status"] == 2
        elif found["status"] == 0:
            self.prices = relaxation.prices(found["marginals"])
            if not relaxation.rough:
                self._raise(found["value"] - 1e-7 * abs(found["value"]))
        return found["status"] == 0

    def _linprog(self, program: dict) -> dict:
        try:
            return self.worker.call("linprog", program, self.patience())
        except Overdue:
            raise TimeUp from None

    def _search(self) -> None:
        state = self._first()
        improver = Improver(state, self.prices, self.seed)
        improver.sweep(self.tick)
        self._offer(state)
        implied = self.inst.stage.implied
        if self.value == np.inf and improver.score[0] == 0:  # every job has a place, only too dear
            if implied is not None:
                self._eased(implied)
            else:
                thrifty(state, self.prices, self.seed, self.tick)
                self._offer(state)
        if self.closed() or self.infeasible:
            return
        if self.bound == -np.inf:  # the relaxation was rough, or cut off
            self._certify(self.prices, _COARSE)
        size = self.inst.size
        if size <= _TINY_MODEL:
            self._exact(_MILP_SECONDS / 2)
        columns = Columns(self.inst)
        if not self.closed() and not self.infeasible:
            loose = not any(data.switches for data in self.inst.jobs)
            if not (size > _ROUGH_MODEL and loose and self._round(columns, improver)):
                self._generate(columns, state)
        if self.value == np.inf and not self.infeasible and size <= _FEASIBILITY_MODEL:
            self._exact(self.left() / 2)
        if not self.closed() and not self.infeasible:
            self._neighbourhoods(columns)
        if not self.closed() and not self.infeasible and size <= _WHOLE_MODEL:
            self._exact(self.left())

    def _eased(self, limit: Limit) -> None:
        """Searches without that limit until a plan keeps it: a plan that is a little too dear leads to a cheaper one,
        but is none to a search that refuses it."""
        stage = self.inst.stage
        others = tuple(other for other in stage.limits if other is not limit)
        eased = build(self.inst.problem, replace(stage, limits=others))
        most = stage.weights["cost"] * (limit.most * (1 + 1e-6) + 1e-6)
        # What is minimised beside money: that is no part of the limit.
        besides = sum(data.drop for data in self.inst.jobs if np.isfinite(data.drop))
        besides += stage.weights["cost"] * self.inst.problem.stability * len(self.inst.jobs)

        def met(value: float, bound: float) -> None:
            if value <= stage.weights["cost"] * limit.most or bound > most + besides:
                search.end = 0.0

        end = time.monotonic() + _EASED * self.left()
        search = Search(eased, self.worker, end, 0.0, self.seed, met)
        search.run()
        if search.best is not None:
            self._offer(State.holding(self.inst, search.best))
        self.infeasible = self.value == np.inf and bool(search.bound > most + besides)
        self.cut |= self.value == np.inf and not self.infeasible
        self._raise(search.bound)

    def _round(self, columns: Columns, improver: Improver) -> bool:
        """The relaxation in full and a plan near it; whether the relaxation was decided in its share of the time.

        Where nothing ties slots together its corners are nearly whole (100 x 4 x 168: 826 of 8,627 shares are
        fractions) and its prices as good as the master's.
        """
        relaxation = bounds.Relaxation(self.inst)
        end = time.monotonic() + min(self.patience(), _ROUND_SHARE * self.left())
        self.worker.begin("linprog", relaxation.program() | {"method": "highs-ipm"}, end - time.monotonic())
        try:
            for _ in range(_PAUSE):
                improver.step(self.tick)
            self._offer(improver.state)
            found = self.worker.finish(end - time.monotonic())
        except (Overdue, Lost):
            self.cut = True
            return False
        except BaseException:
            self.worker.kill()  # whoever calls next need not wait for this answer
            raise
        if not self._believe(relaxation, found):
            return self.infeasible
        state = rounded(self.inst, self.prices, relaxation.devices(found["x"]), self.tick)
        if state.score()[0] == 0:
            Improver(state, self.prices, self.seed).sweep(self.tick)
        self._offer(state)
        for plan in (improver.state, state):
            for j, schedule in plan.schedules.items():
                columns.add(j, schedule.use)
        if not self.closed():
            self._certify(self.prices, path.UNITS_PER_SLOT["up"])
        return True

    def _first(self) -> State:
        states = []
        for share in (1.0, 0.5, 0.0):
            states.append(construct(self.inst, self.prices, share, self.tick))
            self._offer(states[-1])
            if states[-1].score()[:2] == (0, 0.0):
                break
        return min(states, key=State.score)

    def _exact(self, limit: float) -> None:
        """The whole programme."""
        inst = self.inst
        self.tick()
        if any(np.isinf(data.drop) and (data.last <= data.first or not len(data.pool)) for data in inst.jobs):
            return
        model = programmes.model(inst, range(len(inst.jobs)), State(inst))
        answer = self._mip(model.program(), limit, gap=min(self.gap, 1e-6))
        if answer.infeasible:
            self.infeasible = True
            return
        if answer.x is not None:
            self._offer(State.holding(inst, {j: use for j, use in model.read(answer.x).items() if use}))
        self._raise(answer.bound - 1e-7 * abs(answer.bound))

    def _generate(self, columns: Columns, state: State) -> None:
        """Column generation: prices for the bound, and schedules for the master."""
        inst, free = self.inst, self.inst.free()
        for j, schedule in state.schedules.items():
            columns.add(j, schedule.use)
        centre, current, best = self.prices, self.prices, -np.inf
        stop = time.monotonic() + 0.45 * self.left()
        penalty, width = self._penalty(state, _MILD), _WIDTH
        for round_ in range(_ROUNDS):
            value, new, shared = current.rent(inst), 0, current.shared(inst)
            for data in inst.jobs:
                self.tick()
                found = cheapest(inst, current.ordered(inst, data), current.unit(inst, data.index, shared), free)
                value += min(found.cost, data.drop)
                new += columns.add(data.index, found.use)
            width *= 1.5 if value > best else 0.8
            if value > best:
                best, centre = value, current
            master = self._linprog(columns.boxed(penalty, centre, width) | {"method": "highs"})
            if master["status"] != 0:
                break
            if round_ % 6 == 0 or new == 0:
                self._restart(centre, columns.rounded(master["x"]))
            late = time.monotonic() > stop
            self.cut |= late
            if late or self.closed():
                break
            if master["value"] - best <= 0.1 * self.gap * abs(best) or (new == 0 and current is centre):
                if not master["x"][len(columns.job) + len(inst.jobs) :].any():
                    break
                width *= 4  # done within the box
            current = centre.mixed(columns.prices(master["marginals"]), _SMOOTHING)
        self.prices = centre
        small = self.inst.size <= _ROUGH_MODEL
        self._certify(centre, None if small else path.UNITS_PER_SLOT["up"])
        if not self.closed() and small and not any(data.switches for data in inst.jobs):
            self._certify(centre, path.FINE)

    def _penalty(self, state: State, times: float) -> np.ndarray:
        """A multiple of what each job pays in a plan, or pays on average where that plan has no place for it."""
        paid = np.array([state.worth.get(j, np.nan) for j in range(len(self.inst.jobs))])
        usual = np.nanmean(paid) if np.isfinite(paid).any() else 1.0
        return times * np.maximum(np.where(np.isnan(paid), usual, paid), 1e-3 * usual)

    def _restart(self, prices: Prices, begun: State) -> None:
        """Another plan, at better prices, around what the master has chosen."""
        state = construct(self.inst, prices, 1.0, self.tick, begun)
        if state.score()[0] == 0:
            Improver(state, prices, self.seed).sweep(self.tick)
        self._offer(state)

    def _certify(self, prices: Prices, units: int | None = None) -> None:
        value = bounds.lagrangian(self.inst, prices, lambda: self.left() < 0, units)
        if value == np.inf:
            self.infeasible = True
        else:
            self._raise(value - 1e-9 * abs(value))

    def _neighbourhoods(self, columns: Columns) -> None:
        """Jobs taken out and put back by dynamic programming, while the worker solves the master in whole numbers or
        the programme of a few jobs; what it found is taken up after a fixed number of steps."""
        inst = self.inst
        state = State.holding(inst, self.best) if self.best is not None else State(inst)
        improver = Improver(state, self.prices, self.seed)
        rng = np.random.default_rng(self.seed)
        steps, idle = 0, 0
        most_idle = 4 * _PAUSE + 15 * len(inst.jobs)
        pending: Programme | None = None
        try:
            while idle < most_idle and not self.closed():
                gained = improver.step(self.tick)
                steps, idle = steps + 1, 0 if gained else idle + 1
                if gained:
                    for j, schedule in state.schedules.items():
                        columns.add(j, schedule.use)
                    self._offer(state)
                if steps % _PAUSE == 0:
                    found = self._collect(pending) if pending is not None else None
                    pending = None
                    if found is not None and found.score() < improver.score:
                        self._offer(found)
                        state = found
                        improver = Improver(state, self.prices, self.seed + steps)
                        idle = 0
                    self.tick()
                    if steps % (3 * _PAUSE) == 0:
                        programme = programmes.few_jobs(inst, state, rng, _WHOLE_MODEL)
                    else:
                        spread = max(self.value - self.bound, 0.0)
                        programme = programmes.recombination(columns, self.prices, self.value, spread, self.gap / 4)
                    pending = None if programme is None else self._send(programme)
        finally:
            if pending is not None:
                self.worker.kill()  # whoever calls next need not wait for this answer

    def _send(self, programme: Programme) -> Programme | None:
        """Begins a neighbourhood's programme with a part of the time that is left, if that is worth it."""
        limit = min(_MILP_SECONDS, max(0.2, 0.15 * self.left()), self.patience())
        if limit < 0.05:
            self.cut = True
            return None
        self._due = time.monotonic() + limit
        mip.begin(self.worker, programme.arrays, limit, programme.gap, _NODES)
        return programme

    def _collect(self, pending: Programme) -> State | None:
        answer = mip.finish(self.worker, pending.arrays, self._due - time.monotonic())
        if answer is None:
            return None
        self.cut |= answer.late
        return None if answer.x is None else pending.read(answer.x)

    def _mip(self, program: dict, limit: float, **options) -> mip.Answer:
        answer = mip.solve(self.worker, program, max(0.05, min(limit, self.patience())), **options)
        self.cut |= answer.late
        return answer

    # --- keeping ------------------------------------------------------------------------------------------------------

    def _offer(self, state: State) -> None:
        missing, over, value = state.score()
        if missing == 0 and over == 0 and value < self.value - 1e-12:
            self.best = {j: schedule.use for j, schedule in state.schedules.items()}
            self.value = float(value)
            self.report(self.value, self.bound)

    def _tidy(self, state: State) -> None:
        tidy(state, self.tick)
        self.best, self.value = {j: schedule.use for j, schedule in state.schedules.items()}, float(state.score()[2])

    def _raise(self, bound: float) -> None:
        if bound > self.bound:
            self.bound = float(bound)
            self.report(self.value, self.bound)
