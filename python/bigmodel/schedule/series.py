"""Per-slot values: a number, a 24-hour profile, ranges, one value per slot, or a column of a CSV file.

What changes within a slot is sampled every quarter of an hour: prices and carbon are averaged, counts take the least.
"""

from __future__ import annotations

import csv
import math
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from bigmodel.schedule.problem import Problem

_SAMPLES_PER_HOUR = 4


def of_pools(problem: Problem, name: str) -> np.ndarray:
    """The values of field `name` of every pool, shape (pools, slots); averages over each slot."""
    rows = [
        read(problem, getattr(pool, name), f"pools[{index}].{name}").mean(axis=1)
        for index, pool in enumerate(problem.pools)
    ]
    return np.array(rows).reshape(len(problem.pools), problem.slots)


def counts(problem: Problem) -> np.ndarray:
    """Devices that are there throughout each slot, shape (pools, slots), integers."""
    rows = []
    for index, pool in enumerate(problem.pools):
        values = read(problem, pool.count, f"pools[{index}].count").min(axis=1)
        if (values != np.round(values)).any():
            wrong = values[values != np.round(values)][0]
            raise ValueError(f"pools[{index}].count: {wrong:g} is not a whole number of devices.")
        rows.append(values)
    return np.array(rows, dtype=np.int64).reshape(len(problem.pools), problem.slots)


def read(problem: Problem, value: Any, path: str) -> np.ndarray:
    """One value per sample, shape (slots, samples in a slot); finite and not negative."""
    samples = max(1, math.ceil(problem.slot_hours * _SAMPLES_PER_HOUR))
    table = np.empty((problem.slots, samples))
    if isinstance(value, np.ndarray):
        value = {"slots": value.tolist()}
    if isinstance(value, dict) and set(value) == {"slots"}:
        table[:] = _column(problem, value["slots"], path)[:, None]
    elif isinstance(value, dict):
        table[:] = _from_csv(problem, value, path, samples)
    elif isinstance(value, (list, tuple)) and value and all(isinstance(item, dict) for item in value):
        table[:] = _from_ranges(problem, value, path, samples)
    elif isinstance(value, (list, tuple)):
        if len(value) != 24:
            raise ValueError(
                f"{path}: a list of numbers is a 24-hour profile, got {len(value)}; "
                "{slots = [...]} gives one per slot."
            )
        profile = np.array([number(item, f"{path}[{hour}]") for hour, item in enumerate(value)])
        table[:] = profile[
            [[_local_hour(problem, s, i, samples) for i in range(samples)] for s in range(problem.slots)]
        ]
    else:
        table[:] = number(value, path)
    return table


def number(value: Any, path: str, *, least: float = 0.0, above: bool = False) -> float:
    """A finite number of at least `least` (`above`: more than it)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ValueError(f"{path}: must be a number, got {value!r}.")
    if not math.isfinite(value) or value < least or (above and value == least):
        raise ValueError(f"{path}: is {value}; it must be finite and {'above' if above else 'at least'} {least:g}.")
    return float(value)


def _local_hour(problem: Problem, slot: int, sample: int, samples: int) -> int:
    start = problem.clock.start + timedelta(hours=problem.slot_hours * (slot + sample / samples))
    return start.astimezone(problem.clock.zone).hour


def _column(problem: Problem, values: Any, path: str) -> np.ndarray:
    if not isinstance(values, (list, tuple)) or len(values) != problem.slots:
        got = len(values) if isinstance(values, (list, tuple)) else repr(values)
        raise ValueError(f"{path}: needs one value for each of the {problem.slots} slots, got {got}.")
    return np.array([number(item, f"{path}[{slot}]") for slot, item in enumerate(values)])


def _position(problem: Problem, when: Any, path: str) -> float:
    if isinstance(when, (int, float)) and not isinstance(when, bool):
        return float(when)
    try:
        return problem.clock.slot(problem.clock.instant(str(when)))
    except ValueError as error:
        raise ValueError(f"{path}: {when!r} is neither a slot number nor an ISO time ({error}).") from None


def _positions(problem: Problem, samples: int) -> np.ndarray:
    return np.arange(problem.slots)[:, None] + np.arange(samples)[None, :] / samples


def _from_ranges(problem: Problem, ranges: Any, path: str, samples: int) -> np.ndarray:
    """Later ranges override earlier ones; together they cover every slot."""
    where = _positions(problem, samples)
    table = np.full(where.shape, np.nan)
    for index, item in enumerate(ranges):
        here = f"{path}[{index}]"
        if not {"value"} <= set(item) <= {"from", "to", "value"}:
            raise ValueError(f"{here}: has keys {', '.join(item)}; accepted are from, to and value.")
        first = _position(problem, item.get("from", 0), f"{here}.from")
        last = _position(problem, item.get("to", problem.slots), f"{here}.to")
        if last <= first:
            raise ValueError(f"{here}: ends at {item.get('to')} and begins at {item.get('from')}.")
        table[(where >= first - 1e-9) & (where < last - 1e-9)] = number(item["value"], f"{here}.value")
    if np.isnan(table).any():
        slot = int(np.argwhere(np.isnan(table))[0][0])
        raise ValueError(f"{path}: no range gives a value for slot {slot}.")
    return table


def _from_csv(problem: Problem, source: dict, path: str, samples: int) -> np.ndarray:
    """One row per slot; with `time`, the name of a column of ISO times, each row's value holds until the next."""
    if not {"csv", "column"} <= set(source) <= {"csv", "column", "time"}:
        raise ValueError(f"{path}: has keys {', '.join(source)}; a CSV needs csv and column, and may have time.")
    file = Path(problem.folder, source["csv"])
    try:
        with open(file, newline="") as lines:
            rows = list(csv.DictReader(lines))
    except OSError as error:
        raise ValueError(f"{path}.csv: cannot read {source['csv']}: {error.strerror}.") from None
    for key in ("column", "time"):
        if key in source and (not rows or source[key] not in rows[0]):
            raise ValueError(f"{path}.{key}: {source['csv']} has no column {source[key]!r}.")
    values = np.array([_cell(row[source["column"]], f"{path}: {source['csv']} row {i}") for i, row in enumerate(rows)])
    if "time" not in source:
        if len(values) < problem.slots:
            raise ValueError(f"{path}: {source['csv']} has {len(values)} rows for {problem.slots} slots.")
        return values[: problem.slots, None]
    times = np.array([_position(problem, row[source["time"]], f"{path}.time") for row in rows])
    if (np.diff(times) <= 0).any() or times[0] > 1e-9:
        raise ValueError(f"{path}.time: the times must rise and begin no later than slot 0.")
    return values[np.searchsorted(times, _positions(problem, samples) + 1e-9, side="right") - 1]


def _cell(text: str | None, path: str) -> float:
    try:
        return number(float(text or ""), path)
    except ValueError as error:
        raise error if str(error).startswith(path) else ValueError(f"{path}: {text!r} is not a number.") from None
