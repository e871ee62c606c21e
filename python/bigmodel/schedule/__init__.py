"""The planner: where and when each GPU-hour goes. Knows neither torch nor the rest of bigmodel.

Public names are resolved on first use, so that importing this package loads nothing but the standard library.
docs/planner.md holds the model in formulas.
"""

from importlib import import_module as _import_module

_HOMES = {
    "Changes": "changes",
    "Infeasible": "errors",
    "Unknown": "errors",
    "Job": "problem",
    "Objective": "problem",
    "Pool": "problem",
    "Problem": "problem",
    "Rate": "problem",
    "Running": "problem",
    "Trace": "simulation",
    "Plan": "plan",
    "assign": "textbook",
    "check": "rules",
    "dump": "files",
    "estimate": "sizing",
    "example": "files",
    "generate": "generator",
    "load": "files",
    "simulate": "simulation",
    "solve": "solver",
    "trace": "simulation",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'bigmodel.schedule' has no attribute '{name}'")
    home = _import_module(f"bigmodel.schedule.{_HOMES[name]}")
    value = getattr(home, name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
