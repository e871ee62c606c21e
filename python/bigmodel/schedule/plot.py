"""Gantt charts: a row of devices per pool, a bar per run. PNG and SVG by matplotlib, HTML by itself."""

from __future__ import annotations

import colorsys
import html
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from bigmodel.schedule.plan import Plan
    from bigmodel.schedule.problem import Problem

SUFFIXES = (".png", ".svg", ".html")
_TALLEST = 32  # devices of a pool that are drawn in full height; more are drawn thinner


def check(path: Path) -> None:
    """ValueError for a suffix, ImportError for a matplotlib, with which no chart can be drawn."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"gantt: {path.name} must end in {', '.join(SUFFIXES)}.")
    if path.suffix != ".html" and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("gantt: .png and .svg need matplotlib; .html does not.")


def gantt(plan: Plan, path: Path) -> None:
    check(path)
    if path.suffix == ".html":
        path.write_text(_page(plan), encoding="utf-8")
    else:
        _figure(plan, path)


def bars(plan: Plan) -> list[tuple[int, int, int, int, int, int]]:
    """(job, pool, first device, devices, first slot, last slot) of every bar: lanes that no other run holds."""
    found: list[tuple[int, int, int, int, int, int]] = []
    runs = [(run.first, j, run) for j, job in enumerate(plan.account.jobs) for run in job.runs]
    for _, j, run in sorted(runs, key=lambda item: item[:2]):
        for p, devices in run.devices:
            # Runs come in order of their beginning: who holds a lane now is who has not ended yet.
            beside = sorted(bar[2:4] for bar in found if bar[1] == p and bar[5] > run.first)
            lane = 0
            # Where lanes free at the same time are not neighbours, a run is drawn as several bars.
            for start, height in [*beside, (lane + devices + sum(height for _, height in beside), 0)]:
                group = min(devices, start - lane)
                if group > 0:
                    found.append((j, p, lane, group, run.first, run.last))
                    devices -= group
                lane = max(lane, start + height)
    return found


def _colour(j: int) -> str:
    """Neighbouring jobs get hues far apart (steps of the golden ratio)."""
    red, green, blue = colorsys.hls_to_rgb(j * 0.618034 % 1.0, 0.62, 0.55)
    return f"#{int(red * 255):02x}{int(green * 255):02x}{int(blue * 255):02x}"


def _step(problem: Problem, labels: int) -> int:
    """Slots between time labels, about so many in all: a length that a day or a week is a multiple of."""
    least = problem.slots * problem.slot_hours / labels
    hours = next((n for n in (1, 2, 3, 4, 6, 12, 24, 48, 168) if n >= least), least)
    return max(1, round(hours / problem.slot_hours))


def _figure(plan: Plan, path: Path) -> None:
    from matplotlib.figure import Figure

    problem = plan.problem
    most = problem.count.max(axis=1)
    heights = 0.09 * np.clip(most, 4, _TALLEST)
    figure = Figure(figsize=(13, 1.5 + float(heights.sum()) + 0.5 * len(most)), layout="constrained")
    axes = figure.subplots(len(most), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for p, axis in enumerate(axes):
        axis.set_ylim(0, max(1, most[p]))
        axis.set_xlim(0, problem.slots)
        axis.set_ylabel(f"{problem.pools[p].name}\n{most[p]}", rotation=0, ha="right", va="center")
        axis.set_yticks([])
        axis.step(
            np.arange(problem.slots + 1), [*problem.count[p], problem.count[p][-1]], where="post", color="0.6", lw=0.8
        )
        if problem.now:
            axis.axvspan(0, problem.now, color="0.93")
    for j, p, lane, devices, first, last in bars(plan):
        axes[p].broken_barh([(first, last - first)], (lane, devices), facecolor=_colour(j), edgecolor="white", lw=0.4)
        if (last - first) / problem.slots > 0.0045 * len(problem.jobs[j].name):
            axes[p].text(
                (first + last) / 2, lane + devices / 2, problem.jobs[j].name, ha="center", va="center", fontsize=6
            )
    step = _step(problem, 8)
    axes[-1].set_xticks(range(0, problem.slots, step))
    axes[-1].set_xticklabels(
        [problem.clock.begins(s).strftime("%a %d %b\n%H:%M") for s in range(0, problem.slots, step)]
    )
    figure.suptitle(f"{plan.cost:.2f} {problem.currency}; {plan.status}", fontsize=9)
    figure.savefig(path, dpi=130)


_STYLE = """
body{font:14px system-ui,sans-serif;margin:24px;color:#222}h1{font-size:18px}
svg{width:100%;height:auto;background:#fff}svg text{font:10px system-ui,sans-serif;pointer-events:none}
rect.run:hover{stroke:#000;stroke-width:1.5}table{border-collapse:collapse;margin-top:16px}
td,th{padding:3px 10px;border-bottom:1px solid #ddd;text-align:left}
"""


def _page(plan: Plan) -> str:
    """One page without scripts or links: the chart as SVG with a tooltip per run, then the table."""
    problem = plan.problem
    rows = plan.rows()
    heads = ("job", "owner", "pool", "devices", "begins", "ends", "hours", "lost_hours")
    body = "".join("<tr>" + "".join(f"<td>{_cell(row[key])}</td>" for key in heads) + "</tr>" for row in rows)
    top = "".join(f"<th>{head}</th>" for head in heads)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in (*plan.moves, *plan.notes))
    title = f"{plan.cost:.2f} {html.escape(problem.currency)}; {html.escape(plan.status)}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Plan</title><style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1>{_svg(plan)}<table><tr>{top}</tr>{body}</table>"
        f"<ul>{notes}</ul></body></html>\n"
    )


def _cell(value: object) -> str:
    return html.escape(f"{value:.2f}" if isinstance(value, float) else str(value))


def _svg(plan: Plan) -> str:
    problem, left, width = plan.problem, 130, 1100
    most = problem.count.max(axis=1)
    lanes = 6 * np.minimum(1.0, _TALLEST / np.maximum(most, 1))  # pixels of a device, by pool
    tops = np.concatenate([[20.0], 20 + np.cumsum(np.ceil(most * lanes) + 18)])
    per_slot = width / problem.slots
    parts = [f'<svg viewBox="0 0 {left + width + 10} {int(tops[-1]) + 20}" role="img" aria-label="Gantt chart">']
    for s in range(0, problem.slots + 1, _step(problem, 12)):
        x = left + s * per_slot
        when = problem.clock.begins(s).strftime("%a %d %H:%M")
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="16" y2="{int(tops[-1])}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="11" fill="#555">{when}</text>')
    for p, pool in enumerate(problem.pools):
        parts.append(f'<text x="4" y="{tops[p] + 10:g}">{html.escape(pool.name)} ({most[p]})</text>')
        for s in range(problem.slots):
            gone = int(most[p] - problem.count[p, s])
            if gone:
                x, y = left + s * per_slot, tops[p] + (most[p] - gone) * lanes[p]
                height = gone * lanes[p]
                parts.append(f'<rect x="{x:.1f}" y="{y:g}" width="{per_slot:.2f}" height="{height:g}" fill="#eee"/>')
    for j, p, first_lane, devices, first, last in bars(plan):
        x, y, height = left + first * per_slot, tops[p] + first_lane * lanes[p], devices * lanes[p]
        name, pool_name = html.escape(problem.jobs[j].name), html.escape(problem.pools[p].name)
        span = f"{problem.clock.label(first)} to {problem.clock.label(last)}"
        parts.append(
            f'<rect class="run" x="{x:.1f}" y="{y:g}" width="{(last - first) * per_slot:.1f}" height="{height:g}" '
            f'fill="{_colour(j)}"><title>{name}: {devices} x {pool_name}, {span}</title></rect>'
        )
        if (last - first) * per_slot > 7 * len(name) and height >= 10:
            parts.append(f'<text x="{x + 3:.1f}" y="{y + height / 2 + 3:g}">{name}</text>')
    return "".join([*parts, "</svg>"])
