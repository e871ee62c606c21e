"""A plan in words and columns, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bigmodel.schedule import rules

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
    """One line per job whose runs from the later `now` on changed, then the costs from there on."""
    now, lines = max(old.problem.now, new.problem.now), []
    before, after = _shapes(old, now), _shapes(new, now)
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            lines.append(f"- {name}: {before[name]}")
        elif name not in before:
            lines.append(f"+ {name}: {after[name]}")
        elif before[name] != after[name]:
            lines.append(f"~ {name}: {before[name]} -> {after[name]}")
    costs = [plan.cost - _cost_before(plan, now) for plan in (old, new)]
    since = f" from slot {now} on" if old.problem.now < now or new.problem.now < now else ""
    lines.append(f"cost{since} {costs[0]:.2f} -> {costs[1]:.2f} {new.problem.currency} ({costs[1] - costs[0]:+.2f})")
    return "\n".join(lines)


def _cost_before(plan: Plan, now: int) -> float:
    past = np.where(np.arange(plan.problem.slots) < now, plan.allocation, 0)
    return sum(job.cost for job in rules.check(plan.problem, past).jobs)


def _shapes(plan: Plan, now: int) -> dict[str, str]:
    """The runs of each job that had not ended before `now`, as text."""
    shapes = {}
    for name, runs in plan.runs.items():
        parts = [
            " + ".join(f"{n} x {plan.problem.pools[p].name}" for p, n in run.devices)
            + f" [{max(run.first, now)}, {run.last})"
            for run in runs
            if run.last > now
        ]
        if parts or not runs:
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
