"""`bigmodel bench --compare A.json B.json`: what moved between two recorded runs, case by case."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bigmodel.benchmarks.goals import DEFAULT_PAGES
from bigmodel.benchmarks.harness import COPY, OURS, Measurement, Timing
from bigmodel.benchmarks.report import markdown_table, show_timing

METHOD = (
    "Times are bigmodel's: median (least to greatest). x: A's median over B's, above 1 where B is faster. Copy x: the "
    "same of the copy timed beside it, which tells the machine's part. A case has moved where the least of one run "
    "lies above the greatest of the other; elsewhere the difference is noise."
)


@dataclass(frozen=True)
class Run:
    """One file: what it was measured on, and its measurements by kind of process and case."""

    path: str
    where: str
    cases: dict[tuple[str, str], Measurement]


def load(path: str | Path) -> Run:
    """Reads what `bigmodel bench --json` or `make gpu` wrote; ValueError, in one sentence, for anything else."""
    try:
        record = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"bench: {path} is no JSON: {error}.") from None
    try:
        reports = list(_reports(record)) if isinstance(record, dict) else []
        cases = {
            (pages, row["case"]): Measurement.from_dict(row)
            for report in reports
            for pages, rows in report["measurements"].items()
            for row in rows
        }
        where = _where(reports[0]) if cases else ""
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"bench: a measurement in {path} is not as bigmodel writes it ({error}).") from None
    if not cases:
        raise ValueError(f"bench: {path} holds no measurements of `bigmodel bench` or `make gpu`.")
    return Run(str(path), where, cases)


def _reports(record: Mapping) -> Iterator[Mapping]:
    if "measurements" in record:
        yield record
    yield from record.get("reports", ())
    rows = [
        found["row"]
        for stage in record.get("stages", {}).values()
        for found in stage.get("done", {}).values()
        if "row" in found
    ]
    if rows:
        device = "cuda" if record["facts"]["cuda"]["devices"] else "cpu"
        yield {
            "device": device, "machine": record["facts"], "commit": record["commit"], "date": record["date"],
            "measurements": {DEFAULT_PAGES: rows},
        }  # fmt: skip


def _where(report: Mapping) -> str:
    machine = report["machine"]
    devices = machine["cuda"]["devices"] if report["device"] == "cuda" else []
    name = devices[0]["name"] if devices else machine["cpu"]["model"]
    return f"{name}, torch {machine['torch']}, commit {report['commit'] or 'unknown'}, {report['date']}"


def verdict(a: Timing, b: Timing) -> str:
    """B as A sees it: "faster" or "slower" where the ranges of the two do not meet, else "noise"."""
    if b.max < a.min:
        return "faster"
    return "slower" if b.min > a.max else "noise"


def to_markdown(a: Run, b: Run) -> str:
    """What moved, slowest first; what did not; what only one of them has; and where another contender moved."""
    both = [key for key in a.cases if key in b.cases]
    rows = [(a.cases[key], b.cases[key], key) for key in both]
    moved = [row for row in rows if verdict(row[0].times[OURS], row[1].times[OURS]) != "noise"]
    moved.sort(key=lambda row: _ratio(row[0], row[1], OURS))
    still = [row for row in rows if row not in moved]
    parts = [f"# {a.path} (A) against {b.path} (B)", f"- A: {a.where}\n- B: {b.where}", METHOD]
    parts += [f"## Moved: {len(moved)} of {len(rows)} cases", *([_table(moved)] if moved else [])]
    if still:
        parts += ["## Within noise", _table(still)]
    others = [
        [_name(key), name, show_timing(x.times[name]), show_timing(y.times[name]), f"{_ratio(x, y, name):.2f}"]
        for x, y, key in rows
        for name in x.times
        if name not in (OURS, COPY) and name in y.times and verdict(x.times[name], y.times[name]) != "noise"
    ]
    if others:
        parts += ["## Other contenders that moved", markdown_table(["case", "contender", "A", "B", "x"], others)]
    for run, other in ((a, b), (b, a)):
        only = [_name(key) for key in run.cases if key not in other.cases]
        if only:
            parts.append(f"Only in {run.path}: {'; '.join(only)}.")
    return "\n\n".join(parts) + "\n"


def _ratio(a: Measurement, b: Measurement, name: str) -> float:
    return a.times[name].median / b.times[name].median


def _name(key: tuple[str, str]) -> str:
    pages, case = key
    return f"{case}, {pages}"


def _table(rows: list[tuple[Measurement, Measurement, tuple[str, str]]]) -> str:
    lines = [
        [
            _name(key),
            show_timing(a.times[OURS]),
            show_timing(b.times[OURS]),
            f"{_ratio(a, b, OURS):.2f}",
            f"{_ratio(a, b, COPY):.2f}",
            verdict(a.times[OURS], b.times[OURS]),
        ]
        for a, b, key in rows
    ]
    return markdown_table(["case", "A", "B", "x", "copy x", ""], lines)
