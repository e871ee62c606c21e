"""What a benchmark run found, as Markdown that reads well in a terminal and pastes into docs/results, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from bigmodel import info
from bigmodel.benchmarks.goals import Verdict
from bigmodel.benchmarks.harness import COPY, OURS, Measurement, Timing

SCHEMA = 1
DISTURBED = 1.5  # median over least: beyond it, something else was running

METHOD = (
    "Median (least to greatest) over rounds that run every contender once, in changing order, in one process. "
    "GB/s: the bytes that must move, each tensor once, over the time. Of copy: the share of the bandwidth of a copy "
    "of as many bytes, timed in the same rounds. x: that contender's time over bigmodel's."
)


@dataclass(frozen=True)
class Report:
    """One run of one group: where, when, what was measured by kind of process, and how the goals stand."""

    group: str
    device: str
    quick: bool
    date: str
    commit: str | None
    facts: dict
    measurements: dict[str, list[Measurement]]
    verdicts: list[Verdict]

    def to_json(self) -> str:
        record = {
            "schema": SCHEMA,
            "group": self.group,
            "device": self.device,
            "quick": self.quick,
            "date": self.date,
            "commit": self.commit,
            "machine": self.facts,
            "measurements": {pages: [row.to_dict() for row in rows] for pages, rows in self.measurements.items()},
            "goals": [verdict.to_dict() for verdict in self.verdicts],
        }
        return json.dumps(record, indent=1) + "\n"

    def to_markdown(self) -> str:
        parts = [self._header(), METHOD, *self._warning()]
        for pages, rows in self.measurements.items():
            title = f"## {self.group} on {self.device}" + (f", {pages}" if self.device == "cpu" else "")
            lines, points = [m for m in rows if not m.sweep], [m for m in rows if m.sweep]
            parts += [title, measurement_table(lines)]
            if points:
                parts += ["### Over row lengths", measurement_table(points)]
            parts += [f"- {m.case}: {name}: {note}" for m in rows for name, note in m.notes.items()]
        if self.verdicts:
            parts += ["## Goals", goal_table(self.verdicts)]
        return "\n\n".join(parts) + "\n"

    def _warning(self) -> list[str]:
        timings = [timing for rows in self.measurements.values() for m in rows for timing in m.times.values()]
        disturbed = sum(timing.median > DISTURBED * timing.min for timing in timings)
        if not disturbed:
            return []
        return [
            f"**The machine was not quiet**: in {disturbed} of {len(timings)} timings the median is more than "
            f"{DISTURBED:g} times the least."
        ]

    def _header(self) -> str:
        facts, cuda = self.facts, self.facts["cuda"]
        lines = [f"# bigmodel bench {self.group}" + (" (quick: rough figures)" if self.quick else "")]
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
        return lines[0] + "\n\n" + "\n".join(lines[1:])


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
    return markdown_table(["goal", "needed", "worst measured", ""], lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with padded columns, the first aligned left and the others right."""
    aligns = "<" + ">" * (len(header) - 1)
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (f"{cell:{align}{width}}" for cell, align, width in zip(cells, aligns, widths, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 1) + (":" if index else "-") for index, width in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def show_timing(timing: Timing) -> str:
    """The median with its unit, then least and greatest in the same unit: "4.50 ms (4.41-4.93)"."""
    scale, unit = (1, "s") if timing.median >= 1 else (1e3, "ms") if timing.median >= 1e-3 else (1e6, "us")
    return f"{_digits(timing.median * scale)} {unit} ({_digits(timing.min * scale)}-{_digits(timing.max * scale)})"


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
