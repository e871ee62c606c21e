"""The textbook modes against closed forms, linear_sum_assignment and each other."""

import itertools
import os

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from bigmodel.schedule import assign

CASES = int(os.environ.get("BIGMODEL_TEXTBOOK_CASES", "60"))  # docs/results has 1,000


@pytest.mark.parametrize("costs, dynamic, static, chosen", [((1, 2, 3, 4), 12, 30, 18), ((1, 1, 1, 1), 6, 12, 9)])
def test_worked_example(costs, dynamic, static, chosen):
    assert assign(costs, 3, "demand", [2, 3, 1]).cost == dynamic
    assert assign(costs, 3, "demand", [2, 3, 1], policy="static").cost == static
    loose = assign(costs, 3, "demand", [2, 3, 1], policy="static", each_used=False)
    assert loose.cost == chosen and loose.saving == loose.static_cost - loose.dynamic_cost


def random_costs(rng, m, slots, constant):
    costs = rng.uniform(0.1, 9, m if constant else (m, slots)).round(3)
    return costs, np.repeat(costs[:, None], slots, axis=1) if constant else costs


@pytest.mark.parametrize("seed", range(CASES))
def test_random_cases(seed):
    rng = np.random.default_rng(seed)
    m, slots = int(rng.integers(1, 7)), int(rng.integers(1, 7))
    costs, table = random_costs(rng, m, slots, True)
    assert assign(costs, slots, "cover").cost == pytest.approx(costs.sum() + max(0, slots - m) * costs.min())
    square = rng.uniform(-3, 9, (m, m)).round(3)
    exact = assign(square, m, "exact") if m > 0 else None
    assert exact.cost == pytest.approx(square[linear_sum_assignment(square)].sum())
    assert assign(square, m, "exact", solver="milp").cost == pytest.approx(exact.cost)
    demand = rng.integers(0, m + 1, slots)
    free = assign(table, slots, "demand", demand, each_used=False)
    assert free.cost == pytest.approx(sum(np.sort(table[:, t])[: demand[t]].sum() for t in range(slots)))
    assert (free.x.sum(axis=0) == demand).all()
    if demand.sum() >= m:
        used = assign(costs, slots, "demand", demand)
        # Every resource once, and of the rest the cheapest that a slot can still take.
        assert used.cost >= free.cost - 1e-9 and (used.x.sum(axis=1) >= 1).all()


def test_small_demands_equal_brute_force():
    rng = np.random.default_rng(5)
    for _ in range(12):
        m, slots = 3, 3
        table = rng.uniform(0, 5, (m, slots)).round(2)
        demand = rng.integers(1, 3, slots)
        best = np.inf
        for bits in itertools.product((0, 1), repeat=m * slots):
            x = np.array(bits).reshape(m, slots)
            if (x.sum(axis=0) == demand).all() and (x.sum(axis=1) >= 1).all():
                best = min(best, (x * table).sum())
        assert assign(table, slots, "demand", demand).cost == pytest.approx(best)


def test_events_and_table():
    answer = assign([3, 1], 3, "cover")
    assert answer.x.sum(axis=1).min() >= 1
    held = set()
    for slot, event in enumerate(answer.events):
        held = (held | set(event["acquire"])) - set(event["release"])
        assert held == (set(np.flatnonzero(answer.x[:, slot])) if slot < 3 else set())
    assert "cost 5 (optimal, dynamic)" in answer.table()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"costs": [1, 2], "slots": 3}, "as many resources as slots, got 2 and 3; try mode 'cover'"),
        ({"costs": [1, 2], "slots": 2, "policy": "static"}, "policy 'static'"),
        ({"costs": [1, 2], "slots": 2, "mode": "demand"}, "needs demand"),
        ({"costs": [1, 2], "slots": 2, "mode": "cover", "demand": [1, 1]}, "takes no demand"),
        ({"costs": [1, 2], "slots": 2, "mode": "demand", "demand": [3, 1]}, "whole numbers from 0 to 2"),
        ({"costs": [1, 2, 3], "slots": 2, "mode": "demand", "demand": [1, 1]}, "adds up to 2, too little"),
        ({"costs": [1, float("nan")], "slots": 2}, "not finite"),
        ({"costs": [1, 2], "slots": 0}, "slots is 0"),
        ({"costs": [1, "two"], "slots": 2}, "costs must be an array of numbers"),
        ({"costs": [[1], [2, 3]], "slots": 2}, "costs must be an array of numbers"),
        ({"costs": [1, 2], "slots": 2, "mode": "demand", "demand": [1, None, "x"]}, "demand must be an array"),
        ({"costs": [1, 2], "slots": 2, "mode": "all"}, "mode is 'all'"),
        ({"costs": [1, 2], "slots": 2, "solver": "best"}, "solver is 'best'"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, words):
    with pytest.raises(ValueError, match="^assign: ") as error:
        assign(**arguments)
    assert words in str(error.value) and "\n" not in str(error.value)
