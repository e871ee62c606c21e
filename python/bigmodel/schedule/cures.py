"""The least changes that would make a problem feasible; each is made and solved before it is told."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from bigmodel.schedule import explain
from bigmodel.schedule.errors import Infeasible
from bigmodel.schedule.explain import Cause
from bigmodel.schedule.loose import feasible, keeps, stretches
from bigmodel.schedule.problem import Problem
from bigmodel.schedule.stretch import FAMILIES, Change, Money, made
from bigmodel.schedule.worker import Lost

_MOST = 3  # suggestions
_SEARCH = 0.75  # of the time that is left: most for the sets of one family, then for those of two, then for all
_PROBE = 2.0  # seconds for one smaller change


@dataclass
class _Cure:
    """Changes of some families that were seen to give a plan."""

    families: tuple[str, ...]
    changes: list[Change]

    def size(self, problem: Problem) -> float:
        return sum(change.size(problem) for change in self.changes)

    def text(self, problem: Problem) -> str:
        return " and ".join(change.text(problem) for change in self.changes)


def infeasible(problem: Problem, causes: Sequence[Cause], end: float) -> Infeasible:
    """The error to raise: the causes, and at most three changes; those found by `end`, an interrupt, or the loss of the
    solver's process."""
    cures: list[_Cure] = []
    try:
        _find(problem, causes, end, cures)
        for index, cure in enumerate(cures):
            _shrink(problem, causes, cure, _share(end, 1 / (len(cures) - index)))
    except (KeyboardInterrupt, Lost):
        pass
    cures.sort(key=lambda cure: cure.size(problem))
    cures = cures[:_MOST]
    reasons = [cause.text for cause in causes] + _compared(problem, causes, cures) + explain.kept(problem)
    texts = [cure.text(problem) for cure in cures]
    return Infeasible(reasons, texts, [made(problem, cure.changes) for cure in cures])


def _compared(problem: Problem, causes: Sequence[Cause], cures: list[_Cure]) -> list[str]:
    """What one budget that cures alone is short of, where nothing else says more than that there is no plan."""
    if list(causes) != [explain.together(problem)]:
        return []
    told = []
    for cure in cures:
        if len(cure.changes) == 1 and isinstance(change := cure.changes[0], Money):
            budget = change.budget(problem)
            within = f"plans were found within {change.told()} {problem.currency}"
            told.append(f"{within}, none within the {budget.name} of {budget.limit:.2f}")
    return told


def _share(end: float, share: float) -> float:
    now = time.monotonic()
    return now + (end - now) * share


def _find(problem: Problem, causes: Sequence[Cause], end: float, cures: list[_Cure]) -> None:
    """A cure of each family; or, if none is there, of the sets of two, or of all."""
    for size in range(1, len(FAMILIES) + 1):
        sets = [some for some in combinations(FAMILIES, size) if all(cause.families & {*some} for cause in causes)]
        until = _share(end, _SEARCH)
        for index, families in enumerate(sets):
            changes = _first(problem, causes, families, _share(until, 1 / (len(sets) - index)))
            if changes:
                cures.append(_Cure(families, changes))
        if cures:
            return


def _first(problem: Problem, causes: Sequence[Cause], families: tuple[str, ...], end: float) -> list[Change]:
    """Changes that give a plan: solved again as they are, or else a little larger; of the latter, if time is short, the
    plan that they were read from is one."""
    least = [cause.least for cause in causes if cause.least is not None and cause.least.family in families]
    if len(least) == len(causes) and feasible(made(problem, least), _share(end, 0.3)):
        return least
    tight, plan = stretches(problem, families, _share(end, 0.6))
    if plan is None:
        return []
    roomy = [change.roomier(problem) for change in tight]
    for changes, share in ((tight, 0.7), (roomy, 1.0)):
        if feasible(made(problem, changes), _share(end, share)):
            return changes
    return roomy if keeps(made(problem, roomy), plan) else []


def _shrink(problem: Problem, causes: Sequence[Cause], cure: _Cure, end: float) -> None:
    """Leaves out changes that are not needed, and makes the others smaller, while the time lasts."""
    for change in list(cure.changes):
        others = [other for other in cure.changes if other is not change]
        if others and _holds(problem, others, end):
            cure.changes = others
    known = [cause.least for cause in causes if cause.least is not None]
    for index, change in enumerate(cure.changes):
        low = change.was(problem) + 1
        for least in known:
            if replace(least, amount=change.amount) == change:
                low = max(low, least.amount)
        _reduce(problem, cure, index, low, end)


def _reduce(problem: Problem, cure: _Cure, index: int, low: int, end: float) -> None:
    """Steps down from the amount that is known to do, each twice the last; then bisects."""
    fine = max(1, cure.changes[index].amount // 100) if isinstance(cure.changes[index], Money) else 1
    step, high, down = fine, cure.changes[index].amount, True
    while high - low >= fine and time.monotonic() < end:
        middle = max(low, high - step) if down else (low + high) // 2
        changes = list(cure.changes)
        changes[index] = replace(changes[index], amount=middle)  # type: ignore[arg-type]
        if _holds(problem, changes, end):
            cure.changes, high, step = changes, middle, 2 * step
        else:
            low, down = middle + 1, False


def _holds(problem: Problem, changes: list[Change], end: float) -> bool:
    return feasible(made(problem, changes), min(end, time.monotonic() + _PROBE))
