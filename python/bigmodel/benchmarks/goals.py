"""Goals: a case, what it is held against and how far ahead it must be, judged on what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from bigmodel.benchmarks.harness import COPY, OURS, Measurement

# How a process gets fresh memory. Stock torch asks for huge pages only where this variable is set before it starts.
DEFAULT_PAGES = "default pages"
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE=1"


@dataclass(frozen=True)
class Goal:
    """How `bigmodel` must stand against another contender in one case.

    Attributes:
        text: the goal in words; goals of one text are reported in one line.
        pages: the process that it is measured in, DEFAULT_PAGES or HUGE_PAGES.
        case: `Case.name`.
        against: a contender, or "copy".
        limit: the least that the other's time over ours may be (against the copy: the share of its bandwidth).
        at_most: `limit` is instead the most that our time over the other's may be.
    """

    text: str
    pages: str
    case: str
    against: str
    limit: float
    at_most: bool = False

    @property
    def needed(self) -> str:
        if self.at_most:
            return f"<= {self.limit:g}x its time"
        return f">= {self.limit * 100:g} %" if self.against == COPY else f">= {self.limit:g}x"

    def show(self, value: float) -> str:
        """The value cut, never rounded, towards the side of missing the goal: 89.99 % is shown as 89.9 %."""
        if self.at_most:
            return f"{math.ceil(value * 100) / 100:.2f}x its time"
        if self.against == COPY:
            return f"{math.floor(value * 1000) / 10:.1f} %"
        return f"{math.floor(value * 100) / 100:.2f}x"

    def value(self, measurement: Measurement) -> float:
        speed = measurement.speed(OURS, self.against)
        return 1 / speed if self.at_most else speed

    def margin(self, value: float) -> float:
        """1 at the goal, more beyond it."""
        return self.limit / value if self.at_most else value / self.limit


@dataclass(frozen=True)
class Verdict:
    """How a goal stands; a wrong result (`correct` is False) reaches none, however fast."""

    goal: Goal
    value: float
    correct: bool

    @property
    def reached(self) -> bool:
        return self.correct and self.goal.margin(self.value) >= 1

    def to_dict(self) -> dict:
        return {**asdict(self.goal), "value": self.value, "correct": self.correct, "reached": self.reached}


def judge(goals: Iterable[Goal], measurements: Mapping[str, Sequence[Measurement]]) -> list[Verdict]:
    """A verdict for each goal whose case and opponent were measured.

    Args:
        goals: what to reach.
        measurements: by kind of process, as `Goal.pages` names it.
    """
    by_name = {(pages, m.case): m for pages, rows in measurements.items() for m in rows}
    verdicts = []
    for goal in goals:
        measurement = by_name.get((goal.pages, goal.case))
        if measurement is not None and goal.against in measurement.times:
            verdicts.append(Verdict(goal, goal.value(measurement), OURS not in measurement.notes))
    return verdicts
