"""Feasible problems broken in one planted way: is that way among the suggestions, and does every suggestion work?

python tests/schedule/campaign_infeasible.py FIRST LAST [--json FILE]

Records are added to FILE; what it holds for this commit is not run again.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace
from pathlib import Path

import second_checker as reference

from bigmodel import schedule
from bigmodel.benchmarks.records import Records
from bigmodel.benchmarks.run import commit
from bigmodel.schedule import Job, Pool, Problem, Rate
from bigmodel.schedule.worker import shared

CAUSES = ("deadline", "crowded deadline", "capacity", "budget", "job budget")


def plant(seed: int) -> tuple[Problem, str, str]:
    """(problem, cause, words that a suggestion of that cause contains)."""
    rng = random.Random(seed)
    cause = CAUSES[seed % len(CAUSES)]
    slots = rng.randint(16, 30)
    pools = tuple(
        Pool(name=name, count=8, price=[round(rng.uniform(1, 3), 2) for _ in range(24)], billing="second")
        for name in ("a100", "h100")
    )
    jobs = []
    for j in range(rng.randint(3, 6)):
        pool = pools[j % 2].name
        hours = rng.uniform(1.5, slots / 5)
        points = tuple(Rate(pool=pool, devices=n, rate=float(n)) for n in (2, 4))
        more = {"min_run": 2, "restart": 0.25} if rng.random() < 0.4 else {}
        jobs.append(
            Job(name=f"job-{j}", work=hours * 4 * 3600, throughput=points, deadline=slots - rng.randint(0, 2), **more)
        )
    problem = Problem(slots=slots, pools=pools, jobs=tuple(jobs))
    base = schedule.solve(problem, time_limit=5, gap=0.05)
    j = rng.randrange(len(jobs))
    if cause == "deadline":
        fastest = -(-jobs[j].work // (4 * 3600))
        jobs[j] = replace(jobs[j], deadline=max(1, int(fastest) - 1 - rng.randint(0, 1)))
        return replace(problem, jobs=tuple(jobs)), cause, f"for job-{j}"
    if cause == "crowded deadline":
        # Three jobs want half a pool each by the same time.
        due = rng.randint(5, slots // 2)
        crowd = [
            Job(
                name=f"crowd-{i}",
                work=due * 4 * 3600 * 0.9,
                deadline=due,
                throughput=(Rate(pool="a100", devices=4, rate=4.0),),
            )
            for i in range(3)
        ]
        return replace(problem, jobs=(*jobs, *crowd)), cause, "a deadline of"
    if cause == "capacity":
        need = sum(job.work for job in jobs if job.throughput[0].pool == "a100") / 3600
        there = max(2, int(0.7 * need / slots) // 2 * 2)
        while there * slots > 0.85 * need:
            jobs = [replace(job, work=job.work * 1.2) if job.throughput[0].pool == "a100" else job for job in jobs]
            need *= 1.2
        pools = (replace(pools[0], count=there), pools[1])
        return replace(problem, pools=pools, jobs=tuple(jobs)), cause, "a100-hours"
    if cause == "budget":
        return replace(problem, budget=round(base.bound * rng.uniform(0.4, 0.9), 2)), cause, "a budget of"
    cost = base.cost_by_job[f"job-{j}"]
    least = min(min(pool.price) for pool in pools) * jobs[j].work / 3600
    jobs[j] = replace(jobs[j], budget=round(min(cost, least) * rng.uniform(0.5, 0.9), 2))
    return replace(problem, jobs=tuple(jobs)), cause, f"a budget of job-{j}"


def trial(seed: int) -> dict:
    """cause, and whether it was found: it is among at most three suggestions, each of which gives a plan that keeps
    the rules of second_checker."""
    problem, cause, words = plant(seed)
    begin = time.monotonic()
    try:
        plan = schedule.solve(problem, time_limit=20, gap=1.0)
        return {"seed": seed, "cause": cause, "found": False, "why": f"a plan was found: {plan.status}"}
    except schedule.Unknown as error:
        return {"seed": seed, "cause": cause, "found": False, "why": str(error)}
    except schedule.Infeasible as error:
        found = any(words in text for text in error.suggestions) and len(error.suggestions) <= 3
        works = [_works(cured) for cured in error.problems]
        found = found and len(works) == len(error.suggestions) and all(works)
        return {
            "seed": seed, "cause": cause, "found": found, "works": works, "reasons": error.reasons,
            "suggestions": error.suggestions, "seconds": round(time.monotonic() - begin, 2),
        }  # fmt: skip


def _works(cured: Problem) -> bool:
    try:
        plan = schedule.solve(cured, time_limit=20, gap=1.0, explain=False)
    except (schedule.Infeasible, schedule.Unknown):
        return False
    return reference.broken(cured, plan.allocation)[0] == []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    kept = Records(arguments.json, commit())
    records = [
        kept.measure("infeasible", {"seed": seed}, lambda seed=seed: trial(seed), shared().kill)
        for seed in range(arguments.first, arguments.last)
    ]
    for record in records:
        if not record["found"]:
            print(record, flush=True)
    print(sum(record["found"] for record in records), "of", len(records))


if __name__ == "__main__":
    main()
