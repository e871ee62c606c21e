"""scipy.optimize.milp through the worker, with its known traps handled in one place.

Status 1 (limit) comes with or without an x, node_limit gives status 4 with a valid x, and "optimal" answers can be
infeasible by their own tolerances: an x is believed only if, rounded, it satisfies every row.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigmodel.schedule.worker import Overdue, Worker

_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Answer:
    """x: a feasible point or None. bound: proven lower bound on the value. late: the clock ended it."""

    x: np.ndarray | None
    value: float
    bound: float
    infeasible: bool
    late: bool


def solve(worker: Worker, program: dict[str, Any], limit: float, gap: float = 0.0) -> Answer:
    """Minimises program["c"] over rows (matrix, low, high), bounds (low, high) and integrality.

    Raises:
        RuntimeError: the solver calls a point optimal that breaks its rows, with presolve and without.
    """
    end = time.monotonic() + limit
    for presolve in (True, False):
        limit = end - time.monotonic()
        begin(worker, program, limit, gap, presolve=presolve)
        answer = finish(worker, program, limit)
        # Presolve has called feasible programmes infeasible; believed only if both agree.
        if answer is not None and not (answer.infeasible and presolve):
            return answer
    raise RuntimeError("milp: called a point optimal that breaks its constraints, with and without presolve.")


def begin(
    worker: Worker, program: dict[str, Any], limit: float, gap: float, nodes: int = 0, presolve: bool = True
) -> None:
    """Sends a programme off; `finish` waits for its answer."""
    limit = max(limit, 0.05)
    options = {"time_limit": limit, "mip_rel_gap": gap, "presolve": presolve}
    if nodes:
        options["node_limit"] = nodes
    worker.begin("milp", program | {"options": options}, limit)


def finish(worker: Worker, program: dict[str, Any], limit: float) -> Answer | None:
    """The answer to the last `begin`; None for a point that is called optimal and breaks its rows."""
    try:
        found = worker.finish(max(limit, 0.05))
    except Overdue:
        return Answer(None, np.inf, -np.inf, False, True)
    late = found["status"] == 1
    bound = -np.inf if found["bound"] is None or not np.isfinite(found["bound"]) else float(found["bound"])
    if found["status"] == 2:
        return Answer(None, np.inf, np.inf, True, False)
    if found["x"] is None:
        return Answer(None, np.inf, bound, False, late)
    x = np.where(program["integrality"] > 0, np.round(found["x"]), found["x"])
    if feasible(program, x):
        return Answer(x, float(program["c"] @ x), bound, False, late)
    return None if found["status"] == 0 else Answer(None, np.inf, bound, False, late)


def feasible(program: dict[str, Any], x: np.ndarray) -> bool:
    """Whether x satisfies rows and bounds; rows relative to the sum of their terms' sizes."""
    matrix, low, high = program["rows"]
    least, most = program["bounds"]
    values = matrix @ x
    slack = _TOLERANCE * np.maximum(1.0, abs(matrix) @ np.abs(x))
    inside = (x >= least - _TOLERANCE) & (x <= most + _TOLERANCE)
    return bool(((values >= low - slack) & (values <= high + slack)).all() and inside.all())
