"""The two ways in which a problem ends without a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bigmodel.schedule.problem import Problem


class Infeasible(ValueError):
    """No plan exists. `.reasons` says what cannot be met, `.suggestions` what would cure it; each was applied, which
    gives the problem of the same index in `.problems`, and solved.

    As text: "train-7b misses its deadline by 3 slots: 6 more a100-hours before slot 12, or a deadline of slot 27 for
    train-7b, would make it feasible".
    """

    def __init__(self, reasons: Sequence[str], suggestions: Sequence[str] = (), problems: Sequence[Problem] = ()):
        self.reasons, self.suggestions, self.problems = list(reasons), list(suggestions), list(problems)
        text = "; ".join(self.reasons)
        if self.suggestions:
            comma = "," if len(self.suggestions) > 1 else ""
            text += f": {', or '.join(self.suggestions)}{comma} would make it feasible"
        super().__init__(text)

    def __reduce__(self):
        return Infeasible, (self.reasons, self.suggestions, self.problems)


class Unknown(RuntimeError):
    """Time ran out, Ctrl-C came (`.interrupted`) or the solver's process was lost before a plan was found or proven
    impossible."""

    def __init__(self, text: str, interrupted: bool = False):
        super().__init__(text)
        self.interrupted = interrupted
