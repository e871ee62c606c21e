"""The chart of a sweep: bandwidth over row length, a copy as the roof."""

from __future__ import annotations

from pathlib import Path

from bigmodel.benchmarks.harness import COPY, OURS, Measurement
from bigmodel.benchmarks.report import Report

_STYLE: dict[str, dict] = {
    COPY: {"color": "black", "linestyle": "--", "label": "copy (the roof)"},
    OURS: {"color": "tab:red", "linewidth": 2.2},
    "stock": {"color": "tab:blue"},
    "compile": {"color": "tab:green", "label": "torch.compile"},
    "liger": {"color": "tab:orange"},
    "quack": {"color": "tab:purple"},
    "apex": {"color": "tab:brown"},
}


def require_matplotlib() -> None:
    """Raises ImportError, in one sentence, before anything is measured for a chart that could not be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("bench: --plot needs matplotlib: pip install 'bigmodel[bench]'.") from error


def save(report: Report, path: str | Path) -> None:
    """Draws the sweep of a report as a PNG: a row of panels per kind of process, a panel per op, mode and dtype."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str, str, str], list[Measurement]] = {}
    for pages, rows in report.measurements.items():
        for row in rows:
            if row.sweep:
                panels.setdefault((pages, row.op, row.mode, row.dtype), []).append(row)
    if not panels:
        raise ValueError("bench: this report has no sweep over row lengths to draw.")
    columns = max(sum(key[0] == pages for key in panels) for pages in report.measurements)
    height = len(panels) // columns
    figure = Figure(figsize=(4.2 * columns, 3.4 * height + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, ((pages, op, mode, dtype), rows) in zip(
        figure.subplots(height, columns, squeeze=False).flat, panels.items(), strict=True
    ):
        for name in dict.fromkeys(name for row in rows for name in row.times):
            points = [(row.shape[1], row.gigabytes_per_second(name)) for row in rows if name in row.times]
            axes.plot(*zip(*points, strict=True), marker=".", **({"label": name} | _STYLE.get(name, {})))
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{op} {mode} {dtype}\n{pages}", fontsize=9)
        axes.set_xlabel("row length")
        axes.set_ylabel("GB/s of the bytes that must move")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    where = report.facts["cpu"]["model"] if report.device == "cpu" else report.facts["cuda"]["devices"][0]["name"]
    figure.suptitle(f"{report.group} on {where}, torch {report.facts['torch']}", fontsize=10)
    figure.savefig(path, dpi=130)
