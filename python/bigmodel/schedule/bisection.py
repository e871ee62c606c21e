"""The least value of a bottleneck measure: bisected between plans that were found and deadlines that none meets."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from bigmodel.schedule.bottleneck import Bottleneck
from bigmodel.schedule.feasibility import Probe
from bigmodel.schedule.instance import Stage
from bigmodel.schedule.problem import Problem
from bigmodel.schedule.worker import Lost, Worker

_FIRST_LOOK = 1 / 3  # of the time left: most of a quick probe's
_QUICK = 2.0  # seconds that it has at least: a solver's process that is killed takes one to come back
_SECONDS = 1.0  # of the first thorough probe; each pass over what is undecided doubles it


class Bisection:
    """best: schedules by job, `start` until a better plan is found. low, high: indices of the least value that is not
    proven impossible, and of best's (one past the last without a plan).

    infeasible: no value is possible. cut: the clock ended a look. ended: more time would not help. stopped: what ended
    the search from outside.
    """

    def __init__(
        self, problem: Problem, stage: Stage, name: str, worker: Worker, *, gap: float, seed: int,
        start: dict[int, tuple] | None = None,
    ):  # fmt: skip
        self.problem, self.stage, self.worker, self.gap, self.seed = problem, stage, worker, gap, seed
        self.measure = Bottleneck(problem, name, stage.drops)
        self.values = self.measure.values
        self.best: dict[int, tuple] | None = None
        self.low, self.high = 0, len(self.values)
        self.infeasible = self.cut = self.ended = False
        self.stopped: BaseException | None = None
        self._level = 0  # 0: quick probes; then thorough ones, each pass twice as long as the one before
        self._undecided: list[int] = []  # in this pass
        self._cut = False  # a probe of this pass might have decided with more time
        if start is not None:
            self._take(start)

    @property
    def value(self) -> float:
        return float(self.values[self.high]) if self.best is not None else np.inf

    @property
    def bound(self) -> float:
        return np.inf if self.infeasible else float(self.values[self.low])

    @property
    def ends(self) -> tuple[int, ...]:
        return self.stage.ends if self.best is None else self.measure.ends(self.value, self.stage.ends)

    @property
    def closed(self) -> bool:
        return self.infeasible or self.value < np.inf and self.value - self.bound <= self.gap * self.value

    def run(self, end: float, quick: bool = False) -> Bisection:
        """Goes on until the gap is proven, time is over or nothing is left to try. quick: one pass of quick probes."""
        try:
            while not self.closed:
                if time.monotonic() > end:
                    self.cut = True
                    break
                probe = self._next()
                if probe is not None:
                    self._look(probe, end)
                elif quick:
                    break
                elif self._level and not self._cut:
                    self.ended = True
                    break
                else:
                    self._level, self._undecided, self._cut = self._level + 1, [], False
            self.ended |= self.closed
        except (KeyboardInterrupt, Lost) as error:
            self.stopped = error
        return self

    def _next(self) -> int | None:
        """The middle of the larger part beside what is undecided, since what is harder to decide lies between."""
        if self.best is None:
            top = len(self.values) - 1
            return None if top in self._undecided else top
        left, right = min([self.high, *self._undecided]), max([self.low - 1, *self._undecided])
        if left - self.low >= self.high - 1 - right:
            return (self.low + left) // 2 if left > self.low else None
        return (right + self.high) // 2 if right + 1 < self.high else None

    def _look(self, at: int, end: float) -> None:
        stage = replace(self.stage, ends=self.measure.ends(self.values[at], self.stage.ends))
        probe = Probe(self.problem, stage, self.worker, self.seed + self._level)
        now = time.monotonic()
        try:
            if not self._level:
                probe.quick(min(end, now + max(_QUICK, (end - now) * _FIRST_LOOK)))
            else:
                probe.thorough(min(end, now + _SECONDS * 2 ** (self._level - 1)))
        finally:
            if probe.plan is not None:
                self._take(probe.plan)
        if probe.infeasible:
            self.low, self.infeasible = at + 1, at == len(self.values) - 1
        elif probe.plan is None:
            self._undecided.append(at)
            self._cut |= probe.cut
        self.cut |= probe.cut

    def _take(self, plan: dict[int, tuple]) -> None:
        reached = self.measure.reached(plan)
        if reached < self.high:
            self.best, self.high = plan, reached
