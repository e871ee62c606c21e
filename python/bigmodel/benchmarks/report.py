"""What a benchmark run found, as Markdown that reads well in a terminal and pastes into docs/results, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bigmodel import info
from bigmodel.benchmarks.goals import Verdict
from bigmodel.benchmarks.harness import COPY, OURS, Measurement, Timing

SCHEMA = 1
DISTURBED = 1.5  # median over least: beyond it, something else was running

STOCK = ("stock", "fused", "foreach", "copies by hand", "eager")  # the first that a case has is its stock

METHOD = (
    "Median (least to greatest) over rounds that run every contender once, in changing order, in one process. "
    "GB/s: the bytes that must move, each tensor once, over the time. Of copy: the share of the bandwidth of a copy "
    "of as many bytes, timed in the same rounds; what fits a CPU's caches stays in them, and may be far above 100 %. "
    "x: that contender's time over bigmodel's."
)


@dataclass(frozen=True)
class Report:
    """One run of one group: where, when, what was measured by kind of process, and how the goals stand.

    `failed` says why a case has no measurement, `left` names those that the time did not reach.
    """

    group: str
    device: str
    quick: bool
    date: str
    commit: str | None
    facts: dict
    measurements: dict[str, list[Measurement]]
    verdicts: list[Verdict]
    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return to_json([self])

    def to_dict(self) -> dict:
        return {
            "schema": SCHEMA,
            "group": self.group,
            "device": self.device,
            "quick": self.quick,
            "date": self.date,
            "commit": self.commit,
            "machine": self.facts,
            "measurements": {pages: [row.to_dict() for row in rows] for pages, rows in self.measurements.items()},
            "goals": [verdict.to_dict() for verdict in self.verdicts],
            "failed": self.failed,
            "left": self.left,
        }

    def to_markdown(self) -> str:
        return to_markdown([self])

    def sections(self) -> list[str]:
        """Tables, notes and goals, without the machine and the method, which reports of one run share."""
        parts = []
        for pages, rows in self.measurements.items():
            title = f"## {self.group} on {self.device}" + (f", {pages}" if self.device == "cpu" else "")
            lines, points = [m for m in rows if not m.sweep], [m for m in rows if m.sweep]
            parts += [title, *([measurement_table(lines)] if lines else [])]
            if points:
                parts += ["### Over row lengths", measurement_table(points)]
            parts += [f"- {m.case}: {name}: {note}" for m in rows for name, note in notes(m).items()]
        parts += [f"- **failed**: {case}: {why}" for case, why in self.failed.items()]
        if self.left:
            parts.append(f"Not measured, for want of time: {', '.join(self.left)}.")
        if self.verdicts:
            parts += [f"## Goals of {self.group}", goal_table(self.verdicts)]
        return parts

    def machine(self) -> list[str]:
        """Where and with what it was measured, a line each."""
        facts, cuda = self.facts, self.facts["cuda"]
        lines = []
        if self.device == "cuda":
            driver = info.driver_verdict(cuda["driver"])
            lines.append(f"- device: {cuda['devices'][0]['name']}; driver {driver}; CUDA {cuda['status']}")
        cpu = facts["cpu"]
        lines += [
            f"- cpu: {cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads, {facts['native']['isa_chosen']}",
            f"- bigmodel {facts['version']}, commit {self.commit or 'unknown'}; torch {facts['torch']}; "
            f"python {facts['python']}",
            f"- transparent huge pages: {facts['transparent_hugepage'] or 'not offered by this kernel'}",
            f"- {self.date}",
        ]
        return lines


def to_json(reports: Sequence[Report]) -> str:
    """One report as it is, several under "reports"."""
    records = [report.to_dict() for report in reports]
    return json.dumps(records[0] if len(records) == 1 else {"schema": SCHEMA, "reports": records}, indent=1) + "\n"


def to_markdown(reports: Sequence[Report]) -> str:
    """Reports of one run under one head."""
    names = ", ".join(report.group for report in reports)
    title = f"# bigmodel bench {names}" + (" (quick: rough figures)" if reports[0].quick else "")
    parts = [title, "\n".join(reports[0].machine()), METHOD, *disturbance(reports)]
    return "\n\n".join([*parts, *(part for report in reports for part in report.sections())]) + "\n"


def overview(reports: Sequence[Report]) -> str:
    """Reports of one run in one table: what stock code takes is told in bigmodel's times."""
    parts = ["# bigmodel bench (rough figures)", "\n".join(reports[0].machine())]
    parts += [f"{METHOD} Stock is torch's own function, optimizer or attention.", *disturbance(reports)]
    by_case: dict[str, dict[str, Measurement]] = {}
    for report in reports:
        for pages, rows in report.measurements.items():
            for row in rows:
                by_case.setdefault(row.case, {})[pages] = row
    kinds = list(reports[0].measurements)
    header = [
        "case",
        OURS,
        "GB/s",
        "of copy",
        "stock",
        "x",
        *(f"x, {pages}" for pages in kinds[1:]),
        "torch.compile",
        "x",
    ]
    lines = []
    for case, by_pages in by_case.items():
        row = next(iter(by_pages.values()))
        stock = next((name for name in STOCK if name in row.times), None)
        line = [case + ("*" if row.notes else ""), show_timing(row.times[OURS], False)]
        line += [f"{row.gigabytes_per_second(OURS):.1f}", f"{row.speed(OURS, COPY) * 100:.0f} %"]
        line += _against(row, stock)
        for pages in kinds[1:]:
            found = by_pages.get(pages)
            line.append(f"{found.speed(OURS, stock):.2f}" if found and stock in found.times else "")
        lines.append(line + _against(row, "compile"))
    parts += [markdown_table(header, lines)] if lines else []
    for report in reports:
        parts += [f"- {m.case}: {name}: {note}" for rows in report.measurements.values() for m in rows
                  for name, note in notes(m).items()]  # fmt: skip
        parts += [f"- **failed**: {case}: {why}" for case, why in report.failed.items()]
    names = (case.split(", ")[0] for report in reports for case in report.left)
    left = dict.fromkeys(name for name in names if name not in by_case)
    if left:
        parts.append(f"Not measured, for want of time: {', '.join(left)}.")
    return "\n\n".join(parts) + "\n"


def _against(row: Measurement, name: str | None) -> list[str]:
    """The other's time and how many of bigmodel's that is."""
    if name is None or name not in row.times:
        return ["", ""]
    return [show_timing(row.times[name], False), f"{row.speed(OURS, name):.2f}"]


def disturbance(reports: Sequence[Report]) -> list[str]:
    """A warning where something else was running."""
    rows = [row for report in reports for measured in report.measurements.values() for row in measured]
    timings = [timing for row in rows for timing in row.times.values()]
    disturbed = sum(timing.median > DISTURBED * timing.min for timing in timings)
    if not disturbed:
        return []
    return [
        f"**The machine was not quiet**: in {disturbed} of {len(timings)} timings the median is more than "
        f"{DISTURBED:g} times the least."
    ]


def notes(row: Measurement) -> Mapping[str, str]:
    """A measurement's notes, and where a device waited for the host's launches."""
    waited = {
        name: f"the device waited for the host in {timing.late} of {timing.samples} samples"
        for name, timing in row.times.items()
        if timing.late
    }
    return {**row.notes, **waited}


def measurement_table(rows: Sequence[Measurement]) -> str:
    """One line per case: the copy, bigmodel, then every other contender with its time over bigmodel's."""
    others = list(dict.fromkeys(name for row in rows for name in row.times if name not in (OURS, COPY)))
    header = ["case", "MB", "copy", OURS, "GB/s", "of copy"]
    for name in others:
        header += [name, "x"]
    lines = []
    for row in rows:
        line = [
            row.case + ("*" if row.notes else ""),
            f"{row.bytes / 1e6:.3g}",
            show_timing(row.times[COPY]),
            show_timing(row.times[OURS]),
            f"{row.gigabytes_per_second(OURS):.1f}",
            f"{row.speed(OURS, COPY) * 100:.0f} %",
        ]
        for name in others:
            found = name in row.times
            line += [show_timing(row.times[name]), f"{row.speed(OURS, name):.2f}"] if found else ["", ""]
        lines.append(line)
    return markdown_table(header, lines)


def goal_table(verdicts: Sequence[Verdict]) -> str:
    """One line per goal text and limit: how many of its cases reach it, and the worst of them."""
    return markdown_table(*goal_rows(verdicts))


def goal_rows(verdicts: Sequence[Verdict]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of `goal_table`."""
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault((verdict.goal.text, verdict.goal.needed), []).append(verdict)
    lines = []
    for (text, needed), members in groups.items():
        worst = min(members, key=lambda verdict: verdict.goal.margin(verdict.value))
        reached = sum(verdict.reached for verdict in members)
        state = "reached" if reached == len(members) else "missed" if not reached else "missed in part"
        count = f" ({reached} of {len(members)})" if len(members) > 1 else ""
        shown = worst.goal.show(worst.value) + (f", {worst.goal.case}" if len(members) > 1 else "")
        lines.append([text, needed, shown, state + count])
    return ["goal", "needed", "worst measured", ""], lines


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with padded columns, the first aligned left and the others right."""
    aligns = "<" + ">" * (len(header) - 1)
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (f"{cell:{align}{width}}" for cell, align, width in zip(cells, aligns, widths, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 1) + (":" if index else "-") for index, width in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def show_timing(timing: Timing, spread: bool = True) -> str:
    """The median with its unit, then least and greatest in the same unit: "4.50 ms (4.41-4.93)"."""
    scale, unit = (1, "s") if timing.median >= 1 else (1e3, "ms") if timing.median >= 1e-3 else (1e6, "us")
    median = f"{_digits(timing.median * scale)} {unit}"
    return f"{median} ({_digits(timing.min * scale)}-{_digits(timing.max * scale)})" if spread else median


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
