"""A weighted sum with bottleneck measures in it: branch and bound on intervals of their values.

On a box of values low <= v <= high the sum is at least weight x low, plus a bound on what the separable measures weigh
within the deadlines that `high` gives. The box of the least bound is looked at again or split.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from bigmodel.schedule.bisection import Bisection
from bigmodel.schedule.bottleneck import Bottleneck
from bigmodel.schedule.bounds import Prices
from bigmodel.schedule.instance import build, stage_for
from bigmodel.schedule.problem import Problem
from bigmodel.schedule.search import Search
from bigmodel.schedule.state import State
from bigmodel.schedule.worker import Lost, Worker

_FLOORS = 0.2  # of the time left: most that the least value of one measure may take
_SHARE = 0.4  # of the time left: most of a box's first look; each further one doubles it
_LEAST = 0.3  # seconds of a look
_PROVEN = 1e-6  # a relative gap that counts as none: the solver's own bounds are taken as less by a tenth of it


@dataclass
class Box:
    """low, high: indices of each measure's values. rest: a bound on the separable part. at: high at the last look.

    loose: how far the last look may be from the separable part's optimum. stuck: it proved no more than the one before.
    over: nor would another.
    """

    low: tuple[int, ...]
    high: tuple[int, ...]
    rest: float = -np.inf
    at: tuple[int, ...] = ()
    loose: float = np.inf
    seconds: float = 0.0
    stuck: bool = False
    over: bool = False


@dataclass
class _Look(Search):
    """A search that also ends once its bound shows that the box has no better plan."""

    enough: float = np.inf

    def closed(self) -> bool:
        return self.bound >= self.enough or super().closed()


class Weighing:
    """best, value, bound: of the weighted sum. prices: of capacity, where the best plan was found."""

    def __init__(
        self, problem: Problem, separable: dict[str, float], others: dict[str, float], worker: Worker, *,
        gap: float, seed: int, report: Callable[[float, float], None] = lambda value, bound: None,
    ):  # fmt: skip
        self.problem, self.worker, self.gap, self.seed, self.report = problem, worker, gap, seed, report
        self.stage = stage_for(problem, separable or {"cost": 0.0})
        self.measures = [Bottleneck(problem, name, self.stage.drops) for name in others]
        self.weights = list(others.values())
        self.best: dict[int, tuple] | None = None
        self.value, self.bound = np.inf, -np.inf
        self.prices: Prices | None = None
        self.infeasible = self.cut = False
        self.stopped: BaseException | None = None
        self._inst = build(problem, self.stage)
        self._boxes: list[Box] = []
        self._given_up = np.inf  # the least bound of what is no longer looked at

    def run(self, end: float) -> Weighing:
        """Goes on until the gap is proven, time is over or nothing is left to try."""
        try:
            floors = self._least(end)
            if not self.infeasible:
                self._boxes = [Box(floors, tuple(len(measure.values) - 1 for measure in self.measures))]
                self._branch(end)
                self.infeasible = not self._boxes and self.best is None and self._given_up == np.inf
        except (KeyboardInterrupt, Lost) as error:
            self.stopped = error
        self._tell()
        return self

    def _least(self, end: float) -> tuple[int, ...]:
        floors = []
        for measure in self.measures:
            found = Bisection(
                self.problem, self.stage, measure.name, self.worker, gap=0.0, seed=self.seed, start=self.best
            )
            found.run(time.monotonic() + (end - time.monotonic()) * _FLOORS, quick=True)
            if found.best is not None:
                self._offer(found.best)
            if found.stopped is not None:
                raise found.stopped
            self.infeasible |= found.infeasible
            floors.append(found.low)
        return tuple(floors)

    def _branch(self, end: float) -> None:
        while self._boxes:
            box = min(self._boxes, key=self._bound)
            self._tell()
            if self.value - self.bound <= self._slack():
                return
            if time.monotonic() > end:
                self.cut = True
                return
            if not self._trim(box):
                self._boxes.remove(box)
                continue
            wide = box.low != box.high
            if wide and (box.stuck or self._weigh(box.high) - self._weigh(box.low) >= box.loose):
                self._split(box)
            elif box.at != box.high or not box.over:
                self._look(box, end)
            else:
                self._given_up = min(self._given_up, self._bound(box))
                self._boxes.remove(box)

    def _weigh(self, at: tuple[int, ...]) -> float:
        pairs = zip(self.weights, self.measures, at, strict=True)
        return sum(weight * float(measure.values[i]) for weight, measure, i in pairs)

    def _bound(self, box: Box) -> float:
        return box.rest + self._weigh(box.low)

    def _slack(self) -> float:
        return max(self.gap, _PROVEN) * abs(self.value) + 1e-9 if self.value < np.inf else 0.0

    def _trim(self, box: Box) -> bool:
        """Takes off the values that the box's bound rules out; whether any are left."""
        enough = self.value - self._slack()
        for m, (weight, measure) in enumerate(zip(self.weights, self.measures, strict=True)):
            others = self._bound(box) - weight * float(measure.values[box.low[m]])
            first = int(np.searchsorted(others + weight * measure.values, enough))
            if first <= box.high[m]:
                least = max(first, box.low[m])
                self._given_up = min(self._given_up, others + weight * float(measure.values[least]))
                if first <= box.low[m]:
                    return False
                box.high = (*box.high[:m], first - 1, *box.high[m + 1 :])
        return True

    def _split(self, box: Box) -> None:
        """Halves the measure that weighs most between low and high."""
        spread = [
            weight * float(measure.values[high] - measure.values[low]) if high > low else -1.0
            for weight, measure, low, high in zip(self.weights, self.measures, box.low, box.high, strict=True)
        ]
        m = int(np.argmax(spread))
        values = self.measures[m].values[box.low[m] : box.high[m] + 1]
        middle = box.low[m] + int(np.searchsorted(values, (values[0] + values[-1]) / 2, side="right")) - 1
        lower = replace(box, high=(*box.high[:m], middle, *box.high[m + 1 :]), at=(), stuck=False)
        box.low = (*box.low[:m], middle + 1, *box.low[m + 1 :])
        self._boxes.append(lower)

    def _look(self, box: Box, end: float) -> None:
        """Minimises the separable part within the box's deadlines."""
        ends = self.stage.ends
        for measure, high in zip(self.measures, box.high, strict=True):
            ends = measure.ends(measure.values[high], ends)
        enough = self.value - self._slack() - self._weigh(box.low)
        now = time.monotonic()
        again, proven = box.at == box.high, box.rest
        box.seconds = 2 * box.seconds if again else max(_LEAST, _SHARE * (end - now))
        box.at = box.high
        until = min(end, now + box.seconds)
        inst = build(self.problem, replace(self.stage, ends=ends))
        search = _Look(inst, self.worker, until, max(self.gap, _PROVEN) / 2, self.seed, enough=enough)
        try:
            search.run(self.best)
        finally:
            if search.best is not None and self._offer(search.best):
                self.prices = search.prices
            box.rest = np.inf if search.infeasible else max(box.rest, search.bound)
        self.cut |= search.cut
        box.over = not search.cut
        box.stuck = box.over or again and box.rest <= proven
        box.loose = min(search.value, self.value - self._weigh(box.low)) - box.rest

    def _offer(self, plan: dict[int, tuple]) -> bool:
        at = tuple(measure.reached(plan) for measure in self.measures)
        value = float(State.holding(self._inst, plan).score()[2]) + self._weigh(at)
        if value < self.value:
            self.best, self.value = plan, value
            return True
        return False

    def _tell(self) -> None:
        bound = min([self._given_up, self.value, *(self._bound(box) for box in self._boxes)])
        if bound < np.inf:  # else no plan is possible, or none of the boxes has been looked at
            self.bound = max(self.bound, bound)
            self.report(self.value, self.bound)
