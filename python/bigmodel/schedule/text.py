"""A plan in words and columns, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from bigmodel.schedule.plan import Plan


def plan(plan: Plan) -> str:
    """Status, every run, and where the money goes."""
    problem, money = plan.problem, plan.problem.currency
    lines = [plan.status, ""]
    rows = [("job", "devices", "from", "to", "hours", "lost")]
    for row in sorted(plan.rows(), key=lambda row: (row["first"], row["job"])):
        begins, ends = problem.clock.label(row["first"]), problem.clock.label(row["last"])
        devices = f"{row['devices']} x {row['pool']}"
        rows.append((row["job"], devices, begins, ends, f"{row['hours']:.2f}", f"{row['lost_hours']:g}"))
    lines += columns(rows)
    lines += ["", *columns([("pool", "cost", "used"), *_pools(plan)])]
    if len(plan.cost_by_owner) > 1:
        owners = [(owner or "-", f"{cost:.2f}") for owner, cost in plan.cost_by_owner.items()]
        lines += ["", *columns([("owner", "cost"), *owners])]
    apart = [(plan.fixed_cost, "fixed"), (plan.stability_cost, "for stability")]
    lines += ["", f"cost {plan.cost:.2f} {money}" + "".join(f", and {cost:.2f} {what}" for cost, what in apart if cost)]
    for stage in plan.stages:
        lines.append(f"{stage.measure} {stage.value:.4g}, {stage.proven}")
    if plan.dropped:
        lines.append(f"dropped: {', '.join(plan.dropped)}")
    return "\n".join([*lines, *(f"move: {move}" for move in plan.moves), *(f"note: {note}" for note in plan.notes)])


def _pools(plan: Plan) -> list[tuple[str, str, str]]:
    used = plan.utilisation
    return [(name, f"{cost:.2f}", f"{used[name]:.0%}") for name, cost in plan.cost_by_pool.items()]


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def diff(old: Plan, new: Plan) -> str:
    """One line per job that changed, then the costs."""
    lines = []
    before, after = _shapes(old), _shapes(new)
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            lines.append(f"- {name}: {before[name]}")
        elif name not in before:
            lines.append(f"+ {name}: {after[name]}")
        elif before[name] != after[name]:
            lines.append(f"~ {name}: {before[name]} -> {after[name]}")
    change = new.cost - old.cost
    lines.append(f"cost {old.cost:.2f} -> {new.cost:.2f} {new.problem.currency} ({change:+.2f})")
    return "\n".join(lines)


def _shapes(plan: Plan) -> dict[str, str]:
    shapes = {}
    for name, runs in plan.runs.items():
        parts = [
            " + ".join(f"{n} x {plan.problem.pools[p].name}" for p, n in run.devices) + f" [{run.first}, {run.last})"
            for run in runs
        ]
        shapes[name] = ", ".join(parts) or "not run"
    return shapes


def prices(plan: Plan) -> list[str]:
    """For each pool, what one more device through the rest of the horizon would save, dearest first."""
    if plan.shadow is None:
        return []
    now, money = plan.problem.now, plan.problem.currency
    saved = plan.shadow[:, now:].sum(axis=1)
    lines = []
    for p in np.argsort(-saved, kind="stable"):
        if saved[p] > 1e-6:
            first, last = _dearest(plan.shadow[p])
            lines.append(
                f"one more {plan.problem.pools[p].name} would save up to {saved[p]:.2f} {money}, most of it in slots "
                f"{first} to {last}"
            )
        else:
            lines.append(f"one more {plan.problem.pools[p].name} would save nothing")
    return lines


def _dearest(price: np.ndarray) -> tuple[int, int]:
    """The shortest stretch of slots that holds half of what a device would save."""
    total, best = price.sum(), (0, len(price) - 1)
    sums = np.concatenate([[0.0], np.cumsum(price)])
    for first in range(len(price)):
        last = int(np.searchsorted(sums, sums[first] + total / 2))
        if last <= len(price) and last - 1 - first < best[1] - best[0]:
            best = (first, last - 1)
    return best
