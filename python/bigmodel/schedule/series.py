"""Per-slot values: a number, a 24-hour profile, ranges, one value per slot, or a column of a CSV file.

What changes within a slot is followed exactly: prices and carbon are averaged over it, counts take the least.
"""

from __future__ import annotations

import csv
import math
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import numpy as np

if TYPE_CHECKING:
    from bigmodel.schedule.problem import Problem

MOST = 1e18  # of any number: beyond it, sums and products of a plan's figures lose all meaning
MOST_DEVICES = 10**9
_SNAP = 1e-9  # of a slot: a change this close to a boundary is on it
_QUARTER = 900  # seconds: every zone's offset from UTC is a multiple of it


def averages(problem: Problem, name: str) -> np.ndarray:
    """The values of field `name` of every pool averaged over each slot, shape (pools, slots)."""
    rows = []
    for index, pool in enumerate(problem.pools):
        edges, values, first = _pieces(problem, getattr(pool, name), f"pools[{index}].{name}")
        rows.append(np.add.reduceat(values * np.diff(edges, append=problem.slots), first))
    return np.array(rows).reshape(len(problem.pools), problem.slots)


def counts(problem: Problem) -> np.ndarray:
    """Devices that are there throughout each slot, shape (pools, slots), integers."""
    rows = []
    for index, pool in enumerate(problem.pools):
        _, values, first = _pieces(problem, pool.count, f"pools[{index}].count")
        for wrong in values[(values != np.round(values)) | (values > MOST_DEVICES)]:
            raise ValueError(f"pools[{index}].count: {wrong:g} is not a whole number of devices up to {MOST_DEVICES}.")
        rows.append(np.minimum.reduceat(values, first))
    return np.array(rows, dtype=np.int64).reshape(len(problem.pools), problem.slots)


def _pieces(problem: Problem, value: Any, path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stretches without a change: where each begins, in slots; its value; and the first stretch of every slot."""
    where, values = read(problem, value, path)
    where = np.where(np.abs(where - np.round(where)) < _SNAP, np.round(where), where)
    changes = np.diff(values, prepend=np.nan) != 0
    where, values = where[changes], values[changes]
    slots = np.arange(problem.slots)
    edges = np.union1d(where[where > 0], slots)
    edges = edges[edges < problem.slots]
    return edges, values[np.searchsorted(where, edges, side="right") - 1], np.searchsorted(edges, slots)


def read(problem: Problem, value: Any, path: str) -> tuple[np.ndarray, np.ndarray]:
    """(where, values): each value, finite and not negative, holds from its position, in slots, until the next."""
    if isinstance(value, np.ndarray):
        value = {"slots": value.tolist()}
    if isinstance(value, dict) and set(value) == {"slots"}:
        return np.arange(problem.slots, dtype=float), _column(problem, value["slots"], path)
    if isinstance(value, dict):
        return _from_csv(problem, value, path)
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, dict) for item in value):
        return _from_ranges(problem, value, path)
    if isinstance(value, (list, tuple)):
        return _from_profile(problem, value, path)
    return np.zeros(1), np.array([number(value, path)])


def number(value: Any, path: str, *, least: float = 0.0, above: bool = False) -> float:
    """A finite number of at least `least` (`above`: more than it)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ValueError(f"{path}: must be a number, got {value!r}.")
    if not (least < value if above else least <= value) or value > MOST:
        range_ = f"{'above' if above else 'at least'} {least:g} and at most {MOST:g}"
        raise ValueError(f"{path}: is {value}; it must be finite, {range_}.")
    return float(value)


def _from_profile(problem: Problem, value: Any, path: str) -> tuple[np.ndarray, np.ndarray]:
    if len(value) != 24:
        raise ValueError(
            f"{path}: a list of numbers is a 24-hour profile, got {len(value)}; {{slots = [...]}} gives one per slot."
        )
    profile = np.array([number(item, f"{path}[{hour}]") for hour, item in enumerate(value)])
    clock = problem.clock
    before, hours = _local_hours(clock.start, clock.zone, problem.slots * problem.slot_hours)
    where = (np.arange(len(hours)) * _QUARTER - before) / 3600 / problem.slot_hours
    return where, profile[hours]


@lru_cache(maxsize=8)
def _local_hours(start: datetime, zone: ZoneInfo, hours: float) -> tuple[float, np.ndarray]:
    """Seconds by which the first quarter of an hour begins before `start`, and each quarter's hour by the wall."""
    before = (start - datetime(2000, 1, 1, tzinfo=timezone.utc)).total_seconds() % _QUARTER
    first = start - timedelta(seconds=before)
    quarters = range(math.ceil((hours * 3600 + before) / _QUARTER))
    return before, np.array([(first + timedelta(seconds=_QUARTER * q)).astimezone(zone).hour for q in quarters])


def _column(problem: Problem, values: Any, path: str) -> np.ndarray:
    if not isinstance(values, (list, tuple)) or len(values) != problem.slots:
        got = len(values) if isinstance(values, (list, tuple)) else repr(values)
        raise ValueError(f"{path}: needs one value for each of the {problem.slots} slots, got {got}.")
    return np.array([number(item, f"{path}[{slot}]") for slot, item in enumerate(values)])


def _position(problem: Problem, when: Any, path: str) -> float:
    if isinstance(when, (int, float)) and not isinstance(when, bool) and -MOST <= when <= MOST:
        return float(when)
    try:
        return problem.clock.slot(problem.clock.instant(str(when)))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {when!r} is neither a slot number nor an ISO time ({error}).") from None


def _from_ranges(problem: Problem, ranges: Any, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Later ranges override earlier ones; together they cover every slot."""
    spans = []
    for index, item in enumerate(ranges):
        here = f"{path}[{index}]"
        if not {"value"} <= set(item) <= {"from", "to", "value"}:
            raise ValueError(f"{here}: has keys {', '.join(item)}; accepted are from, to and value.")
        first = _position(problem, item.get("from", 0), f"{here}.from")
        last = _position(problem, item.get("to", problem.slots), f"{here}.to")
        if last <= first:
            raise ValueError(f"{here}: ends at {item.get('to')} and begins at {item.get('from')}.")
        spans.append((first, last, number(item["value"], f"{here}.value")))
    where = np.unique([0.0, *(edge for span in spans for edge in span[:2] if 0 < edge < problem.slots)])
    values = np.full(len(where), np.nan)
    for first, last, value in spans:
        values[(where >= first - _SNAP) & (where < last - _SNAP)] = value
    if np.isnan(values).any():
        slot = int(where[np.isnan(values)][0])
        raise ValueError(f"{path}: no range gives a value for slot {slot}.")
    return where, values


def _from_csv(problem: Problem, source: dict, path: str) -> tuple[np.ndarray, np.ndarray]:
    """One row per slot; with `time`, the name of a column of ISO times, each row's value holds until the next."""
    if not {"csv", "column"} <= set(source) <= {"csv", "column", "time"}:
        raise ValueError(f"{path}: has keys {', '.join(source)}; a CSV needs csv and column, and may have time.")
    for key, name in source.items():
        if not isinstance(name, str) or "\0" in name:
            raise ValueError(f"{path}.{key}: must be text, got {name!r}.")
    try:
        # utf-8-sig: spreadsheets put a byte order mark before the first column's name.
        with open(Path(problem.folder, source["csv"]), newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.DictReader(lines))
    except OSError as error:
        raise ValueError(f"{path}.csv: cannot read {source['csv']}: {error.strerror}.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}.csv: {source['csv']} is no CSV file in UTF-8: {error}.") from None
    for key in ("column", "time"):
        if key in source and (not rows or source[key] not in rows[0]):
            raise ValueError(f"{path}.{key}: {source['csv']} has no column {source[key]!r}.")
    values = np.array([_cell(row[source["column"]], f"{path}: {source['csv']} row {i}") for i, row in enumerate(rows)])
    if "time" not in source:
        if len(values) < problem.slots:
            raise ValueError(f"{path}: {source['csv']} has {len(values)} rows for {problem.slots} slots.")
        return np.arange(problem.slots, dtype=float), values[: problem.slots]
    times = np.array([_position(problem, row[source["time"]], f"{path}.time") for row in rows])
    if (np.diff(times) <= 0).any() or times[0] > _SNAP:
        raise ValueError(f"{path}.time: the times must rise and begin no later than slot 0.")
    return times, values


def _cell(text: str | None, path: str) -> float:
    try:
        return number(float(text or ""), path)
    except ValueError as error:
        raise error if str(error).startswith(path) else ValueError(f"{path}: {text!r} is not a number.") from None
