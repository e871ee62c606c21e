"""Measures that are a largest value over jobs: makespan and the fairnesses. A bound on them is a deadline per job.

The least bound is bisected: above it a plan has been found, below it the relaxation has none.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from bigmodel.schedule import rules
from bigmodel.schedule.instance import Stage, build
from bigmodel.schedule.problem import Problem
from bigmodel.schedule.search import Search
from bigmodel.schedule.worker import Lost, Worker


@dataclass
class Found:
    """value, bound: of the measure, hours or a ratio. ends: what the value makes of every job's deadline.

    stopped: what ended the bisection from outside, an interrupt or the loss of the solver's process.
    """

    best: dict[int, tuple] | None
    value: float
    bound: float
    ends: tuple[int, ...]
    infeasible: bool = False
    cut: bool = False
    stopped: BaseException | None = None


@dataclass
class Frontier:
    """ends: sets of deadlines. floor: the least value of each measure. best, stopped: as found on the way."""

    ends: list[tuple[int, ...]]
    floor: dict[str, float]
    best: dict[int, tuple] | None = None
    stopped: BaseException | None = None


def minimise(problem: Problem, stage: Stage, measure: str, worker: Worker, end: float, seed: int) -> Found:
    """Bisects over the values that the measure can take; cost breaks ties only in later stages."""
    values = _values(problem, measure)
    best, low, high, cut = None, 0, len(values) - 1, False
    probe = high
    proven = 0
    stopped: BaseException | None = None
    try:
        while low <= high:
            trial = _ends(problem, stage, measure, values[probe])
            search = _probe(problem, replace(stage, ends=trial), worker, end, seed)
            try:
                search.run()
            finally:
                best = search.best if search.best is not None else best
            if search.best is not None:
                high = min(probe, _reached(problem, measure, values, search.best)) - 1
            elif search.infeasible:
                low = proven = probe + 1
                if probe == len(values) - 1:
                    return Found(None, np.inf, np.inf, stage.ends, infeasible=True)
            else:
                low, cut = probe + 1, cut or time.monotonic() > end
                if best is None:
                    break
            probe = (low + high) // 2
    except (KeyboardInterrupt, Lost) as error:
        stopped = error
    if best is None:
        return Found(None, np.inf, float(values[proven]), stage.ends, cut=True, stopped=stopped)
    value = values[_reached(problem, measure, values, best)]
    ends = _ends(problem, stage, measure, value)
    return Found(best, float(value), float(values[proven]), ends, cut=cut, stopped=stopped)


def frontier(problem: Problem, stage: Stage, measures: list[str], worker: Worker, end: float, seed: int) -> Frontier:
    """Sets of deadlines at a few values between the least and no bound, and the least value of each measure."""
    met = Frontier([], {})
    for measure in measures:
        found = minimise(problem, stage, measure, worker, time.monotonic() + (end - time.monotonic()) * 0.2, seed)
        met.floor[measure] = found.bound if np.isfinite(found.bound) else 0.0
        values = _values(problem, measure)
        if found.best is not None:
            met.best = found.best
            rest = values[np.searchsorted(values, found.value) :]
            for at in np.unique(np.linspace(0, len(rest) - 1, 4).astype(int))[:-1]:
                met.ends.append(_ends(problem, stage, measure, rest[at]))
        if found.stopped is not None:
            met.stopped = found.stopped
            break
    return met


def _probe(problem: Problem, stage: Stage, worker: Worker, end: float, seed: int) -> Search:
    """A search, not yet run: any plan will do, so its gap is infinite; a few seconds, so that bisection can go on."""
    until = min(end, time.monotonic() + max(0.5, (end - time.monotonic()) / 3))
    stage = replace(stage, weights={"cost": 1.0})
    return Search(build(problem, stage), worker, until, gap=np.inf, seed=seed)


def _values(problem: Problem, measure: str) -> np.ndarray:
    """Every value that the measure can take on whole slots, rising."""
    slots = np.arange(problem.now + 1, problem.slots + 1)
    if measure == "makespan":
        return slots * problem.slot_hours
    every = [(slots - release) / fastest for release, fastest in _scales(problem, measure).values()]
    return np.unique(np.concatenate([part[part > 0] for part in every]).round(12))


def _scales(problem: Problem, measure: str) -> dict[str, tuple[int, int]]:
    """(first release, least slots) by job, or by owner."""
    rows: dict[str, list[tuple[int, int]]] = {}
    for job in problem.jobs:
        key = job.name if measure == "fairness" else job.owner
        rows.setdefault(key, []).append((problem.clock.release(job.release), rules.alone_slots(problem, job)))
    scales = {}
    for key, pairs in rows.items():
        first = min(release for release, _ in pairs)
        scales[key] = (first, max(release + fastest for release, fastest in pairs) - first)
    return scales


def _ends(problem: Problem, stage: Stage, measure: str, value: float) -> tuple[int, ...]:
    if measure == "makespan":
        slot = int(np.floor(value / problem.slot_hours + 1e-9))
        return tuple(min(end, slot) for end in stage.ends)
    scales = _scales(problem, measure)
    ends = []
    for job, end in zip(problem.jobs, stage.ends, strict=True):
        release, least = scales[job.name if measure == "fairness" else job.owner]
        ends.append(min(end, int(np.floor(release + value * least + 1e-9))))
    return tuple(ends)


def _reached(problem: Problem, measure: str, values: np.ndarray, best: dict[int, tuple]) -> int:
    """The index of the value that a plan has."""
    finish = {problem.jobs[j].name: use[-1][0] + 1 for j, use in best.items()}
    if measure == "makespan":
        value = max(finish.values(), default=0) * problem.slot_hours
    else:
        scales = _scales(problem, measure)
        value = 0.0
        for job in problem.jobs:
            if job.name in finish:
                release, least = scales[job.name if measure == "fairness" else job.owner]
                value = max(value, (finish[job.name] - release) / least)
    return min(int(np.searchsorted(values, value - 1e-9)), len(values) - 1)
