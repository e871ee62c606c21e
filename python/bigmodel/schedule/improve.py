"""Large neighbourhood search: takes some jobs out of a plan and puts them back in another order, at other prices.

Source: ruin and recreate, Schrimpf et al. (2000), with each job put back by its dynamic programme.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from bigmodel.schedule.bounds import Prices
from bigmodel.schedule.construct import insert
from bigmodel.schedule.state import State

_DEAR = 100.0  # price of money that exceeds a limit, in money
_IDLE = 60  # steps without a gain
SHARES = (0.0, 0.5, 1.0)  # of the capacity's price that a job is charged while it is put back


def tidy(state: State, tick: Callable[[], None] = lambda: None) -> None:
    """Moves each job to where its devices are held soonest at the same price, so that ties scatter no job."""
    inst = state.inst
    priced = np.abs(inst.unit[inst.count > 0])
    later = 1e-7 * (float(priced.max(initial=0.0)) or 1.0) * np.arange(inst.problem.slots) / inst.problem.slots
    for j in sorted(state.schedules, key=state.start):
        tick()
        score, old = state.score(), state.remove(j)
        placed = insert(state, j, inst.unit + later)
        if placed and _no_worse(state.score(), score) and _wait(state.schedules[j].use) < _wait(old):
            continue
        if placed:
            state.remove(j)
        state.put(j, old)


def _no_worse(score: tuple[float, float, float], before: tuple[float, float, float]) -> bool:
    return score[:2] <= before[:2] and score[2] <= before[2] + 1e-12 * abs(before[2])


def _wait(use: tuple[tuple[int, int, int], ...]) -> int:
    return sum(slot * n for slot, _, n in use)


class Improver:
    """Repeats steps on one state; keeps what is not worse. Seeded, so the same calls give the same plan."""

    def __init__(self, state: State, prices: Prices, seed: int):
        self.state, self.prices = state, prices
        self.shared = prices.shared(state.inst)
        self.rng = np.random.default_rng(seed)
        self.score = state.score()

    def sweep(self, tick: Callable[[], None] = lambda: None) -> float:
        """Puts every job back alone, the dearest first; the gain."""
        before = self.score[2]
        for j in sorted(self.state.worth, key=lambda j: -self.state.worth[j]):
            tick()
            self._try([j], 0.0)
        return before - self.score[2]

    def step(self, tick: Callable[[], None] = lambda: None) -> bool:
        """Takes out jobs that share a place and time, or are close, and puts them back; whether that helped."""
        tick()
        chosen = self._neighbours(int(self.rng.integers(2, 7)))
        return self._try(chosen, float(self.rng.choice(SHARES)), tick)

    def _neighbours(self, size: int) -> list[int]:
        jobs = self.state.inst.jobs
        missing = [data.index for data in jobs if data.index not in self.state.schedules]
        if missing and self.rng.random() < 0.5:
            seed = int(self.rng.choice(missing))
        else:
            seed = int(self.rng.integers(len(jobs)))
        # A job that may be dropped can have no window left.
        near = [d for d in jobs if max(d.first, jobs[seed].first) < min(d.last, jobs[seed].last)]
        overlap = np.array(
            [
                (min(data.last, jobs[seed].last) - max(data.first, jobs[seed].first)) / (data.last - data.first)
                for data in near
            ]
        )
        if not len(near):
            return [seed]
        picked = self.rng.choice(len(near), size=min(size, len(near)), replace=False, p=overlap / overlap.sum())
        return list(dict.fromkeys([seed, *(near[i].index for i in picked)]))

    def _try(self, chosen: list[int], share: float, tick: Callable[[], None] = lambda: None) -> bool:
        state, inst = self.state, self.state.inst
        old = {j: state.remove(j) for j in chosen if j in state.schedules}
        order = list(chosen) if len(chosen) == 1 else [chosen[i] for i in self.rng.permutation(len(chosen))]
        order.sort(key=lambda j: sum(other in inst.jobs[j].after for other in chosen))
        try:
            for j in order:
                tick()
                ready = all(before in state.schedules for before in inst.jobs[j].after)
                if ready:
                    insert(state, j, self.prices.unit(inst, j, self.shared * share))
            better = state.score() <= self.score and self._complete(chosen)
        except BaseException:
            self._restore(chosen, old)
            raise
        if not better:
            self._restore(chosen, old)
            return False
        gained = state.score() < self.score
        self.score = state.score()
        return gained

    def _complete(self, chosen: list[int]) -> bool:
        """A job whose predecessor was left out must not stay."""
        state = self.state
        return all(j in state.schedules or not any(a in state.schedules for a in state.after[j]) for j in chosen)

    def _restore(self, chosen: list[int], old: dict) -> None:
        for j in chosen:
            if j in self.state.schedules:
                self.state.remove(j)
        for j, use in old.items():
            self.state.put(j, use)


def thrifty(state: State, prices: Prices, seed: int, tick: Callable[[], None] = lambda: None) -> None:
    """Works off what a plan exceeds limits by, which are made dear, until it does not or nothing helps."""
    inst = state.inst
    over = [state.usage[row].sum() > limit.most for row, limit in enumerate(inst.stage.limits)]
    improver = Improver(state, replace(prices, limit=np.where(over, _DEAR, prices.limit)), seed)
    improver.sweep(tick)
    idle = 0
    while improver.score[1] > 0 and idle < _IDLE + 2 * len(inst.jobs):
        idle = 0 if improver.step(tick) else idle + 1
