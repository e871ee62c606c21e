"""Measures that are a largest value over jobs: makespan and the fairnesses. A bound on them is a deadline per job."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from bigmodel.schedule import rules
from bigmodel.schedule.problem import Problem

_EPS = 1e-9


class Bottleneck:
    """The measure `name` of a problem's plans, in hours or as a ratio. drops: jobs that a plan may leave out."""

    def __init__(self, problem: Problem, name: str, drops: frozenset[int] = frozenset()):
        self.problem, self.name, self.drops = problem, name, drops

    @cached_property
    def values(self) -> np.ndarray:
        """Every value that the measure can take on whole slots, rising."""
        problem = self.problem
        slots = np.arange(problem.now + 1, problem.slots + 1)
        if self.name == "makespan":
            found = [slots * problem.slot_hours]
        else:
            found = [(slots - first) / least for first, least in self._scales()]
        nothing = [np.zeros(1)] if len(self.drops) == len(problem.jobs) else []
        return np.unique(np.concatenate([*nothing, *(part[part > 0] for part in found)]).round(12))

    def ends(self, value: float, ends: tuple[int, ...]) -> tuple[int, ...]:
        """The slot before which each job must end so that the measure is at most `value`, and at most `ends`."""
        problem = self.problem
        if self.name == "makespan":
            slot = int(np.floor(value / problem.slot_hours + _EPS))
            return tuple(min(end, slot) for end in ends)
        found = []
        for job, end in zip(problem.jobs, ends, strict=True):
            first, least = self._all[rules.sharer(self.name, job)]
            # The owner's first job may be dropped; a later one's release is no later than its own.
            begin = problem.clock.release(job.release) if self.drops and value < 1 else first
            found.append(min(end, int(np.floor(begin + value * (first + least - begin) + _EPS))))
        return tuple(found)

    def reached(self, plan: dict[int, tuple]) -> int:
        """The index of the value that a plan, schedules by job, has."""
        problem = self.problem
        finish = {j: use[-1][0] + 1 for j, use in plan.items()}
        if self.name == "makespan":
            value = max(finish.values(), default=0) * problem.slot_hours
        else:
            value = max(rules.slowdowns(problem, self.name, finish).values(), default=0.0)
        return min(int(np.searchsorted(self.values, value - _EPS)), len(self.values) - 1)

    @cached_property
    def _all(self) -> dict[str, tuple[int, int]]:
        return rules.scales(self.problem, self.name, range(len(self.problem.jobs)))

    def _scales(self) -> list[tuple[int, int]]:
        """(first release, least slots) of every owner, whichever of the owner's jobs are dropped."""
        problem, found = self.problem, set(self._all.values())
        dropping = {problem.jobs[j].owner for j in self.drops} if self.name == "owner_fairness" else set()
        for owner in dropping:
            mine = [(j, problem.clock.release(job.release)) for j, job in enumerate(problem.jobs) if job.owner == owner]
            ends = {release + rules.alone_slots(problem, problem.jobs[j]) for j, release in mine}
            found |= {(first, end - first) for first in {release for _, release in mine} for end in ends if end > first}
        return sorted(found)
