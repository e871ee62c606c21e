"""`bigmodel bench plan`: certified gaps on generated problems, modelling time included, and the planner's footprint.

The goals are medians over 10 seeds at loads of 30, 60 and 85 %; docs/results/planner.json holds the recorded run.
Each measurement is a process of its own, so that memory and start-up are its own too. A run may be cut into parts that
append to one file; what the file has for this commit is not measured again. The campaigns of random, infeasible and
simulated problems are tests/schedule/campaign_*.py, which write to the same file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from bigmodel.benchmarks.records import Records

SIZES = ("20x3x48", "100x4x168", "200x5x168")
FAMILIES = ("A", "B", "C")
LOADS = (0.3, 0.6, 0.85)
SEEDS = 10
# Seconds, and the goal for the median gap; None: reported, no goal.
GOALS: dict[tuple[str, str], tuple[float, float | None]] = {
    ("A", "20x3x48"): (5.0, 0.01),
    ("A", "100x4x168"): (10.0, 0.02),
    ("A", "200x5x168"): (30.0, 0.02),
    ("B", "20x3x48"): (5.0, 0.01),
    ("B", "100x4x168"): (10.0, 0.03),
    ("B", "200x5x168"): (30.0, 0.03),
    ("C", "20x3x48"): (5.0, 0.02),
    ("C", "100x4x168"): (30.0, 0.05),
    ("C", "200x5x168"): (30.0, None),
}


def measure(size: str, family: str, load: float, seed: int) -> dict[str, Any]:
    """Plans one generated problem in a fresh process.

    Returns size, family, load, seed, gap (inf as None), cost, bound, seconds (the problem read, the plan checked) and
    memory_mib, the largest of this process and of its solver's added up.
    """
    command = [sys.executable, "-m", "bigmodel.benchmarks.planner", "--one", size, family, str(load), str(seed)]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if found.returncode:
        raise RuntimeError(f"bench plan: {size} {family} {load} {seed} failed: {found.stderr.strip()[-300:]}")
    return json.loads(found.stdout)


def _one(size: str, family: str, load: float, seed: int) -> dict[str, Any]:
    import resource
    import time

    from bigmodel import schedule

    jobs, pools, slots = map(int, size.split("x"))
    limit, goal = GOALS[family, size]
    planted = schedule.generate(jobs, pools, slots, load, family, seed)
    begin = time.monotonic()
    try:
        plan = schedule.solve(planted.problem, time_limit=limit, gap=(goal or 0.05) / 2, seed=seed)
        value, bound = plan.value, plan.bound
        gap = plan.gap if plan.gap < float("inf") else None
    except schedule.Unknown:
        value = bound = gap = None
    seconds = time.monotonic() - begin
    from bigmodel.schedule.worker import shared

    shared().kill()
    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    return {
        "size": size, "family": family, "load": load, "seed": seed, "gap": gap, "cost": value, "bound": bound,
        "seconds": round(seconds, 2), "memory_mib": round(peak),
    }  # fmt: skip


def import_seconds() -> float:
    """What `import bigmodel.schedule` and the solver take beyond scipy.optimize, median of 5 processes."""
    script = (
        "import time, scipy.optimize, scipy.sparse, numpy; t = time.perf_counter(); import bigmodel.schedule; "
        "bigmodel.schedule.solve; print(time.perf_counter() - t)"
    )
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True) for _ in range(5)]
    return statistics.median(float(run.stdout) for run in runs)


def summary(records: Iterable[dict[str, Any]]) -> str:
    """A table of median and worst gaps, with the goals."""
    records = list(records)
    lines = [
        "| family | size | load | median gap | worst | goal | seconds | runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        for size in SIZES:
            for load in (*LOADS, None):
                mine = [r for r in records if (r["family"], r["size"]) == (family, size) and load in (r["load"], None)]
                if mine:
                    lines.append(_line(family, size, load, mine))
    return "\n".join(lines)


def _line(family: str, size: str, load: float | None, mine: list[dict[str, Any]]) -> str:
    gaps = [float("inf") if record["gap"] is None else record["gap"] for record in mine]
    limit, goal = GOALS[family, size]
    wanted = "-" if goal is None else f"<= {goal:.0%}" + (" met" if statistics.median(gaps) <= goal else " **missed**")
    slowest = max(record["seconds"] for record in mine)
    where = "all" if load is None else f"{load:.0%}"
    return (
        f"| {family} | {size} | {where} | {statistics.median(gaps):.2%} | {max(gaps):.2%} | {wanted} | "
        f"{slowest:.1f} of {limit:g} | {len(mine)} |"
    )


def run(
    quick: bool = False, path: Path | None = None, sizes: Iterable[str] = SIZES, stop_after: float = float("inf")
) -> str:
    """Measures what `path` does not hold for this commit yet, and writes it there; the table of this commit's records.

    Args:
        quick: one seed of the smallest size.
        sizes: of SIZES. stop_after: seconds after which no measurement is begun.
    """
    from bigmodel.benchmarks.run import commit

    records = Records(path, commit(), stop_after)
    # Seeds outermost: a run that is stopped has its seeds spread over all cells.
    for seed in range(1 if quick else SEEDS):
        for size in SIZES[:1] if quick else sizes:
            for family in FAMILIES:
                for load in LOADS:
                    if not records.done():
                        key = {"size": size, "family": family, "load": load, "seed": seed}
                        records.measure("gaps", key, partial(measure, size, family, load, seed))
    lines = [summary(records.of("gaps"))]
    if not records.done():
        record = records.measure("import", {}, lambda: {"seconds": round(import_seconds(), 3)})
        lines.append(f"import bigmodel.schedule and its solver, beyond scipy: {record['seconds']:.2f} s")
    else:
        lines.append("stopped: the same command goes on from here")
    return "\n\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bigmodel.benchmarks.planner")
    parser.add_argument("--one", nargs=4, required=True, metavar=("SIZE", "FAMILY", "LOAD", "SEED"))
    size, family, load, seed = parser.parse_args().one
    print(json.dumps(_one(size, family, float(load), int(seed))))
