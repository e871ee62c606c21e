"""The two ways in which a problem ends without a plan."""

from __future__ import annotations


class Infeasible(ValueError):
    """No plan exists. `.reasons` says what cannot be met, `.suggestions` what would cure it; each was tried.

    As text: "train-7b misses its deadline by 3 slots: 6 more a100-hours before slot 12, or a deadline of slot 27 for
    train-7b, would make it feasible".
    """

    def __init__(self, reasons: list[str], suggestions: list[str] | None = None):
        self.reasons = list(reasons)
        self.suggestions = list(suggestions or [])
        text = "; ".join(self.reasons)
        if self.suggestions:
            comma = "," if len(self.suggestions) > 1 else ""
            text += f": {', or '.join(self.suggestions)}{comma} would make it feasible"
        super().__init__(text)

    def __reduce__(self):
        return Infeasible, (self.reasons, self.suggestions)


class Unknown(RuntimeError):
    """Time ran out before a plan was found, and before it was proven that there is none."""
