"""The chart of a sweep: bandwidth over row length, a copy as the roof."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from bigmodel.benchmarks.harness import COPY, OURS, Measurement
from bigmodel.benchmarks.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Item = TypeVar("Item")

_COLUMNS = 4
_STYLE: dict[str, dict] = {
    COPY: {"color": "black", "linestyle": "--", "label": "copy (the roof)"},
    OURS: {"color": "tab:red", "linewidth": 2.2},
    "stock": {"color": "tab:blue"},
    "compile": {"color": "tab:green", "label": "torch.compile"},
    "liger": {"color": "tab:orange"},
    "quack": {"color": "tab:purple"},
    "apex": {"color": "tab:brown"},
    "transformer_engine": {"color": "tab:olive"},
    "flash_attn": {"color": "tab:cyan"},
    "fused": {"color": "tab:blue", "label": "torch fused"},
    "foreach": {"color": "tab:cyan", "label": "torch foreach"},
}


def require_matplotlib() -> None:
    """Raises ImportError, in one sentence, before anything is measured for a chart that could not be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("bench: --plot needs matplotlib: pip install 'bigmodel[bench]'.") from error


def path_of(path: Path, group: str) -> Path:
    """The chart of one group among several: chart-norm.png for chart.png."""
    return path.with_name(f"{path.stem}-{group}{path.suffix}")


def draw(report: Report, path: str | Path) -> None:
    """The chart of a report as a PNG: its sweep, or where it has none its cases."""
    swept = any(row.sweep for rows in report.measurements.values() for row in rows)
    (save if swept else save_bars)(report, path)


def save(report: Report, path: str | Path) -> None:
    """Draws the sweep of a report as a PNG: rows of panels for each kind of process, a panel per op, mode and dtype."""
    panels: dict[str, dict[tuple[str, str, str], list[Measurement]]] = {}
    for pages, rows in report.measurements.items():
        for row in rows:
            if row.sweep:
                panels.setdefault(pages, {}).setdefault((row.op, row.mode, row.dtype), []).append(row)
    if not panels:
        raise ValueError("bench: this report has no sweep over row lengths to draw.")
    columns = min(max(map(len, panels.values())), _COLUMNS)
    places = [(pages, key) for pages, found in panels.items() for key in _padded(list(found), columns)]
    figure, axes = _figure(report, len(places) // columns, columns)
    for place, (pages, key) in zip(axes, places, strict=True):
        if key is None:
            place.set_visible(False)
            continue
        rows = panels[pages][key]
        for name in dict.fromkeys(name for row in rows for name in row.times):
            points = [(row.shape[1], row.gigabytes_per_second(name)) for row in rows if name in row.times]
            place.plot(*zip(*points, strict=True), marker=".", **style(name))
        place.set_xscale("log", base=2)
        place.set_ylim(bottom=0)
        place.set_title(" ".join(key) + (f"\n{pages}" if report.device == "cpu" else ""), fontsize=9)
        place.set_xlabel("row length")
        place.set_ylabel("GB/s of the bytes that must move")
        place.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def save_bars(report: Report, path: str | Path) -> None:
    """Draws the cases of a report that are no sweep as a PNG: a panel of bars for each, the copy as a line."""
    rows = [(pages, row) for pages, rows in report.measurements.items() for row in rows if not row.sweep]
    if not rows:
        raise ValueError("bench: this report has no cases to draw.")
    columns = min(len(rows), 3)
    figure, axes = _figure(report, -(-len(rows) // columns), columns)
    for place, entry in zip(axes, _padded(rows, columns), strict=True):
        if entry is None:
            place.set_visible(False)
            continue
        pages, row = entry
        names = [name for name in row.times if name != COPY]
        bars = [style(name) for name in names]
        place.barh(
            [bar["label"] for bar in bars],
            [row.gigabytes_per_second(name) for name in names],
            color=[bar.get("color", "tab:gray") for bar in bars],
        )
        place.axvline(row.gigabytes_per_second(COPY), color="black", linestyle="--")
        place.invert_yaxis()
        place.set_title(row.case + (f"\n{pages}" if report.device == "cpu" else ""), fontsize=9)
        place.set_xlabel("GB/s of the bytes that must move; dashed: copy", fontsize=8)
    figure.savefig(path, dpi=130)


def style(name: str) -> dict:
    """How a contender is drawn; one that has no style of its own gets the next colour."""
    return {"label": name} | _STYLE.get(name, {})


def _padded(items: Sequence[Item], columns: int) -> list[Item | None]:
    """The items, and None up to the end of the last row."""
    return [*items, *[None] * (-len(items) % columns)]


def _figure(report: Report, height: int, columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns, 3.4 * height + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    where = report.facts["cpu"]["model"] if report.device == "cpu" else report.facts["cuda"]["devices"][0]["name"]
    figure.suptitle(f"{report.group} on {where}, torch {report.facts['torch']}", fontsize=10)
    return figure, list(figure.subplots(height, columns, squeeze=False).flat)
