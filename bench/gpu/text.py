"""A record in words: one line for a stage, and the lines that end a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from gpu.record import DONE, SKIPPED, Record


def passed(stage: Mapping) -> bool:
    """Whether a stage is done, or skipped for what the machine lacks, and found nothing wrong."""
    outcomes = _outcomes(stage)
    errors = [tool["errors"] for tool in stage.get("tools", {}).values()]
    return stage.get("state") in (DONE, SKIPPED) and not stage["errors"] and not outcomes["failed"] and not any(
        count is None or count > 0 for count in errors
    )  # fmt: skip


def line(stage: Mapping) -> str:
    """What a stage came to."""
    parts = [stage["state"] + (f" ({stage['why']})" if stage.get("why") else ""), f"{stage['seconds']:.0f} s"]
    outcomes = _outcomes(stage)
    if outcomes:
        parts += [f"{count} {outcome}" for outcome, count in sorted(outcomes.items())]
    elif stage["plan"]:
        parts.append(f"{len(stage['done'])} of {len(stage['plan'])}")
    parts += [f"{tool}: {_verdict(found)}" for tool, found in stage.get("tools", {}).items()]
    parts += [f"{len(stage['errors'])} broke off"] if stage["errors"] else []
    return ", ".join(parts + ([f"{len(stage['left'])} left"] if stage["left"] else []))


def troubles(stage: Mapping) -> list[str]:
    """What went wrong, an item a line."""
    lines = [f"{item}: {text.strip().splitlines()[-1]}" for item, text in stage["errors"].items() if text.strip()]
    for item, found in stage["done"].items():
        if found.get("outcome") in ("failed", "left out"):
            lines.append(f"{item}: {found['outcome']}: {(found['why'].strip().splitlines() or [''])[-1]}")
    return lines


def summary(record: Record) -> str:
    """A line for each stage, and below it the first of what went wrong."""
    lines = [""]
    for name, stage in record.data["stages"].items():
        lines.append(f"{name:14} {line(stage)}")
        wrong = troubles(stage)
        lines += [f"    {text[:300]}" for text in wrong[:10]]
        lines += [f"    ... and {len(wrong) - 10} more"] if len(wrong) > 10 else []
    return "\n".join(lines)


def _verdict(found: Mapping) -> str:
    return f"skipped ({found['skipped']})" if "skipped" in found else f"{found['errors']} errors"


def _outcomes(stage: Mapping) -> Counter[str]:
    return Counter(found["outcome"] for found in stage.get("done", {}).values() if "outcome" in found)
