"""The textbook assignment model: m resources with costs C_i, T slots, x_it in {0, 1}, minimise sum x_it C_it.

docs/planner.md writes out each mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bigmodel.schedule import validate

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

MODES = ("exact", "cover", "demand")


@dataclass(frozen=True)
class Assignment:
    """x: (m, T) of 0 and 1. static_cost: least cost of holding one set through all slots, None where none exists."""

    cost: float
    x: np.ndarray
    status: str
    policy: str
    dynamic_cost: float
    static_cost: float | None

    @property
    def saving(self) -> float | None:
        """What allocating per slot saves against the best fixed set."""
        return None if self.static_cost is None else self.static_cost - self.dynamic_cost

    @property
    def events(self) -> list[dict[str, list[int]]]:
        """For each slot, the resources acquired and released at its beginning; one more entry releases the last."""
        padded = np.pad(self.x.astype(int), ((0, 0), (1, 1)))
        steps = np.diff(padded, axis=1).T
        return [{"acquire": np.flatnonzero(s > 0).tolist(), "release": np.flatnonzero(s < 0).tolist()} for s in steps]

    def table(self) -> str:
        """Resources in rows, slots in columns."""
        rows, slots = self.x.shape
        width = max(2, len(str(slots - 1)))
        lines = [" " * 6 + "".join(f"{slot:>{width + 1}}" for slot in range(slots))]
        lines += [
            f"{i:>5} " + "".join(f"{'#' if used else '.':>{width + 1}}" for used in self.x[i]) for i in range(rows)
        ]
        lines.append(f"cost {self.cost:g} ({self.status}, {self.policy})")
        if self.saving is not None:
            lines.append(f"dynamic {self.dynamic_cost:g}, static {self.static_cost:g}: dynamic saves {self.saving:g}")
        return "\n".join(lines)


def assign(
    costs: ArrayLike,
    slots: int,
    mode: str = "exact",
    demand: ArrayLike | None = None,
    policy: str = "dynamic",
    each_used: bool = True,
    solver: str = "auto",
) -> Assignment:
    """Assigns m resources to T slots at least cost, to optimality.

    Args:
        costs: C_i of shape (m,), or C_it of shape (m, T); finite.
        slots: T.
        mode: "exact": one resource per slot and one slot per resource, so m == T. "cover": at least one in both
            families. "demand": slot t needs exactly demand[t] resources.
        demand: whole numbers of shape (T,), for "demand" only; at most m, and with each_used at least m in sum.
        policy: "dynamic" allocates per slot; "static" holds one set through all slots and pays for it in each.
        each_used: each resource is used at least once ("demand" only; the other modes always do).
        solver: "milp" sends every mode to scipy.optimize.milp; "auto" uses linear_sum_assignment for "exact" (400 x 400
            in 4 ms against 4.4 s) and closed forms for static sets.

    Raises:
        ValueError: an argument out of range, or no assignment exists.
    """
    table = _costs(costs, slots)
    need = _demand(table.shape, mode, demand, each_used)
    if policy not in ("dynamic", "static"):
        raise ValueError(f"assign: policy is {policy!r}; accepted are 'dynamic' and 'static'.")
    if solver not in ("auto", "milp"):
        raise ValueError(f"assign: solver is {solver!r}; accepted are 'auto' and 'milp'.")
    if mode == "exact" and policy == "static" and len(table) > 1:
        raise ValueError(
            "assign: policy 'static' holds one set in all slots, but mode 'exact' gives each slot another."
        )
    dynamic = _dynamic(table, mode, need, each_used, solver)
    static = None if mode == "exact" and len(table) > 1 else _static(table, mode, need, each_used)
    x = dynamic if policy == "dynamic" or static is None else static
    static_cost = None if static is None else float((static * table).sum())
    return Assignment(float((x * table).sum()), x, "optimal", policy, float((dynamic * table).sum()), static_cost)


def _costs(costs: ArrayLike, slots: int) -> np.ndarray:
    if isinstance(slots, bool) or not isinstance(slots, (int, np.integer)) or slots < 1:
        raise ValueError(f"assign: slots is {slots!r}; it must be a whole number of at least 1.")
    table = _numbers(costs, "costs")
    if table.ndim == 1:
        table = np.repeat(table[:, None], slots, axis=1)
    if table.ndim != 2 or table.shape[1] != slots or not len(table):
        raise ValueError(f"assign: costs has shape {np.shape(costs)}; accepted are (m,) and (m, {slots}) with m >= 1.")
    if not np.isfinite(table).all():
        raise ValueError("assign: costs has a value that is not finite.")
    return table


def _numbers(values: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(f"assign: {name} must be an array of numbers, got {values!r}.") from None


def _demand(shape: tuple[int, int], mode: str, demand: Any, each_used: bool) -> np.ndarray | None:
    m, slots = shape
    if mode not in MODES:
        raise ValueError(f"assign: mode is {mode!r}; accepted are {validate.listed(MODES)}.")
    if (demand is not None) != (mode == "demand"):
        raise ValueError(f"assign: mode {mode!r} {'needs' if demand is None else 'takes no'} demand.")
    if mode == "exact" and m != slots:
        raise ValueError(
            f"assign: mode 'exact' needs as many resources as slots, got {m} and {slots}; try mode 'cover'."
        )
    if mode != "demand":
        if not each_used:
            raise ValueError(f"assign: each_used=False is for mode 'demand'; mode {mode!r} uses each resource.")
        return None
    need = _numbers(demand, "demand")
    if need.shape != (slots,) or (need != np.round(need)).any() or (need < 0).any() or (need > m).any():
        raise ValueError(f"assign: demand must be {slots} whole numbers from 0 to {m}, got {demand!r}.")
    if each_used and need.sum() < m:
        raise ValueError(f"assign: demand adds up to {need.sum():g}, too little to use each of {m} resources.")
    return need.astype(int)


def _dynamic(table: np.ndarray, mode: str, need: np.ndarray | None, each_used: bool, solver: str) -> np.ndarray:
    if mode == "exact" and solver == "auto":
        from scipy.optimize import linear_sum_assignment

        x = np.zeros(table.shape, dtype=np.int8)
        x[linear_sum_assignment(table)] = 1
        return x
    return _milp(table, mode, need, each_used)


def _milp(table: np.ndarray, mode: str, need: np.ndarray | None, each_used: bool) -> np.ndarray:
    """Rows: one sum over each slot, and one over each resource."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import eye_array, kron, vstack

    m, slots = table.shape
    by_slot = kron(np.ones((1, m)), eye_array(slots))
    by_resource = kron(eye_array(m), np.ones((1, slots)))
    most = 1 if mode == "exact" else np.inf
    least_used = 1 if each_used or mode != "demand" else 0
    low = np.concatenate([np.ones(slots) if need is None else need, np.full(m, least_used)])
    high = np.concatenate([np.full(slots, most) if need is None else need, np.full(m, most)])
    rows = LinearConstraint(vstack([by_slot, by_resource]), low, high)
    options = {"mip_rel_gap": 0.0}
    answer = milp(
        table.ravel(), constraints=rows, integrality=np.ones(table.size), bounds=Bounds(0, 1), options=options
    )
    if answer.x is None:
        raise RuntimeError(f"assign: HiGHS gave no answer: {answer.message}")
    return np.round(answer.x).astype(np.int8).reshape(m, slots)


def _static(table: np.ndarray, mode: str, need: np.ndarray | None, each_used: bool) -> np.ndarray:
    """The cheapest set that, held through all slots, meets the largest demand: the cheapest resources by their sums."""
    totals = table.sum(axis=1)
    least = len(totals) if mode != "demand" or each_used else int(need.max()) if need is not None else 1
    order = np.argsort(totals, kind="stable")
    chosen = (np.arange(len(totals)) < least) | (totals[order] < 0)
    x = np.zeros(table.shape, dtype=np.int8)
    x[order[chosen]] = 1
    return x
