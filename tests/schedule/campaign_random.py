"""Random problems with a planted feasible plan, each answer judged by tests/schedule/second_checker.py.

    python tests/schedule/campaign_random.py FIRST LAST [--json FILE]

The first tenth of each thousand are tiny and are compared with brute force at gap 0. Blocks of 50 seeds are added to
FILE; what it holds for this commit is not run again.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import second_checker as reference

from bigmodel import schedule
from bigmodel.benchmarks.records import Records
from bigmodel.benchmarks.run import commit
from bigmodel.schedule.worker import shared

_BLOCK = 50  # seeds of one record


def trial(seed: int, seconds: float = 1.0) -> str:
    """ "good", "good, tiny", "unknown", or a sentence that says what is wrong."""
    tiny = seed % 1000 < 100
    problem, planted = reference.random_problem(seed, tiny)
    wrong, planted_cost = reference.broken(problem, planted)
    assert not wrong, (seed, wrong)
    try:
        plan = schedule.solve(problem, time_limit=20 if tiny else seconds, gap=0.0 if tiny else 0.05, explain=False)
    except schedule.Unknown:
        return "unknown"
    except schedule.Infeasible as error:
        return f"called infeasible: {error}"
    except RuntimeError as error:
        return f"fails: {error}"
    wrong, cost = reference.broken(problem, plan.allocation)
    if wrong:
        return f"breaks a rule: {wrong[0]}"
    if not reference.isclose(cost, plan.value):
        return f"cost is {cost}, not {plan.value}"
    if plan.bound > min(cost, planted_cost) * (1 + 1e-6) + 1e-6:
        return f"bound {plan.bound} is above {min(cost, planted_cost)}"
    if tiny:
        best = reference.brute_force(problem)
        if best is None or not reference.isclose(best[0], plan.value):
            return f"brute force finds {best}, the planner {plan.value} ({plan.status})"
        return "good, tiny"
    return "good"


def block(first: int, last: int) -> dict:
    """counts of verdicts, what is not good by seed, and seconds."""
    begin = time.monotonic()
    verdicts = {seed: trial(seed) for seed in range(first, last)}
    counts = Counter(verdict if verdict.startswith(("good", "unknown")) else "wrong" for verdict in verdicts.values())
    wrong = {str(seed): verdict for seed, verdict in verdicts.items() if not verdict.startswith("good")}
    return {"counts": dict(counts), "not good": wrong, "seconds": round(time.monotonic() - begin, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    kept, counts = Records(arguments.json, commit()), Counter()
    for first in range(arguments.first, arguments.last, _BLOCK):
        last = min(first + _BLOCK, arguments.last)
        record = kept.measure(
            "random", {"first": first, "last": last}, lambda first=first, last=last: block(first, last), shared().kill
        )
        counts.update(record["counts"])
        for seed, verdict in record["not good"].items():
            print(seed, verdict, flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
