"""Feasible problems broken in one planted way: is that way among the suggestions, and does every suggestion work?

python tests/schedule/campaign_infeasible.py FIRST LAST [--week] [--json FILE]

Small ones have 3 to 9 jobs, 2 pools and 16 to 30 slots; those of --week 10 to 15 jobs, 4 pools and 168 slots, in turn
generated and of the example, and the default time limit. Records are added to FILE; what it holds for this commit is
not run again.
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
from bigmodel.schedule import Job, Pool, Problem, Rate, files, rules, solver
from bigmodel.schedule.worker import shared

CAUSES = ("deadline", "crowded deadline", "capacity", "budget", "job budget")
WEEK_CAUSES = (*CAUSES, "owner budget")


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


def plant_week(seed: int) -> tuple[Problem, str, str]:
    """As `plant`, of a week of four pools."""
    rng = random.Random(seed)
    cause, round_ = WEEK_CAUSES[seed % len(WEEK_CAUSES)], seed // len(WEEK_CAUSES)
    if round_ % 2:
        problem = files.from_dict(files.toml().loads(files.example())).expanded
        problem = replace(problem, jobs=tuple(replace(job, value=None) for job in problem.jobs))
    else:
        problem = schedule.generate(10, 4, 168, 0.5, "C", seed).problem
    jobs, pool = list(problem.jobs), rng.choice(problem.pools)
    if cause == "deadline":
        j = rng.choice([j for j, job in enumerate(jobs) if job.deadline is not None and not job.soft])
        first, _ = problem.window(jobs[j])
        late = first + rules.fastest_slots(problem, jobs[j]) - 1 - rng.randint(0, 3)
        jobs[j] = replace(jobs[j], deadline=max(first + 1, late))
        return replace(problem, jobs=tuple(jobs)), cause, f"for {jobs[j].name}"
    if cause in ("crowded deadline", "capacity"):
        # Three jobs want half a pool each by the same time, or for most of the week.
        due = rng.randint(24, 96) if cause == "crowded deadline" else None
        half = int(problem.count[problem.pool_index(pool.name)].max()) // 2
        work = 3600.0 * half * 0.85 * (due or problem.slots)
        points = (Rate(pool=pool.name, devices=half, rate=float(half)),)
        crowd = [Job(name=f"crowd-{i}", work=work, deadline=due, throughput=points) for i in range(3)]
        words = "a deadline of" if due else f"{pool.name}-hour"
        return replace(problem, jobs=(*jobs, *crowd)), cause, words
    if cause == "budget":
        base = schedule.solve(replace(problem, budget=None), time_limit=10, gap=0.05)
        return replace(problem, budget=round(base.bound * rng.uniform(0.4, 0.9), 2)), cause, "a budget of"
    least = [_least(problem, job) * rng.uniform(0.5, 0.9) for job in jobs]
    if cause == "job budget":
        j = rng.choice([j for j in range(len(jobs)) if least[j] > 0])
        jobs[j] = replace(jobs[j], budget=round(least[j], 2))
        return replace(problem, jobs=tuple(jobs)), cause, f"a budget of {jobs[j].name} "
    owners = {job.owner: 0.0 for job in jobs}
    for job, cost in zip(jobs, least, strict=True):
        owners[job.owner] += cost
    owner = rng.choice([owner for owner, cost in owners.items() if cost > 0])
    return replace(problem, budgets={owner: round(owners[owner], 2)}), cause, f"a budget of owner {owner} "


def _least(problem: Problem, job: Job) -> float:
    """Currency: below what the job costs in any plan."""
    prices = {pool.name: price.min() for pool, price in zip(problem.pools, problem.price, strict=True)}
    return min(prices[point.pool] * point.devices / point.rate for point in job.throughput) * job.work / 3600


def trial(seed: int, week: bool = False) -> dict:
    """cause, and whether it was found: it is among at most three suggestions, each of which gives a plan that keeps
    the rules of second_checker."""
    problem, cause, words = plant_week(seed) if week else plant(seed)
    record = {"seed": seed, "cause": cause, "found": False}
    begin = time.monotonic()
    try:
        plan = schedule.solve(problem, time_limit=solver.TIME_LIMIT if week else 20, gap=1.0)
        return record | {"why": f"a plan was found: {plan.status}"}
    except schedule.Unknown as error:
        return record | {"why": str(error)}
    except schedule.Infeasible as error:
        seconds = round(time.monotonic() - begin, 2)
        works = [_works(cured) for cured in error.problems]
        found = any(words in text for text in error.suggestions) and len(error.suggestions) <= 3
        found = found and len(works) == len(error.suggestions) and all(works)
        return record | {
            "found": found, "works": works, "reasons": error.reasons, "suggestions": error.suggestions,
            "seconds": seconds,
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
    parser.add_argument("--week", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    kept = Records(arguments.json, commit())
    part = "infeasible week" if arguments.week else "infeasible"
    records = [
        kept.measure(part, {"seed": seed}, lambda seed=seed: trial(seed, arguments.week), shared().kill)
        for seed in range(arguments.first, arguments.last)
    ]
    for record in records:
        if not record["found"]:
            print(record, flush=True)
    print(sum(record["found"] for record in records), "of", len(records))


if __name__ == "__main__":
    main()
