"""What may be stretched to make a problem feasible: deadlines, capacity, budgets. Each change in words, and made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil, floor, log10

import numpy as np

from bigmodel.schedule import rules
from bigmodel.schedule.problem import Job, Problem
from bigmodel.schedule.series import MOST_DEVICES

FAMILIES = ("deadlines", "capacity", "budgets")
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Deadline:
    """Job `job` need only end before slot `amount`."""

    job: int
    amount: int
    family = "deadlines"

    def was(self, problem: Problem) -> int:
        return problem.window(problem.jobs[self.job])[1]

    def roomier(self, problem: Problem) -> Deadline:
        return replace(self, amount=min(self.amount + 1, problem.slots))

    def size(self, problem: Problem) -> float:
        first, last = problem.window(problem.jobs[self.job])
        return (self.amount - last) / max(1, last - first)

    def made(self, problem: Problem) -> Problem:
        jobs = list(problem.jobs)
        jobs[self.job] = replace(jobs[self.job], deadline=self.amount)
        return replace(problem, jobs=tuple(jobs))

    def text(self, problem: Problem) -> str:
        name = problem.jobs[self.job].name
        return f"a deadline of slot {self.amount} for {name} ({problem.clock.label(self.amount)})"


@dataclass(frozen=True)
class Devices:
    """Pool `pool` has extra[slot] more devices, but at most `amount`."""

    pool: int
    amount: int
    extra: tuple[int, ...]
    family = "capacity"

    def was(self, problem: Problem) -> int:
        return 0

    def size(self, problem: Problem) -> float:
        return sum(self._each()) / max(1, int(problem.count[self.pool].sum()))

    def roomier(self, problem: Problem) -> Devices:
        """As many more devices in every slot from the first to the last that has more."""
        slots = np.flatnonzero(self.extra)
        within = (np.arange(len(self.extra)) >= slots[0]) & (np.arange(len(self.extra)) <= slots[-1])
        return replace(self, extra=tuple(np.where(within, self.amount, 0).tolist()))

    def made(self, problem: Problem) -> Problem:
        pools = list(problem.pools)
        count = (problem.count[self.pool] + np.array(self._each())).tolist()
        pools[self.pool] = replace(pools[self.pool], count={"slots": count})
        return replace(problem, pools=tuple(pools))

    def text(self, problem: Problem) -> str:
        extra = np.array(self._each())
        slots = np.flatnonzero(extra)
        hours, name = extra.sum() * problem.slot_hours, problem.pools[self.pool].name
        devices = f"up to {plural(int(extra.max()), 'more device')} from slot {slots[0]}"
        return f"{plural(hours, f'more {name}-hour')} before slot {slots[-1] + 1} ({devices})"

    def _each(self) -> list[int]:
        return [min(more, self.amount) for more in self.extra]


@dataclass(frozen=True)
class Quota:
    """Quota group `group` may use `amount` devices."""

    group: str
    amount: int
    family = "capacity"

    def was(self, problem: Problem) -> int:
        return problem.quotas[self.group]

    def roomier(self, problem: Problem) -> Quota:
        return replace(self, amount=self.amount + 1)

    def size(self, problem: Problem) -> float:
        return (self.amount - self.was(problem)) / max(1, self.was(problem))

    def made(self, problem: Problem) -> Problem:
        return replace(problem, quotas=problem.quotas | {self.group: self.amount})

    def text(self, problem: Problem) -> str:
        return f"a quota of {plural(self.amount, 'device')} for {self.group}"


@dataclass(frozen=True)
class Money:
    """The budget in row `row` of rules.budgets is `amount` units of 10 ** digit."""

    row: int
    amount: int
    digit: int
    family = "budgets"

    @classmethod
    def least(cls, row: int, paid: float) -> Money:
        """What is paid, rounded up: to cents below 100, to four digits above."""
        size = floor(log10(paid)) if paid > 0 else 0
        digit = max(size - 3, min(-2, size - 1))
        return cls(row, ceil(paid / 10.0**digit * (1 - _ROUNDING)), digit)

    @property
    def limit(self) -> float:
        return float(f"{self.amount}e{self.digit}")

    def budget(self, problem: Problem) -> rules.Budget:
        return rules.budgets(problem)[self.row]

    def was(self, problem: Problem) -> int:
        return floor(self.budget(problem).limit / 10.0**self.digit)

    def roomier(self, problem: Problem) -> Money:
        return replace(self, amount=self.amount + max(1, self.amount // 50))

    def size(self, problem: Problem) -> float:
        limit = self.budget(problem).limit
        return (self.limit - limit) / max(limit, _ROUNDING)

    def made(self, problem: Problem) -> Problem:
        budget = self.budget(problem)
        if budget.job is not None:
            jobs = list(problem.jobs)
            jobs[budget.job] = replace(jobs[budget.job], budget=self.limit)
            return replace(problem, jobs=tuple(jobs))
        if budget.owner is not None:
            return replace(problem, budgets=problem.budgets | {budget.owner: self.limit})
        return replace(problem, budget=self.limit)

    def text(self, problem: Problem) -> str:
        budget = self.budget(problem)
        return f"a {budget.name} of {self.told()} {problem.currency} instead of {budget.limit:.2f}"

    def told(self) -> str:
        return f"{self.limit:.{max(2, -self.digit)}f}"


Change = Deadline | Devices | Quota | Money


def made(problem: Problem, changes: Iterable[Change]) -> Problem:
    """The problem with every change."""
    for change in changes:
        problem = change.made(problem)
    return problem


def needed(problem: Problem, account: rules.Account, allocation: np.ndarray) -> list[Change]:
    """The least changes with which a plan of another problem, with the same jobs and pools, is one of this problem."""
    changes: list[Change] = []
    for j, done in enumerate(account.jobs):
        last = problem.window(problem.jobs[j])[1]
        if done.finish is not None and done.finish > last:
            changes.append(Deadline(j, done.finish))
    used = allocation.sum(axis=0)
    used[:, : problem.now] = 0
    for p in np.flatnonzero((used > problem.count).any(axis=1)):
        extra = np.maximum(used[p] - problem.count[p], 0)
        changes.append(Devices(int(p), int(extra.max()), tuple(extra.tolist())))
    for group, limit in problem.quotas.items():
        members = [p for p, pool in enumerate(problem.pools) if pool.quota_group == group]
        most = int(used[members].sum(axis=0).max(initial=0))
        if most > limit:
            changes.append(Quota(group, most))
    for row, budget in enumerate(rules.budgets(problem)):
        paid = sum(problem.jobs[j].spent + account.jobs[j].cost for j in budget.members)
        if paid > budget.limit * (1 + rules.TOLERANCE) + rules.TOLERANCE:
            changes.append(Money.least(row, paid))
    return changes


def loosened(problem: Problem, families: Iterable[str]) -> Problem:
    """The problem without the limits of these families. A deadline is soft, and ending after it costs its share of the
    job's window per slot; jobs that had soft ones have none."""
    if "deadlines" in families:
        problem = replace(problem, jobs=tuple(_soft(problem, job) for job in problem.jobs))
    if "budgets" in families:
        jobs = tuple(replace(job, budget=None) for job in problem.jobs)
        problem = replace(problem, jobs=jobs, budget=None, budgets={})
    if "capacity" in families:
        most = 0
        for job in problem.jobs:
            most += max(point.devices for point in job.throughput) * (len(problem.pools) if job.mix_pools else 1)
        counts = np.minimum(problem.count + most, MOST_DEVICES).tolist()
        pools = tuple(replace(pool, count={"slots": row}) for pool, row in zip(problem.pools, counts, strict=True))
        quotas = {group: min(limit + most, MOST_DEVICES) for group, limit in problem.quotas.items()}
        problem = replace(problem, pools=pools, quotas=quotas)
    return problem


def _soft(problem: Problem, job: Job) -> Job:
    if job.deadline is None or job.soft:
        return replace(job, deadline=None, soft=False)
    first, last = problem.window(job)
    return replace(job, soft=True, priority=1.0 / (max(1, last - first) * problem.slot_hours))


def plural(number: float, what: str) -> str:
    return f"{number:.10g} {what}{'' if number == 1 else 's'}"


def listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
