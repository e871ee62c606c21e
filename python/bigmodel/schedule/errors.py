"""The two ways in which a problem ends without a plan."""

from __future__ import annotations


class Infeasible(ValueError):
    """No plan exists. `.reasons` says what cannot be met, `.suggestions` what would cure it; each was tried."""

    def __init__(self, reasons: list[str], suggestions: list[str] | None = None):
        self.reasons = list(reasons)
        self.suggestions = list(suggestions or [])
        lines = [*self.reasons, *(f"would make it feasible: {text}" for text in self.suggestions)]
        super().__init__("\n".join(lines))

    def __reduce__(self):
        return Infeasible, (self.reasons, self.suggestions)


class Unknown(RuntimeError):
    """Time ran out before a plan was found, and before it was proven that there is none."""
