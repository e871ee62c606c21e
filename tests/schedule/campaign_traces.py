"""Policies over seeded traces of spot prices and interruptions, against the clairvoyant bound.

python tests/schedule/campaign_traces.py FIRST LAST [--json FILE]

Records are added to FILE; what it holds for this commit is not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from bigmodel.benchmarks.records import Records
from bigmodel.benchmarks.run import commit
from bigmodel.schedule import Job, Pool, Problem, Rate, simulation
from bigmodel.schedule.worker import shared


def problem(seed: int, slots: int = 72, jobs: int = 8) -> Problem:
    """Three days; on-demand devices enough for everybody, a spot pool at 30 % of their price, a small owned one."""
    rng = np.random.default_rng([seed, 7])
    pools = (
        Pool(name="on-demand", count=64, price=4.0, billing="second", startup_hours=0.1),
        Pool(
            name="spot", count=24, price=1.2, ownership="spot", billing="second", startup_hours=0.1,
            interruptions_per_hour=1 / 12.5,
        ),
        Pool(name="owned", count=8, price=0.5, ownership="owned"),
    )  # fmt: skip
    made = []
    for j in range(jobs):
        base, hours, release = float(rng.uniform(800, 4000)), float(rng.uniform(10, 60)), int(rng.integers(0, 24))
        deadline = min(slots, int(release + hours / 8**0.92 * float(rng.uniform(2, 5)) + 8))
        points = [
            Rate(pool=pool.name, devices=n, rate=base * n**0.92 * (1.2 if pool.name == "on-demand" else 1.0))
            for pool in pools
            for n in (1, 2, 4, 8)
        ]
        made.append(
            Job(
                name=f"job-{j}",
                work=base * 3600 * hours,
                throughput=tuple(points),
                release=release,
                deadline=deadline,
                checkpoint_every=0.5,
                restart=0.1,
            )  # fmt: skip
        )
    return Problem(slots=slots, pools=pools, jobs=tuple(made))


def trial(seed: int, seconds: float = 4.0) -> dict:
    """The bound, and each policy's cost, misses and interruptions."""
    week = problem(seed)
    trace = simulation.trace(week, seed)
    record: dict = {"seed": seed, "bound": simulation.clairvoyant(week, trace, seconds)}
    for policy in simulation.POLICIES:
        outcome = simulation.simulate(week, trace, policy)
        record[policy] = {
            "cost": round(float(outcome.cost), 3), "missed": len(outcome.missed),
            "interruptions": outcome.interruptions, "seconds": round(outcome.seconds, 2),
        }  # fmt: skip
    return record


def summary(records: list[dict]) -> dict:
    """Per policy: mean cost over bound, the worst, and misses."""
    result = {}
    for policy in simulation.POLICIES:
        ratios = [record[policy]["cost"] / record["bound"] for record in records]
        missed = sum(record[policy]["missed"] for record in records)
        result[policy] = {"mean": round(float(np.mean(ratios)), 4), "worst": round(max(ratios), 4), "missed": missed}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    kept = Records(arguments.json, commit())
    records = [
        kept.measure("traces", {"seed": seed}, lambda seed=seed: trial(seed), shared().kill)
        for seed in range(arguments.first, arguments.last)
    ]
    print(json.dumps(summary(records), indent=1))


if __name__ == "__main__":
    main()
