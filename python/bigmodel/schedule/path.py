"""One job at given prices: its cheapest schedule, by the dynamic programme of csrc/planner/path.h."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bigmodel import _planner
from bigmodel.schedule.instance import JobData

# Units of the grid in a slot's work of the slowest configuration. A bound gives away half a unit per slot: 24 units
# gave away 1 %, 200 gave 0.05 to 0.3 %. Where nothing ties slots together a table is one vector per slot and not one
# per slot and configuration, so that it may be finer.
UNITS_PER_SLOT = {"up": 200, "nearest": 24, "down": 64}
FINE = 800
MOST_UNITS = {"tied": 25_000, "free": 100_000}
_ROUNDINGS = {name: getattr(_planner.Rounding, name) for name in UNITS_PER_SLOT}


@dataclass(frozen=True)
class Schedule:
    """cost at the given prices; use: (slot, pool, devices) triples in order of slot."""

    cost: float
    use: tuple[tuple[int, int, int], ...]


def cheapest(
    data: JobData, unit: np.ndarray, free: np.ndarray, h: float, *, rounding: str, first: int, last: int,
    stability: float = 0.0, units: int | None = None, like: Iterable[tuple[int, int, int]] = (),
) -> Schedule:  # fmt: skip
    """The cheapest schedule in slots first <= s < last on a grid of work left; cost is inf where there is none.

    Args:
        unit: currency per device-hour, (pools, slots). free: devices left, (pools, slots). h: hours of a slot.
        rounding: "up", a lower bound on the cost of any schedule, without its use; "down", a schedule that does the
            whole work; "nearest", likewise but nearer to the best, or none where the grid misled it.
        units: of the grid in a slot's work of the slowest configuration, UNITS_PER_SLOT if None.
        like: the use of a schedule that resembles the one sought; the grid is chosen so that its slots round least.
    """
    most = MOST_UNITS["tied" if data.switches else "free"]
    per_slot = units or UNITS_PER_SLOT[rounding]
    found = _planner.cheapest_path(
        data.native, unit, free, h, stability, first, last, _ROUNDINGS[rounding], per_slot, most, list(like)
    )
    return Schedule(found[0], tuple(found[1]))


def unbroken(
    data: JobData, unit: np.ndarray, free: np.ndarray, h: float, first: int, last: int, stability: float = 0.0
) -> Schedule:
    """The cheapest unbroken run of a job that is not preemptible: exact, by sums over every start."""
    cost, use = _planner.cheapest_run(data.native, unit, free, h, stability, first, last)
    return Schedule(cost, tuple(use))
