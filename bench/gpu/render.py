"""A record as Markdown with charts: `python -m gpu.render RECORD.json`, with the package that was built on the path."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bigmodel.benchmarks import model, plot, report
from bigmodel.benchmarks.goals import DEFAULT_PAGES
from bigmodel.benchmarks.harness import in_a_line
from bigmodel.benchmarks.journal import Progress
from bigmodel.benchmarks.run import report_of
from gpu import text


def progress_of(stage: dict) -> Progress:
    return Progress(stage["plan"], stage["done"], stage["errors"])


def reports(data: dict) -> list[report.Report]:
    """A report for each bench stage that has measured something."""
    device = "cpu" if data["machine"]["capability"] is None else "cuda"
    return [
        report_of(
            name.removeprefix("bench-"), {DEFAULT_PAGES: progress_of(stage)},
            device=device, quick=False, facts=data["facts"], commit=data["commit"],
        )
        for name, stage in data["stages"].items()
        if name.startswith("bench-") and stage.get("done")
    ]  # fmt: skip


def to_markdown(data: dict, charts: dict[str, Path]) -> str:
    machine, stages = data["machine"], data["stages"]
    parts = [
        f"# make gpu on {machine['device']}, {data['date']}",
        f"Commit {data['commit']}; driver {machine['driver']}; torch {machine['torch']} with CUDA {machine['cuda']}; "
        f"nvcc {machine['nvcc']}; Python {machine['python']}. Peers: {', '.join(machine['peers']) or 'none'}. "
        f"Not installed: {', '.join(machine['missing']) or 'nothing that was wanted'}.",
        report.markdown_table(["stage", "result"], [[name, text.line(stage)] for name, stage in stages.items()]),
    ]
    for name, stage in stages.items():
        if name.startswith("bench-"):
            continue  # told below
        parts += [f"## {name}", *[f"- {line}" for line in text.troubles(stage)]] if text.troubles(stage) else []
        for tool, found in stage.get("tools", {}).items():
            if found["errors"] != 0:
                parts.append(f"{tool}:\n\n```\n" + "\n".join(found["words"]) + "\n```")
    if stages.get("model", {}).get("done"):
        parts += ["## A training step", _model_table(stages["model"])]
    found = reports(data)
    if found:
        parts += [report.METHOD, *report.disturbance(found)]
    for each in found:
        parts += each.sections()
        if each.group in charts:
            parts.append(f"![{each.group}]({charts[each.group].name})")
    return "\n\n".join(parts) + "\n"


def _model_table(stage: dict) -> str:
    found = model.summary(progress_of(stage))
    lines = []
    for variant, row in found.items():
        memory = "" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**30:.2f} GiB"
        median, least, greatest = (value * 1e3 for value in row["seconds"])
        lines.append([
            f"{variant}, {row['parameters'] / 1e9:.2f} B parameters", f"{row['tokens_per_second']:.0f}",
            f"{median:.1f} ms ({least:.1f}-{greatest:.1f})", memory,
            f"{row['losses'][0]:.3f} to {row['losses'][1]:.3f}",
        ])  # fmt: skip
    return report.markdown_table(["", "tokens/s", "step", "peak memory", "loss"], lines)


def main(path: Path) -> None:
    """Writes <record>.md and a PNG for each group beside the record, and the goals into it; prints what it wrote."""
    data: dict[str, Any] = json.loads(path.read_text())
    charts = {}
    for each in reports(data):
        data["stages"][f"bench-{each.group}"]["goals"] = [verdict.to_dict() for verdict in each.verdicts]
        chart = path.with_name(f"{path.stem}-{each.group}.png")
        try:
            plot.draw(each, chart)
        except Exception as error:  # the table is worth more than the chart
            print(f"no chart of {each.group}: {in_a_line(error)}", file=sys.stderr)
        else:
            charts[each.group] = chart
            print(chart)
    path.write_text(json.dumps(data, indent=1) + "\n")
    page = path.with_suffix(".md")
    page.write_text(to_markdown(data, charts))
    print(page)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
