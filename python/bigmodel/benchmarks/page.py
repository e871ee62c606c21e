"""`bigmodel bench --report`: one self-contained HTML page of a run, its charts inline, the copy as their roof."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from bigmodel.benchmarks import harness, load_group
from bigmodel.benchmarks.harness import COPY, OURS, Measurement, Timing
from bigmodel.benchmarks.report import METHOD, STOCK, Report, disturbance, goal_rows, notes, show_timing

_PEERS = ("liger", "quack", "apex", "transformer_engine", "flash_attn", "foreach", "bitsandbytes", "deepspeed")
_COLOURS = {
    **dict.fromkeys(STOCK, "--stock"),
    **{name: f"--peer{number % 5}" for number, name in enumerate(_PEERS)},  # no group has more than five
    **{OURS: "--ours", COPY: "--roof", "compile": "--compile"},
}
_LABELS = {COPY: "copy (the roof)", "compile": "torch.compile"}
_AXIS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)  # shares of the copy's bandwidth; a dot beyond the last stays at the edge


def to_html(reports: Sequence[Report]) -> str:
    """The page: machine, a chart and a table for each group, goals, and how it was measured."""
    names = ", ".join(report.group for report in reports)
    facts = [line.removeprefix("- ").partition(": ") for line in reports[0].machine()]
    listed = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, _, value in facts if value)
    listed += "".join(f"<dt></dt><dd>{escape(key)}</dd>" for key, _, value in facts if not value)
    rough = "Rough figures: few cases, few rounds. " if reports[0].quick else ""
    body = [
        f'<h1>bigmodel bench</h1><p class="lead">{rough}{escape(names)} on {reports[0].device}</p><dl>{listed}</dl>',
        "<nav>"
        + "".join(f'<a href="#{r.group}">{r.group}</a>' for r in reports)
        + '<a href="#method">method</a></nav>',
        *(f'<p class="warning">{escape(text.replace("**", ""))}</p>' for text in disturbance(reports)),
        *(_group(report) for report in reports),
        _method(reports),
    ]
    style = Path(__file__).with_name("page.css").read_text()
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>bigmodel bench</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{style}</style></head><body>{"".join(body)}</body></html>\n'
    )


def _group(report: Report) -> str:
    parts = [f'<h2 id="{report.group}">{report.group}</h2>']
    for pages, rows in report.measurements.items():
        lines, points = [row for row in rows if not row.sweep], [row for row in rows if row.sweep]
        if report.device == "cpu" and rows:
            parts.append(f"<h3>{escape(pages)}</h3>")
        if rows:
            parts.append(_legend(rows))
        if lines:
            parts += [_dots(lines), _details("the figures", _table(lines))]
        if points:
            parts += [f'<div class="charts">{"".join(_curves(points))}</div>', _details("the figures", _table(points))]
        remarks = [f"{row.case}: {name}: {note}" for row in rows for name, note in notes(row).items()]
        parts += [_list(remarks)] if remarks else []
    if report.failed:
        parts += ['<p class="warning">Failed</p>', _list(f"{case}: {why}" for case, why in report.failed.items())]
    if report.left:
        parts.append(f"<p>Not measured, for want of time: {escape(', '.join(report.left))}.</p>")
    if report.verdicts:
        header, rows_of_goals = goal_rows(report.verdicts)
        table = _html_table(header, [[escape(cell) for cell in row] for row in rows_of_goals])
        parts.append(f'<h3>Goals</h3><div class="goals">{table}</div>')
    return "".join(parts)


# --- charts -----------------------------------------------------------------------------------------------------------


def _dots(rows: Sequence[Measurement]) -> str:
    """A line for each case: every contender's share of the copy's bandwidth."""
    left, right, row_height, top = 330, 850, 24, 30
    height = top + row_height * len(rows) + 8

    def x(share: float) -> float:
        return left + min(share, _AXIS[-1]) / _AXIS[-1] * (right - left)

    parts = [f'<svg viewBox="0 0 960 {height}" role="img" aria-label="share of the copy\'s bandwidth">']
    for share in _AXIS:
        kind = "roof" if share == 1 else "grid"
        parts.append(f'<line class="{kind}" x1="{x(share):.1f}" x2="{x(share):.1f}" y1="{top - 8}" y2="{height - 8}"/>')
        label = "copy" if share == 1 else f"{share * 100:.0f} %"
        parts.append(f'<text x="{x(share):.1f}" y="{top - 14}" text-anchor="middle">{label}</text>')
    for index, row in enumerate(rows):
        y = top + row_height * index + row_height / 2
        parts.append(f'<text class="case" x="{left - 14}" y="{y + 4}" text-anchor="end">{escape(row.case)}</text>')
        shares = {name: row.speed(name, COPY) for name in row.times if name != COPY}
        ends = x(min(shares.values())), x(max(shares.values()))
        parts.append(f'<line class="grid" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y}" y2="{y}" stroke-width="2"/>')
        for name, share in sorted(shares.items(), key=lambda entry: entry[0] == OURS):
            told = f"{_label(name)}: {share * 100:.0f} % of the copy, {show_timing(row.times[name])}"
            radius = 6 if name == OURS else 4.5
            parts.append(
                f'<circle cx="{x(share):.1f}" cy="{y}" r="{radius}" fill="{_colour(name)}">'
                f"<title>{escape(told)}</title></circle>"
            )
        text = f"{row.gigabytes_per_second(OURS):.3g} GB/s"
        parts.append(f'<text class="value" x="{right + 14}" y="{y + 4}">{text}</text>')
    return "".join(parts) + "</svg>"


def _curves(rows: Sequence[Measurement]) -> Iterable[str]:
    """A chart for each op, mode and dtype that has two row lengths: GB/s over row length."""
    panels: dict[str, list[Measurement]] = {}
    for row in rows:
        panels.setdefault(f"{row.op} {row.mode} {row.dtype}", []).append(row)
    return [_panel(title, panel) for title, panel in panels.items() if len(panel) > 1]


def _panel(title: str, rows: Sequence[Measurement]) -> str:
    left, right, top, bottom = 44, 346, 28, 196
    lengths = [row.shape[1] for row in rows]
    low, high = math.log2(min(lengths)), math.log2(max(lengths))
    most = _round_up(max(row.gigabytes_per_second(name) for row in rows for name in row.times))

    def x(length: int) -> float:
        return left + (math.log2(length) - low) / max(high - low, 1) * (right - left)

    def y(value: float) -> float:
        return bottom - value / most * (bottom - top)

    parts = [f'<svg viewBox="0 0 360 230" role="img"><text class="title" x="{left}" y="16">{escape(title)}</text>']
    for part in range(5):
        value = most * part / 4
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for length in lengths[:: max(len(lengths) // 5, 1)]:
        text = f"{length // 1024}k" if length >= 1024 else f"{length}"
        parts.append(f'<text x="{x(length):.1f}" y="{bottom + 16}" text-anchor="middle">{text}</text>')
    parts.append(f'<text x="{right}" y="{bottom + 30}" text-anchor="end">GB/s over row length</text>')
    for name in dict.fromkeys(name for row in rows for name in row.times):
        points = " ".join(
            f"{x(row.shape[1]):.1f},{y(row.gigabytes_per_second(name)):.1f}" for row in rows if name in row.times
        )
        kind = (
            ' class="roof"'
            if name == COPY
            else f' stroke="{_colour(name)}" stroke-width="{2.6 if name == OURS else 1.6}"'
        )
        parts.append(f'<polyline points="{points}" fill="none"{kind}><title>{escape(_label(name))}</title></polyline>')
    return "".join(parts) + "</svg>"


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 6, 8, 10 times a power of ten."""
    power = 10 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= value)


def _colour(name: str) -> str:
    return f"var({_COLOURS.get(name, '--other')})"


def _label(name: str) -> str:
    return _LABELS.get(name, name)


def _legend(rows: Sequence[Measurement]) -> str:
    names = dict.fromkeys(name for row in rows for name in (*row.times, COPY))
    items = (f'<span><i style="background:{_colour(name)}"></i>{escape(_label(name))}</span>' for name in names)
    words = "<span>of the bandwidth of a copy of as many bytes</span>" if any(not row.sweep for row in rows) else ""
    return f'<div class="legend">{"".join(items)}{words}</div>'


# --- tables and words -------------------------------------------------------------------------------------------------


def _table(rows: Sequence[Measurement]) -> str:
    others = list(dict.fromkeys(name for row in rows for name in row.times if name not in (OURS, COPY)))
    header = ["case", "MB", "copy", OURS, "GB/s", "of copy", *(cell for name in others for cell in (_label(name), "x"))]
    lines = []
    for row in rows:
        line = [escape(row.case), f"{row.bytes / 1e6:.3g}", _cell(row.times[COPY]), _cell(row.times[OURS])]
        line += [f"{row.gigabytes_per_second(OURS):.1f}", f"{row.speed(OURS, COPY) * 100:.0f} %"]
        for name in others:
            found = name in row.times
            line += [_cell(row.times[name]), f"{row.speed(OURS, name):.2f}"] if found else ["", ""]
        lines.append(line)
    return _html_table(header, lines)


def _cell(timing: Timing) -> str:
    median, _, spread = show_timing(timing).partition(" (")
    return f"{median} <small>({spread}</small>"


def _html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Of cells that are HTML already; bigmodel's column stands out."""
    marks = ['<td class="ours">' if name == OURS else "<td>" for name in header]
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = ("".join(f"{mark}{cell}</td>" for mark, cell in zip(marks, row, strict=True)) for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _method(reports: Sequence[Report]) -> str:
    parts = [f'<h2 id="method">How each figure was measured</h2><p>{escape(METHOD)}</p>']
    parts.append(_details("the measuring", f"<pre>{escape(inspect.getdoc(harness) or '')}</pre>"))
    if reports[0].device == "cuda":
        parts.append(_details("time on a GPU", f"<pre>{escape(inspect.getdoc(harness.CudaTimer) or '')}</pre>"))
    for report in reports:
        words = inspect.getdoc(load_group(report.group)) or ""
        parts.append(_details(f"cases and bytes of {report.group}", f"<pre>{escape(words)}</pre>"))
    return "".join(parts)
