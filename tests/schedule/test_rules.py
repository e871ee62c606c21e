"""The rules and their second reading, on hand-made allocations whose figures can be checked by head."""

import numpy as np
import pytest
import second_checker as reference

from bigmodel.schedule import Job, Pool, Problem, Rate, check


def one(pool=None, job=None, slots=6, **more):
    pool = Pool(**{"name": "p", "count": 4, "price": 1.0} | (pool or {}))
    points = (Rate(pool="p", devices=1, rate=1 / 3600), Rate(pool="p", devices=2, rate=2 / 3600))
    return Problem(
        slots=slots,
        pools=(pool,),
        jobs=(Job(**{"name": "j", "work": 2.0, "throughput": points} | (job or {})),),
        **more,
    )


def held(*devices):
    return np.array([[list(devices)]])


@pytest.mark.parametrize(
    "pool, job, devices, cost",
    [
        ({}, {}, (1, 1, 0, 0, 0, 0), 2.0),
        ({}, {"work": 1.5}, (1, 1, 0, 0, 0, 0), 2.0),
        ({"billing": "second"}, {"work": 1.5}, (1, 1, 0, 0, 0, 0), 1.5),
        ({"startup_hours": 0.5}, {"work": 1.5}, (1, 1, 0, 0, 0, 0), 2.0),
        ({"startup_hours": 0.5, "billing": "second"}, {"work": 1.25}, (1, 1, 0, 0, 0, 0), 1.75),
        ({}, {"restart": 0.5}, (1, 0, 1, 1, 0, 0), 3.0),
        ({"billing": "second"}, {"restart": 0.5}, (1, 0, 1, 1, 0, 0), 2.5),
        ({"startup_hours": 1.5}, {"work": 1.0}, (1, 1, 1, 0, 0, 0), 3.0),
        ({"startup_hours": 0.25}, {"restart": 0.25, "work": 1.75 + 0.75}, (1, 2, 0, 0, 0, 0), None),
        ({"interruptions_per_hour": 0.5}, {"checkpoint_every": 1.0, "restart": 0.5}, (1, 1, 1, 0, 0, 0), 3.0),
        ({"price": [1.0, 2.0, 5.0] * 8}, {}, (0, 1, 1, 0, 0, 0), 7.0),
    ],
)
def test_costs(pool, job, devices, cost):
    problem = one(pool, job)
    account = check(problem, held(*devices))
    wrong, theirs = reference.broken(problem, held(*devices))
    assert bool(account.violations) == bool(wrong) == (cost is None)
    if cost is not None:
        assert account.measure("cost") == pytest.approx(cost) == theirs


@pytest.mark.parametrize(
    "job, devices, words",
    [
        ({}, (0, 0, 0, 0, 0, 0), "is not planned"),
        ({}, (1, 0, 0, 0, 0, 0), "are not done"),
        ({}, (1, 1, 1, 0, 0, 0), "holds devices in slot 2"),
        ({}, (3, 0, 0, 0, 0, 0), "may not run on 3 devices"),
        ({"release": 1}, (1, 1, 0, 0, 0, 0), "before slot 1"),
        ({"deadline": 2}, (0, 1, 1, 0, 0, 0), "past slot 2"),
        ({"min_run": 2}, (1, 0, 1, 0, 0, 0), "shorter than 2"),
        ({"preemptible": False}, (1, 0, 1, 0, 0, 0), "not preemptible"),
        ({"preemptible": False, "work": 3.0}, (1, 2, 0, 0, 0, 0), "not preemptible"),
        ({"budget": 1.5}, (1, 1, 0, 0, 0, 0), "over 1.50"),
    ],
)
def test_broken_rules_are_found_by_both(job, devices, words):
    problem = one(job=job)
    assert any(words in text for text in check(problem, held(*devices)).violations)
    assert reference.broken(problem, held(*devices))[0]


def test_capacity_quota_and_precedence():
    points = (Rate(pool="p", devices=1, rate=1 / 3600), Rate(pool="q", devices=1, rate=1 / 3600))
    jobs = tuple(Job(name=f"j{i}", work=1.0, throughput=points, after=("j0",) if i == 2 else ()) for i in range(3))
    pools = tuple(Pool(name=name, count=1, quota_group="g") for name in "pq")
    problem = Problem(slots=3, pools=pools, jobs=jobs, quotas={"g": 1})
    crowded = np.zeros((3, 2, 3), dtype=int)
    crowded[0, 0, 0] = crowded[1, 1, 0] = crowded[2, 0, 0] = 1
    text = " ".join(check(problem, crowded).violations)
    assert "p: 2 devices in slot 0" in text and "quota g: 3 devices" in text and "starts before j0 has ended" in text
    assert len(reference.broken(problem, crowded)[0]) >= 3


def test_measures():
    points = (Rate(pool="p", devices=1, rate=1 / 3600),)
    jobs = (
        Job(name="a", work=1.0, throughput=points, deadline=1, soft=True, priority=3.0, owner="x"),
        Job(name="b", work=2.0, throughput=points, release=1, owner="x"),
        Job(name="c", work=1.0, throughput=points, value=7.0),
    )
    pool = Pool(name="p", count=2, price=1.0, kw=0.5, carbon=400.0, pue=1.5)
    problem = Problem(slots=4, slot_hours=1.0, pools=(pool,), jobs=jobs)
    table = np.zeros((3, 1, 4), dtype=int)
    table[0, 0, 2] = table[1, 0, [1, 3]] = 1
    account = check(problem, table)
    assert not account.violations
    expected = {
        "cost": 3 + 7,
        "makespan": 4.0,
        "lateness": 3 * 2.0,
        "fairness": 3.0,
        "owner_fairness": 4 / 3,
        "carbon": 3 * 0.5 * 0.4 * 1.5,
    }
    for name, value in expected.items():
        assert account.measure(name) == pytest.approx(value), name


def test_shape_is_checked():
    with pytest.raises(ValueError, match="allocation has shape"):
        check(one(), np.zeros((1, 1, 5)))


@pytest.mark.parametrize("count", [np.nan, np.inf, -1.0, 0.5])
def test_counts_that_are_no_counts_are_violations(count):
    account = check(one(), np.full((1, 1, 6), count))
    assert account.violations[0] == "j: a device count is negative or not whole" and account.jobs[0].runs == []


def test_text_is_no_allocation():
    with pytest.raises(ValueError, match="check: allocation must hold whole numbers"):
        check(one(), np.full((1, 1, 6), "1"))
